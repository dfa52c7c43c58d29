"""One picture of a model: its layers and prediction modules, and one layer opened; sizes from its configuration.

Coordinates are inches from the lower left corner. Letters: E experts, K experts a token, G expert groups.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cavelight.see import style
from cavelight.see.style import AMBER, BLUE, DEEP_AMBER, FAINT, GREY, GROUND, INK, MUTED
from cavelight.spec import cost
from cavelight.spec.config import ModelConfig
from cavelight.spec.shapes import parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 9.0, 5.9
LEFT, RIGHT = 0.35, 8.65
STREAM, SLAB = 4.28, 0.62  # height of the line that the layers sit on, and of a layer
CARD, CARD_TOP = "#f4f7f9", 3.3
PALE_BLUE, PALE_AMBER, LIGHT = "#b4cde3", "#fbe3bf", "#ffb84d"
MODULES_DRAWN = 2


def draw_architecture(config: ModelConfig, path: Path, title: str = "A DeepSeek-V3-style model") -> None:
    """The model in one picture, its sizes from the configuration and the table of parameters.

    path: ends in .png, .svg or .pdf. Of more than two prediction modules the first and the last are drawn. Raises
    UserError for a model without latent attention.
    """
    config.check_latent("The drawing of a model")
    with style.sheet(path, WIDTH, HEIGHT) as figure:
        style.heading(figure, title, _facts(config), left=LEFT)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.set_axis_off()
        slab_left, slab_right = _layers(axes, config)
        _light(axes, slab_left, slab_right)
        style.box(axes, LEFT, 0.25, RIGHT - LEFT, CARD_TOP - 0.25, CARD)
        _attention(axes, config)
        _cache(axes, config)
        axes.plot([5.3, 5.3], [0.45, CARD_TOP - 0.2], color=FAINT, linewidth=0.8)
        if config.is_moe(_opened(config)):
            _experts(axes, config)
        else:
            _dense(axes, config)


def _facts(config: ModelConfig) -> list[str]:
    total, active, mtp = cost.total_parameters(config), cost.active_parameters(config), cost.mtp_parameters(config)
    facts = [f"{_count(total)} parameters"]
    facts += [f"{_count(active)} active per token"] if active < total else []
    facts += [f"{_count(mtp)} more for multi-token prediction"] if mtp else []
    return facts


def _light(axes: "Axes", slab_left: float, slab_right: float) -> None:
    """A beam from the layer that is looked at to what it holds, fading on its way."""
    bottom, top = CARD_TOP, STREAM - SLAB / 2
    (beam,) = axes.fill([slab_left, slab_right, RIGHT, LEFT], [top, top, bottom, bottom], facecolor="none")
    fading = [[(*_rgb(LIGHT), 0.55)], [(*_rgb(LIGHT), 0.1)]]
    extent = (LEFT, RIGHT, bottom, top)
    axes.imshow(fading, extent=extent, aspect="auto", interpolation="bilinear", clip_path=beam)


def _rgb(color: str) -> tuple[float, float, float]:
    return int(color[1:3], 16) / 255, int(color[3:5], 16) / 255, int(color[5:7], 16) / 255


def _layers(axes: "Axes", config: ModelConfig) -> tuple[float, float]:
    """The strip of layers, left to right; returns left and right edge of the one that is opened."""
    modules = min(config.num_nextn_predict_layers, MODULES_DRAWN)
    start, end = 1.35, 7.95 - 1.2 * modules
    _say(axes, 0.42, STREAM, "t", weight="bold")
    axes.plot([0.5, end + 0.3 + 1.2 * modules], [STREAM, STREAM], color=MUTED, linewidth=0.9, zorder=0)
    style.box(axes, 0.62, STREAM - SLAB / 2, 0.3, SLAB, GREY)
    _say(axes, 0.77, STREAM + 0.43, "embedding")
    _say(axes, 0.77, STREAM - 0.45, f"{config.vocab_size:,} × {config.hidden_size:,}", color=MUTED, size=7.5)
    layers = config.num_hidden_layers
    pitch = (end - start) / layers
    width = min(0.7 * pitch, 0.4)
    lefts = [start + pitch * (n + 0.5) - width / 2 for n in range(layers)]
    for n, left in enumerate(lefts):
        face = LIGHT if n == _opened(config) else BLUE if config.is_moe(n) else GREY
        style.box(axes, left, STREAM - SLAB / 2, width, SLAB, face)
    _name_layers(axes, config, [left + width / 2 for left in lefts])
    _head(axes, end + 0.3, "t + 1")
    for m in range(modules):
        _module(axes, config, m, end + 0.3 + 1.2 * m)
    opened = lefts[_opened(config)]
    return opened, opened + width


def _name_layers(axes: "Axes", config: ModelConfig, centers: list[float]) -> None:
    dense = [x for n, x in enumerate(centers) if not config.is_moe(n)]
    experts = [x for n, x in enumerate(centers) if config.is_moe(n)]
    height = STREAM + 0.43
    with_experts = f"{_number(len(experts), 'layer')} with experts"
    if not experts:
        _say(axes, (dense[0] + dense[-1]) / 2, height, _number(len(dense), "layer"), color=MUTED)
    elif dense and dense[-1] > experts[0]:  # they alternate
        _say(axes, (centers[0] + centers[-1]) / 2, height, f"{with_experts}, {len(dense)} dense", color=BLUE)
    else:
        middle = (experts[0] + experts[-1]) / 2
        _say(axes, max(middle, dense[0] + 1.4) if dense else middle, height, with_experts, color=BLUE)
        if dense:
            left = max(dense[0] - 0.08, sum(dense) / len(dense) - 0.25)
            _say(axes, left, height, f"{len(dense)} dense", "left", MUTED)


def _head(axes: "Axes", x: float, predicts: str) -> None:
    """From the stream up through final norm and head to the token it predicts."""
    style.arrow(axes, (x, STREAM), (x, STREAM + 0.36))
    style.box(axes, x - 0.25, STREAM + 0.36, 0.5, 0.24, GREY)
    _say(axes, x, STREAM + 0.48, "head", color=GROUND, weight="bold")
    _say(axes, x, STREAM + 0.74, predicts, weight="bold")


def _module(axes: "Axes", config: ModelConfig, m: int, x: float) -> None:
    """A prediction module between the hidden state at x and its own prediction at x + 1.2."""
    number, modules = m + 1, config.num_nextn_predict_layers
    if m == MODULES_DRAWN - 1 < modules - 1:  # this place is for the last of them
        number = modules
        _say(axes, x + 0.19, STREAM, "· · ·", weight="bold", bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 2})
    face = BLUE if config.is_moe(config.num_hidden_layers + number - 1) else GREY
    style.box(axes, x + 0.38, STREAM - SLAB / 2, 0.5, SLAB, face)
    _say(axes, x + 0.63, STREAM, "MTP" if modules == 1 else f"MTP\n{number}", color=GROUND, weight="bold")
    style.arrow(axes, (x + 0.63, STREAM - SLAB / 2 - 0.22), (x + 0.63, STREAM - SLAB / 2))
    _say(axes, x + 0.63, STREAM - SLAB / 2 - 0.32, f"embedding of t + {number}", size=7.5, color=MUTED)
    _head(axes, x + 1.2, f"t + {number + 1}")


def _attention(axes: "Axes", config: ModelConfig) -> None:
    H, N, R, U = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    _title(axes, 0.55, "Multi-head latent attention")
    top, low, tall = 2.38, 1.7, 0.42  # the rows of the queries and of what is looked up
    style.box(axes, 0.55, low, 0.42, top + tall - low, GROUND, GREY, linewidth=0.7)
    _say(axes, 0.76, (low + top + tall) / 2, f"x\n{config.hidden_size:,}")
    _block(axes, 2.52, top, 1.32, f"{H} queries", f"{H} × ({N} + {R})", GROUND)
    if config.q_lora_rank is None:
        style.arrow(axes, (0.97, top + tall / 2), (2.52, top + tall / 2))
    else:
        _block(axes, 1.22, top, 1.06, "query latent", f"{config.q_lora_rank:,}", GROUND)
        style.arrow(axes, (0.97, top + tall / 2), (1.22, top + tall / 2))
        style.arrow(axes, (2.28, top + tall / 2), (2.52, top + tall / 2))
    style.arrow(axes, (0.97, low + tall / 2), (1.22, low + tall / 2))
    _block(axes, 1.22, low, 0.5, "rotary", f"{R}", PALE_AMBER, AMBER)
    _block(axes, 1.74, low, 0.54, "latent", f"{config.kv_lora_rank:,}", LIGHT, AMBER)
    _say(axes, 1.75, low + tall + 0.1, "cached", color=DEEP_AMBER, weight="bold")
    style.arrow(axes, (2.28, low + tall / 2), (2.52, low + tall / 2))
    _block(axes, 2.52, low, 1.32, "keys and values", f"{H} × ({N} + {U})", CARD, linestyle=(0, (3, 2)))
    _say(axes, 3.18, low + tall + 0.1, "never stored", color=MUTED, style="italic")
    axes.plot([1.47, 1.47], [low, low - 0.14], color=MUTED, linewidth=0.9)
    style.arrow(axes, (1.47, low - 0.14), (4.08, low - 0.14))
    style.box(axes, 4.08, low - 0.26, 0.42, top + tall - low + 0.26, GROUND, GREY, linewidth=0.7)
    _say(axes, 4.29, (low + top + tall) / 2 - 0.13, "attention", rotation=90, va="center")
    for height in (top, low):
        style.arrow(axes, (3.84, height + tall / 2), (4.08, height + tall / 2))
    style.arrow(axes, (4.5, 2.12), (4.72, 2.12))
    _say(axes, 4.76, 2.12, f"{config.hidden_size:,}", "left", MUTED)


def _cache(axes: "Axes", config: ModelConfig) -> None:
    """Rows of the cache, those of MLA and of plain attention of the same shape, to one scale."""
    left, width = 0.55, 4.5
    sizes = cost.cache_bytes_per_token(config)
    kept, whole = config.cache_width, config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    saved = f"{style.short(sizes.mla, ' ')}B a token, not {style.short(sizes.mha, ' ')}B"
    _say(axes, left, 1.22, "One layer's cache, to scale", "left", weight="bold")
    _say(axes, left + width, 1.22, f"all {config.num_hidden_layers} in bf16: {saved}", "right", MUTED)
    for numbers, color in sorted([(kept, AMBER), (whole, FAINT)], reverse=True):
        right = left + width * numbers / max(kept, whole)
        for row in range(4):
            bottom = 0.66 + 0.11 * row
            axes.fill(
                [left, right, right, left], [bottom, bottom, bottom + 0.08, bottom + 0.08], color=color, linewidth=0
            )
    _say(axes, left, 0.5, f"{kept:,} numbers a token", "left", DEEP_AMBER, weight="bold")
    _say(axes, left + width, 0.5, f"{whole:,} with the keys and values of all heads", "right", MUTED)


def _experts(axes: "Axes", config: ModelConfig) -> None:
    E, K, G = config.n_routed_experts or 0, config.num_experts_per_tok, config.n_group
    left, middle = 5.52, 2.16
    _title(axes, left, "Mixture of experts")
    stacks = (p for p in parameters(config) if p.role == "expert" and f".layers.{_opened(config)}." in p.name)
    each = sum(p.size for p in stacks) // E
    _say(axes, RIGHT - 0.2, CARD_TOP - 0.25, f"{_count(each)} parameters each", "right", MUTED, size=7.5)
    _block(axes, left, middle - 0.21, 0.78, "router", config.scoring_func, GROUND)
    style.arrow(axes, (left + 0.78, middle), (left + 1.02, middle))
    chosen, open_groups = example(E, K, G, config.topk_group)
    for e, (x, y, size) in enumerate(cells(E, G, left + 1.1, middle - 0.66, RIGHT - left - 1.3, 1.32)):
        _square(axes, x, y, size, BLUE if e in chosen else PALE_BLUE if e // (E // G) in open_groups else FAINT)
    lines = [(BLUE, f"{K} of {E} experts {'works' if K == 1 else 'work'} for a token")]
    if config.topk_group < G:
        lines.append((PALE_BLUE, f"the choice is limited to {config.topk_group} of {G} groups"))
    if config.n_shared_experts:
        works = "works" if config.n_shared_experts == 1 else "work"
        lines.append((INK, f"{_number(config.n_shared_experts, 'shared expert')} {works} for every token"))
    if config.topk_method == "noaux_tc":
        lines.append(("none", "a bias steers the choice, not the weight"))
    for row, (color, words) in enumerate(lines):
        _square(axes, left, 1.17 - 0.225 * row, 0.1, color)
        _say(axes, left + 0.2, 1.22 - 0.225 * row, words, "left", MUTED if color == "none" else INK)


def _square(axes: "Axes", x: float, y: float, size: float, color: str) -> None:
    axes.fill([x, x + size, x + size, x], [y, y, y + size, y + size], color=color, linewidth=0)


def _dense(axes: "Axes", config: ModelConfig) -> None:
    _title(axes, 5.52, "Feed-forward network")
    _block(axes, 5.52, 2.02, 2.9, "gate and up, SiLU, down", f"{config.intermediate_size:,} wide", GROUND)


def _opened(config: ModelConfig) -> int:
    """The layer to look into: one with experts if there are any, about a third of the way."""
    layers = [n for n in range(config.num_hidden_layers) if config.is_moe(n)] or list(range(config.num_hidden_layers))
    return layers[len(layers) // 3]


def example(E: int, K: int, G: int, open_count: int) -> tuple[set[int], set[int]]:
    """What a token might choose: K experts, and the groups they may come from; always the same."""
    dice = Random(20)
    groups = set(dice.sample(range(G), open_count))
    return set(dice.sample([e for e in range(E) if e // (E // G) in groups], K)), groups


def cells(
    E: int, G: int, left: float, bottom: float, width: float, height: float
) -> Iterator[tuple[float, float, float]]:
    """Squares for E experts in G groups, as large as the space allows: left, bottom and side of each."""
    within, between = 1.22, 0.6  # from cell to cell, and the further gap from group to group, in sides

    def side(across: int, columns: int) -> float:
        down, rows = G // across, E // G // columns
        return min(
            width / (across * (columns * within + between) - between),
            height / (down * (rows * within + between) - between),
        )

    across, columns = max(product(_divisors(G), _divisors(E // G)), key=lambda shape: side(*shape))
    down, rows = G // across, E // G // columns
    size = min(side(across, columns), 0.3)
    top = bottom + height / 2 + size * (down * (rows * within + between) - between) / 2
    for e in range(E):
        group, member = divmod(e, E // G)
        x = (group % across) * (columns * within + between) + (member % columns) * within
        y = (group // across) * (rows * within + between) + (member // columns) * within
        yield left + x * size, top - (y + 1) * size, size


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _title(axes: "Axes", x: float, words: str) -> None:
    _say(axes, x, CARD_TOP - 0.25, words, "left", weight="bold", size=9.5)


def _block(
    axes: "Axes", x: float, y: float, width: float, name: str, size: str, face: str, edge: str = GREY, **more: Any
) -> None:
    style.box(axes, x, y, width, 0.42, face, edge, linewidth=0.7, **more)
    _say(axes, x + width / 2, y + 0.29, name)
    _say(axes, x + width / 2, y + 0.12, size, color=MUTED, size=7.5)


def _say(axes: "Axes", x: float, y: float, words: str, ha: str = "center", color: str = INK, **more: Any) -> None:
    axes.text(x, y, words, **{"ha": ha, "va": "center_baseline", "color": color, "size": 8, **more})


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _count(number: int) -> str:
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"
