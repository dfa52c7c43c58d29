"""What a training step costs against the model's size: time a token as experts or rows grow, beside the FLOP count.

python -m bench.scaling writes docs/results/scaling.md and scaling.png. Every step has the same number of tokens, in one
micro-batch; the sizes take turns, and figures are medians over the turns.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.provenance import commit, leave_with, machine, some
from bench.training import RATE, batch, reference
from cavelight.disk import file_beside
from cavelight.model.transformer import Transformer
from cavelight.see import style
from cavelight.see.style import AMBER, BLUE
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import flops_per_token, total_parameters
from cavelight.spec.sections import TrainSection
from cavelight.train.optim import Optimizer, initialise, pick_dtype
from cavelight.train.step import train_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS = 8192
EXPERTS = (16, 32, 64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192)
BOUND = 0.25


@dataclass
class Point:
    """A model and its rows: seconds a token of each turn."""

    config: ModelConfig
    length: int
    seconds: list[float]

    @classmethod
    def of(cls, experts: int, length: int) -> "Point":
        """Half the layers of bench.training's model, so that 256 experts and their moments have room."""
        return cls(reference().replace(num_hidden_layers=4, n_routed_experts=experts), length, [])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def flops(self) -> float:
        """Operations a token."""
        return flops_per_token(self.config, 0, queries=self.length, form="expanded", training=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time a token against the number of experts and the rows' length.")
    parser.add_argument("--turns", type=some, default=3, help="of each size (3)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where page and figure go")
    options = parser.parse_args(arguments)
    by_experts = [Point.of(experts, LENGTHS[0]) for experts in EXPERTS]
    by_length = [Point.of(EXPERTS[1], length) for length in LENGTHS]
    for _ in range(options.turns):
        for point in (*by_experts, *by_length):
            point.seconds.append(step_seconds(point) / TOKENS)
            told = f"{point.config.n_routed_experts} experts, rows of {point.length}"
            print(f"{told}: {1 / point.seconds[-1]:,.0f} tokens/s", flush=True)
    draw(by_experts, by_length, options.out / "scaling.png")
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "scaling.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(by_experts, by_length, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0 if within(by_experts, by_length) else 1


def step_seconds(point: Point) -> float:
    """Of a second step, optimizer included. The first makes its state."""
    recipe = TrainSection(steps=100, learning_rate=RATE, warmup_steps=0)
    model = Transformer(point.config, pick_dtype("auto"))
    initialise(model, std=0.02, seed=0)
    optimizer = Optimizer(model, recipe)
    for number in range(2):
        made = batch(TOKENS // point.length, point.length, number)
        began = time.perf_counter()
        train_step(model, optimizer, [made], recipe, number, 0.0)
    return time.perf_counter() - began


def growth(points: Sequence[Point]) -> list[float]:
    """Time a token over that of the first."""
    return [point.median / points[0].median for point in points]


def counted(points: Sequence[Point]) -> list[float]:
    """The same of FLOPs."""
    return [point.flops / points[0].flops for point in points]


def within(by_experts: Sequence[Point], by_length: Sequence[Point]) -> bool:
    return growth(by_experts)[-1] < 1 + BOUND and off(by_length) <= BOUND


def off(points: Sequence[Point]) -> float:
    """The largest departure of time's growth from that of FLOPs."""
    return max(abs(time / flops - 1) for time, flops in zip(growth(points), counted(points), strict=True))


def draw(by_experts: Sequence[Point], by_length: Sequence[Point], path: Path) -> None:
    with style.sheet(path, 9.0, 3.9) as figure:
        style.heading(figure, "The cost of a training step", ["4 layers, 512 wide", f"{TOKENS:,} tokens a step"])
        left, right = (style.panel(figure, x, 1.15, 3.1, 2.1) for x in (0.75, 5.25))
        _curve(left, EXPERTS, by_experts, "Experts at constant active size")
        _curve(right, LENGTHS, by_length, "Tokens in a row")


def _curve(axes: "Axes", sizes: Sequence[int], points: Sequence[Point], title: str) -> None:
    axes.plot(sizes, growth(points), "o-", color=AMBER, label="time a token")
    axes.plot(sizes, counted(points), "--", color=BLUE, label="FLOPs a token (spec/cost.py)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(0, 1.15 * max(*growth(points), *counted(points)))
    style.entitle(axes, title, "times the first")
    axes.legend(frameon=False, loc="lower right")


def report(by_experts: Sequence[Point], by_length: Sequence[Point], called: Sequence[str]) -> str:
    grown, departure = growth(by_experts)[-1] - 1, off(by_length)
    verdicts = ["reached" if found else "NOT reached" for found in (grown < BOUND, departure <= BOUND)]
    return f"""# What a training step costs against the model's size

Models of 4 layers, else as in [the comparison with transformers](training.md), {TOKENS:,} tokens a step, optimizer
included. Times are medians over {len(by_experts[0].seconds)} turns, each beside the first line's.

![Time a token against experts and length, beside the count of operations](scaling.png)

## Experts, at equal active size, rows of {LENGTHS[0]}

{_table(by_experts, [f"{size}" for size in EXPERTS], "experts")}

From {EXPERTS[0]} to {EXPERTS[-1]} experts a token's time grows by {grown:.0%}; asked for was less than {BOUND:.0%}:
{verdicts[0]}.

## Length, {by_length[0].config.n_routed_experts} experts

{_table(by_length, [f"{size:,}" for size in LENGTHS], "tokens in a row")}

Time departs from the count by {departure:.0%} at most; allowed were {BOUND:.0%}: {verdicts[1]}.

Command: `{shlex.join(["python", "-m", "bench.scaling", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(pick_dtype("auto"))}
"""


def _table(points: Sequence[Point], names: Sequence[str], head: str) -> str:
    lines = [f"| {head} | parameters | tokens/s | time a token | FLOPs a token |", "|--:|--:|--:|--:|--:|"]
    for point, name, grown, flops in zip(points, names, growth(points), counted(points), strict=True):
        size = total_parameters(point.config) / 1e6
        lines.append(f"| {name} | {size:.0f}M | {1 / point.median:,.0f} | {grown:.2f} | {flops:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    leave_with(main)
