"""Which form of attention is faster, beside the one that `kernels.attend.absorbed_is_cheaper` takes by counting.

python -m bench.forms writes docs/results/forms.md: both forms of one layer of `mid` in float32, for some tokens over
pasts of some lengths, in turns.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.provenance import commit, leave_with, machine
from cavelight.cli.progress import screen
from cavelight.disk import file_beside
from cavelight.kernels import attend
from cavelight.run.quick import FEW
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Phase
from cavelight.spec.presets import preset

ROWS = (256, 1024, 4096, 16_384)
TOKENS = (1, 8, FEW + 1, 64, 128, 192, 256, 512)
TURNS = 3
ALLOWED = 1.25  # times as long as the faster form


@dataclass(frozen=True)
class Measured:
    """Seconds of both forms, and which is taken."""

    tokens: int
    rows: int
    absorbed: float
    expanded: float
    takes_absorbed: bool

    @property
    def loss(self) -> float:
        """How many times as long as the faster one the one that is taken takes."""
        return (self.absorbed if self.takes_absorbed else self.expanded) / min(self.absorbed, self.expanded)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Both forms of attention, beside the one that is taken.")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    with screen("Measuring both forms of attention", as_json=False) as listen:
        found = measured(preset("mid"), listen)
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "forms.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(found, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0 if max(each.loss for each in found) <= ALLOWED else 1


@torch.inference_mode()
def measured(config: ModelConfig, listen: Callable[[Event], None]) -> list[Measured]:
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    U, C = config.v_head_dim, config.kv_lora_rank
    k_up_HNC, v_up_HUC = torch.randn(H, N, C) / C**0.5, torch.randn(H, U, C) / C**0.5
    wanted = [(T, S) for S in ROWS for T in TOKENS if T <= S]
    found = []
    for number, (T, S) in enumerate(wanted):
        listen(Phase("measuring", number, len(wanted), "cases"))
        given = (torch.randn(1, T, H, N), torch.randn(1, T, H, R), torch.randn(1, S, C + R), k_up_HNC, v_up_HUC)
        absorbed, expanded = in_turns([attend.absorbed, attend.expanded], *given, config.qk_head_dim**-0.5)
        takes_absorbed = attend.absorbed_is_cheaper(T, S, H, N, R, U, C)
        found.append(Measured(T, S, absorbed, expanded, takes_absorbed))
    return found


def in_turns(forms: Sequence[Callable[..., Tensor]], *given: Tensor | float) -> list[float]:
    """The least seconds of each, after warming up."""
    seconds: list[list[float]] = [[] for _ in forms]
    for _ in range(1 + TURNS):
        for form, taken in zip(forms, seconds, strict=True):
            began = time.perf_counter()
            form(*given)
            taken.append(time.perf_counter() - began)
    return [min(taken[1:]) for taken in seconds]


def report(found: Sequence[Measured], called: Sequence[str]) -> str:
    lines = []
    for each in found:
        taken = "absorbed" if each.takes_absorbed else "expanded"
        mark = "" if each.loss == 1 else f", {each.loss:.2f} times the other"
        lines.append(
            f"| {each.rows:,} | {each.tokens} | {1e3 * each.absorbed:.2f} | {1e3 * each.expanded:.2f} "
            f"| {each.absorbed / each.expanded:.2f} | {taken}{mark} |"
        )
    wrong = [each for each in found if each.loss > 1]
    worst = max(each.loss for each in found)
    return f"""# Which form of attention

One layer of `mid` (16 heads, a latent of 512), float32: tokens that look at a past of so many rows, themselves
included, in the expanded form (keys and values of all heads, the flash kernel) and the absorbed one (queries taken
down into the latent space). `kernels.attend.absorbed_is_cheaper` takes the one with fewer multiply-adds. It takes the
slower one in {len(wrong)} of {len(found)} cases, and then at most {worst:.2f} times as long as the other. Up to {FEW}
tokens go natively, always absorbed.

| rows | tokens | absorbed, ms | expanded, ms | ratio | taken |
|--:|--:|--:|--:|--:|---|
{chr(10).join(lines)}

Command: `{shlex.join(["python", "-m", "bench.forms", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
