"""One picture of a plan: what a model takes of each device's memory, and how fast it decodes by length of context."""

from collections.abc import Mapping, Sequence
from math import log2, log10
from pathlib import Path
from typing import TYPE_CHECKING

from cavelight.errors import UserError
from cavelight.plan import serving
from cavelight.plan.devices import Device
from cavelight.plan.layout import Layout
from cavelight.plan.serving import USABLE, Serving
from cavelight.plan.table import of_bytes
from cavelight.see import style
from cavelight.see.style import AMBER, BLUE, DEEP_AMBER, GREY, INK, MUTED
from cavelight.spec import cost
from cavelight.spec.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.235  # inches from one device to the next
PALE_BLUE = "#8fb4d6"
PARTS = (("experts", BLUE), ("other weights", PALE_BLUE), ("cache", AMBER), ("the rest", GREY))
LINES = 6  # devices in the lower panel


def draw_plan(
    config: ModelConfig,
    devices: Mapping[str, Device],
    path: Path,
    title: str,
    context: int,
    acceptance: float | None = None,
) -> None:
    """The fewest of each device that serve one sequence of `context` tokens: memory, speed, users by context.

    path: ends in .png, .svg or .pdf. Raises UserError where the model fits on none of the devices.
    """
    asked = (
        Serving(config, device, Layout(), context, device.native, acceptance=acceptance) for device in devices.values()
    )
    plans = [plan for plan in map(serving.smallest, asked) if plan is not None]
    if not plans:
        raise UserError(f"{title} fits on no device of the table", do="give larger ones with --devices FILE")
    tall = ROW * len(plans)
    with style.sheet(path, 9.0, 4.3 + tall) as figure:
        weights = {form: of_bytes(cost.weight_bytes(config, form)) for form in ("bf16", "fp8")}
        facts = [f"{style.short(cost.total_parameters(config))} parameters"]
        facts += [f"weights {weights['bf16']} in bf16, {weights['fp8']} in fp8", f"a context of {context:,} tokens"]
        style.heading(figure, f"{title} on devices", facts)
        names = [f"{plan.layout.devices} × {plan.device.name}" for plan in plans]
        _memory(style.panel(figure, 1.55, 1.25, 3.9, tall), plans, names)
        _bars(
            style.panel(figure, 5.75, 1.25, 1.25, tall),
            [plan.decode(1).per_sequence for plan in plans],
            "One user",
            "tokens/s",
        )
        busy = [plan.decode(plan.busy_sequences()).per_device for plan in plans]
        _bars(style.panel(figure, 7.45, 1.25, 1.1, tall), busy, "All users", "a device")
        _by_context(style.panel(figure, 0.75, 2.4 + tall, 6.7, 1.45), plans)


def _memory(axes: "Axes", plans: Sequence[Serving], names: Sequence[str]) -> None:
    """A bar for each device: what fills it, within an outline of all it has."""
    for row, plan in enumerate(plans):
        parts = dict(plan.memory(1))
        shown = {name: parts.pop(name, 0.0) for name, _ in PARTS[:-1]} | {"the rest": sum(parts.values())}
        left = 0.0
        axes.barh(row, plan.device.memory / 1e9, height=0.72, color="none", edgecolor=GREY, linewidth=0.6)
        for name, color in PARTS:
            axes.barh(row, shown[name] / 1e9, left=left, height=0.72, color=color, linewidth=0)
            left += shown[name] / 1e9
        usable = USABLE * plan.device.memory / 1e9
        axes.plot([usable, usable], [row - 0.36, row + 0.36], color=INK, linewidth=0.8)
    axes.set(ylim=(len(plans) - 0.4, -0.6), xlim=(0, None))
    axes.set_yticks(range(len(plans)), names)
    style.entitle(axes, "Memory of one device", "GB; the mark is what is planned with", grid="x")
    place = 0.0
    for name, color in PARTS:
        words = axes.annotate(
            name, (0, 0), xytext=(place, -24), xycoords="axes fraction", textcoords="offset points",
            color=style.DEEP.get(color, color), weight="bold", size=8,
        )  # fmt: skip
        place += 5.6 * len(words.get_text()) + 12


def _bars(axes: "Axes", values: Sequence[float], title: str, unit: str) -> None:
    """A bar for each device with its number beside it."""
    axes.barh(range(len(values)), values, height=0.72, color=BLUE, linewidth=0)
    for row, value in enumerate(values):
        axes.annotate(
            f"{value:,.0f}" if value >= 10 else f"{value:.1f}", (value, row), xytext=(3, 0),
            textcoords="offset points", va="center_baseline", color=MUTED, size=7.5,
        )  # fmt: skip
    axes.set(ylim=(len(values) - 0.4, -0.6), xlim=(0, 1.25 * max(values)), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    style.entitle(axes, title, unit, grid=None)


def _by_context(axes: "Axes", plans: Sequence[Serving]) -> None:
    """Tokens a second of a device with as many users as fit, by the length of their contexts."""
    longest = plans[0].config.max_position_embeddings
    shortest = max(1, longest // 128)
    chosen = sorted(_spread(plans), key=lambda plan: plan.decode(plan.busy_sequences()).per_device)
    ends = []
    for plan, color in zip(chosen, [*style.shades(LINES - 1), AMBER][-len(chosen) :], strict=True):
        most = min(plan.largest_context(), 8 * longest)
        lengths = [length for step in range(41) if (length := round(shortest * 2 ** (step / 4))) < most] + [most]
        speeds = [_speed(plan, length) for length in lengths]
        axes.plot([log2(length) for length in lengths], speeds, color=color)
        axes.plot([log2(most)], speeds[-1:], color=color, marker="o", markersize=3.5)
        ends.append((speeds[-1], f"{plan.layout.devices} × {plan.device.name}", color))
    axes.axvline(log2(longest), color=DEEP_AMBER, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        "the model's longest", (log2(longest), 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
        textcoords="offset points", va="top", ha="right", color=DEEP_AMBER, size=7.5,
    )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in range(64) if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(2.0**value))
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in range(-3, 9) if low <= tick <= high])
    axes.yaxis.set_major_formatter(lambda value, _: f"{10**value:,.0f}")
    unit = "tokens/s a device, by the length of contexts; lines end where not one fits"
    style.entitle(axes, "All users", unit)
    style.label_lines(axes, ends)


def _speed(plan: Serving, length: int) -> float:
    """Power of ten of a device's tokens a second, with as many users as keep it busiest."""
    there = plan.with_(context=length)
    return log10(there.decode(max(1, there.busy_sequences())).per_device)


def _spread(plans: Sequence[Serving]) -> list[Serving]:
    """A few plans from the smallest to the largest device."""
    ordered = sorted(plans, key=lambda plan: plan.device.memory)
    if len(ordered) <= LINES:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (LINES - 1))] for place in range(LINES)]


def _tokens(value: float) -> str:
    return f"{value / 1024:,.0f}k" if value >= 1024 else f"{value:,.0f}"
