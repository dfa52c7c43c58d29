"""The one look of all figures: sheet, colours, panels, and labels that stand beside their lines.

Light ground, dark blue and amber (told apart by any eye), thin lines, words in place of legends. Only this file meets
matplotlib, and only inside functions; pyplot and the settings of whoever calls stay untouched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from cavelight.disk import file_beside
from cavelight.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, FAINT, GROUND = "#1b2733", "#66727e", "#dde2e7", "#ffffff"
BLUE, AMBER, GREY = "#14568f", "#d97a00", "#9aa5b0"
DEEP_AMBER = "#a85c00"  # amber dark enough for words
DEEP = {AMBER: DEEP_AMBER, GREY: MUTED}

DOTS_PER_INCH = 200
FORMATS = (".png", ".svg", ".pdf")
LINE_HEIGHT = 1.25  # of the font's size, between labels

_LOOK: dict[Any, Any] = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # names of files may hold dollars
    "svg.hashsalt": "cavelight",  # equal figures give equal files
}


@contextmanager
def sheet(path: Path, width: float, height: float, *more: Path) -> Iterator["Figure"]:
    """A figure of so many inches to draw on; saved when the block ends, as PNG, SVG or PDF by each path's suffix.

    Raises UserError for another suffix and for a disk that is full.
    """
    for wrong in [file for file in (path, *more) if file.suffix.lower() not in FORMATS]:
        raise UserError(
            "A figure is written as PNG, SVG or PDF", got=str(wrong), do=f"end its name in one of {', '.join(FORMATS)}"
        )
    import matplotlib
    from matplotlib.figure import Figure

    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        figure = Figure(figsize=(width, height), facecolor=GROUND)
        yield figure
        for file in (path, *more):
            form = file.suffix.lower().removeprefix(".")
            with file_beside(file) as scratch:
                figure.savefig(scratch, format=form, dpi=DOTS_PER_INCH, metadata=undated[form])


def heading(figure: "Figure", title: str, facts: Sequence[str] = (), left: float = 0.6) -> None:
    """The sheet's title, and facts in grey beneath it; `left` in inches."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.28 / height, title, size=13, weight="bold", va="center")
    figure.text(left / width, 1 - 0.53 / height, "   ·   ".join(facts), size=8.5, color=MUTED, va="center")


def panel(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """A panel placed in inches, `top` counted from the sheet's upper edge."""
    sheet_width, sheet_height = figure.get_size_inches()
    return figure.add_axes(
        (left / sheet_width, 1 - (top + height) / sheet_height, width / sheet_width, height / sheet_height)
    )


def entitle(axes: "Axes", title: str, unit: str = "", grid: Literal["x", "y"] | None = "y") -> None:
    """A panel's title at its upper left with the unit in grey behind it, and faint lines to read values by."""
    first = axes.annotate(
        title, (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", weight="bold", size=9.5
    )
    axes.annotate(unit, (1, 0), xytext=(6, 0), xycoords=first, textcoords="offset points", color=MUTED, va="bottom")
    if grid:
        axes.grid(axis=grid, color=FAINT, linewidth=0.6)


def say_instead(axes: "Axes", sentence: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, fill(sentence, 40), transform=axes.transAxes, ha="center", va="center", color=MUTED, style="italic"
    )


def count_axis(axis: "Axis", word: str) -> None:
    """Whole numbers with k, M, B, and the word for what they count."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_label_text(word, fontsize=8)


def short(number: float, gap: str = "") -> str:
    """1500 as 1.5k, 4718592 as 4.72M: three digits at most."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{gap}{unit}"
    return f"{number:.3g}{gap}"


def label_lines(axes: "Axes", labels: Sequence[tuple[float, str, str]], size: float = 8.5) -> None:
    """Words right of a panel at the height of their lines' ends, moved apart where they would overlap.

    labels: (y in data units, text, colour). The panel's limits and its scale have to be set before.
    """
    gap = _line(axes, size)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [min(max(float(to_axes.transform((0, y))[1]), 0), 1) for y, _, _ in labels]
    placed, floor, ceiling = spread(wanted, gap), 0.0, 1.0
    upwards = sorted(range(len(placed)), key=placed.__getitem__)
    for i in upwards:  # none below the panel
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    for i in reversed(upwards):  # none above it, where its title is
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    for y, (_, text, color) in zip(placed, labels, strict=True):
        axes.annotate(
            text,
            (1, y),
            xytext=(7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=DEEP.get(color, color),
            size=size,
            va="center_baseline",
        )


def label_levels(axes: "Axes", levels: Sequence[tuple[float, str]], least: float = 0.0, size: float = 8.0) -> None:
    """Dashed lines across a panel, each with its words on it at the right, and room for them.

    levels: (y in data units, text). The panel then spans at least `least`.
    """
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    low, high = min([low, *(y for y, _ in levels)]), max([high, *(y for y, _ in levels)])
    low, high = min(low, (low + high - least) / 2), max(high, (low + high + least) / 2)
    line = _line(axes, size)
    low, high = low - 0.05 * (high - low), high + 1.4 * line * (high - low)
    axes.set_ylim(low, high)
    heights = spread([(y - low) / (high - low) for y, _ in levels], line)
    for (y, text), height in zip(levels, heights, strict=True):
        axes.axhline(y, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        words = axes.text(0.99, height + 0.1 * line, text, transform=axes.transAxes, size=size, ha="right", va="bottom")
        words.set_path_effects([withStroke(linewidth=3, foreground=GROUND)])


def _line(axes: "Axes", size: float) -> float:
    """Height of a line of words as a share of the panel's."""
    return LINE_HEIGHT * size / 72 / (axes.bbox.height / axes.figure.dpi)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted ones, in their order, that lie at least `gap` apart.

    Places that come too close form a group, which is centred on the mean of what its members want.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        return sum(wanted[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and start(groups[-1]) < start(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = dict.fromkeys(order, 0.0)
    for group in groups:
        for rank, i in enumerate(group):
            placed[i] = start(group) + gap * rank
    return [placed[i] for i in range(len(wanted))]


def shades(count: int, family: Literal["blue", "amber"] = "blue") -> list[str]:
    """Colours from light to dark, one for each line of an ordered family."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ends = {"blue": ["#5b9bd0", "#1f6299", "#0a2c4d"], "amber": [AMBER, "#8a4300", "#4d2500"]}
    scale = LinearSegmentedColormap.from_list("shades", ends[family])
    return [to_hex(scale(i / max(count - 1, 1))) for i in range(count)]


def diverging() -> "Colormap":
    """Blue below the middle, pale grey at it, amber to brown above."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = ["#0b3e6f", "#3f83bd", "#b5d2e8", "#eef0f1", "#f6cd8f", "#d97a00", "#7a3b00"]
    return LinearSegmentedColormap.from_list("blue-amber", colors)


def box(
    axes: "Axes", left: float, bottom: float, width: float, height: float, face: str, edge: str = "", **more: Any
) -> None:
    """A block with slightly rounded corners on a drawing whose units are inches."""
    from matplotlib.patches import FancyBboxPatch

    radius = min(0.05, width / 4, height / 4)
    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, shape, facecolor=face, edgecolor=edge or "none", **more)
    )


def arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float], color: str = MUTED) -> None:
    """A thin arrow that ends at `end`."""
    look = {"arrowstyle": "-|>,head_length=0.28,head_width=0.13", "color": color, "linewidth": 0.9}
    axes.annotate("", end, start, arrowprops={**look, "shrinkA": 0, "shrinkB": 0})
