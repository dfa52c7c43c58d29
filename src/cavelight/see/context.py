"""Figures of long context: needles found by length and depth, and held-out loss by position."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cavelight.see import style
from cavelight.see.style import BLUE, GROUND, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

CELL = (0.82, 0.27)  # inches
LIGHT_ENOUGH = 0.55  # share found above which a cell's words are white


class Found(Protocol):
    """Needles of one length (train.needle.Found): the share found in each depth, from the beginning on."""

    @property
    def length(self) -> int: ...
    @property
    def shares(self) -> tuple[float, ...]: ...


class Bucket(Protocol):
    """Predictions from `first` to `last` tokens of context (train.evaluate.Bucket)."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def bits_per_byte(self) -> float: ...


def draw_needles(results: Sequence[Found], path: Path, title: str, facts: Sequence[str] = ()) -> None:
    """A heat map: lengths across, depths downwards, the share of needles found in each cell."""
    depths = len(results[0].shares)
    width, height = CELL[0] * len(results), CELL[1] * depths
    with style.sheet(path, max(width + 2.2, 5.2), height + 1.95) as figure:
        style.heading(figure, title, facts)
        axes = style.panel(figure, 1.25, 1.1, width, height)
        style.entitle(axes, "Needles found", "percent", grid=None)
        table = [[found.shares[depth] for found in results] for depth in range(depths)]
        axes.imshow(table, cmap=_scale(), vmin=0, vmax=1, aspect="auto")
        for row, shares in enumerate(table):
            for column, share in enumerate(shares):
                _cell(axes, column, row, share)
        axes.set_xticks(range(len(results)), [_short(found.length) for found in results])
        edges = [f"{100 * d // depths}–{100 * (d + 1) // depths} %" for d in range(depths)]
        axes.set_yticks(range(depths), edges)
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("depth, from the beginning", fontsize=8)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)


def draw_by_position(buckets: Sequence[Bucket], path: Path, title: str, facts: Sequence[str] = ()) -> None:
    """Bits per byte over the number of tokens that a prediction is made from, on a doubling scale."""
    with style.sheet(path, 6.4, 3.3) as figure:
        style.heading(figure, title, facts)
        axes = style.panel(figure, 0.6, 1.1, 5.2, 1.6)
        style.entitle(axes, "Held-out text", "bits per byte")
        known = [bucket for bucket in buckets if bucket.bits_per_byte == bucket.bits_per_byte]
        edges = [known[0].first, *(bucket.last + 1 for bucket in known)]
        axes.stairs([bucket.bits_per_byte for bucket in known], edges, color=BLUE, linewidth=1.6, baseline=None)
        axes.set_xscale("log", base=2)
        axes.set_xlim(edges[0], edges[-1])
        ticks = [edge for edge in edges if edge >= 16][:: max(1, len(edges) // 8)]
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens of context", fontsize=8)
        last = known[-1]
        axes.annotate(
            f"{last.bits_per_byte:.3f}",
            (1, last.bits_per_byte),
            xytext=(5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            weight="bold",
            color=BLUE,
        )


def _cell(axes: "Axes", column: int, row: int, share: float) -> None:
    words = f"{100 * share:.3g}"
    axes.text(column, row, words, ha="center", va="center", size=8, color=GROUND if share > LIGHT_ENOUGH else INK)


def _scale() -> "Colormap":
    """Amber where needles are lost, pale in the middle, dark blue where all are found."""
    return style.diverging().reversed()


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
