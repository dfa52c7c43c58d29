"""Training beside transformers: the same model, weights and batches, a whole step each, the two in turn.

python -m bench.training writes docs/results/training.md. Every measurement is a process of its own, with nothing in
memory but what it measures. First the ways in which transformers can train (numbers, attention, experts) are tried, at
the longer rows only its attentions, then its fastest takes turns with ours.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from bench.peak import peak_bytes
from bench.provenance import ROOT, commit, leave_with, machine, some
from cavelight.data.batches import IGNORE, Batch
from cavelight.disk import file_beside
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import flops_per_token, total_parameters
from cavelight.spec.presets import preset
from cavelight.spec.sections import TrainSection
from cavelight.train.metrics import matmul_peak
from cavelight.train.optim import Optimizer, initialise, pick_dtype
from cavelight.train.step import train_step
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

SIZES = ((4, 512), (1, 4096))
ASKED = {(4, 512): 4.0, (1, 4096): 7.0}  # times transformers
RATE = 2e-4
DO = "import sys; from bench.training import work; work(sys.argv[1])"


@dataclass(frozen=True)
class Way:
    """Who trains, and how. Our own way of float32 has one attention and one form of experts, and moments to choose."""

    program: str
    numbers: str  # float32, bfloat16, or autocast: bfloat16 products over float32 weights
    attention: str = ""
    experts: str = ""
    moments: Literal["float32", "bfloat16"] = "float32"

    @property
    def name(self) -> str:
        moments = f"{self.moments} moments" if self.moments != "float32" else ""
        return ", ".join(filter(None, (self.program, self.numbers, self.attention, self.experts, moments)))


THEIRS = (
    *(Way("transformers", "float32", attention, experts) for attention in ("sdpa", "eager")
      for experts in ("grouped_mm", "batched_mm", "eager")),
    Way("transformers", "autocast", "sdpa", "grouped_mm"),
    Way("transformers", "bfloat16", "sdpa", "grouped_mm"),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One process: seconds of each step after the first, the first step's loss, peak of resident memory, matmul peaks.

    `seconds` is empty where the process failed, and `failed` says of what.
    """

    seconds: tuple[float, ...]
    loss: float = 0.0
    memory: int = 0
    peaks: tuple[float, float] = (0.0, 0.0)  # float32, bfloat16; operations a second
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("inf")


def reference() -> ModelConfig:
    """85M parameters. No MTP: transformers does not train it."""
    return preset("small").replace(
        q_lora_rank=192,
        n_routed_experts=32,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tokens per second and memory of training, beside transformers.")
    parser.add_argument("--rounds", type=some, default=3, help="turns of each of the two (3)")
    parser.add_argument("--steps", type=some, default=3, help="steps that count in each turn (3)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    numbers = str(pick_dtype("auto")).removeprefix("torch.")
    ours = (Way("cavelight", numbers), Way("cavelight", numbers, moments="bfloat16"))
    tried: dict[tuple[int, int], dict[Way, Measured]] = {}
    turns: dict[tuple[int, int], list[tuple[Measured, ...]]] = {}
    with TemporaryDirectory() as scratch:
        model = Transformer(reference())
        initialise(model, std=0.02, seed=0)
        write_checkpoint(model, scratch)
        del model
        for size in SIZES:
            before = fastest(tried[SIZES[0]]) if tried else None
            like = (before.numbers, before.experts) if before else None
            ways = [way for way in THEIRS if like in (None, (way.numbers, way.experts))]
            tried[size] = {way: measure(way, size, 1, scratch) for way in ways}
            best = fastest(tried[size])
            turns[size] = [
                tuple(measure(way, size, options.steps, scratch) for way in (*ours, best))
                for _ in range(options.rounds)
            ]
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "training.md"
    with file_beside(page) as beside:
        beside.write_text(report(ours, tried, turns, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0


def fastest(tried: dict[Way, Measured]) -> Way:
    return min(tried, key=lambda way: tried[way].median)


def measure(way: Way, size: tuple[int, int], steps: int, checkpoint: str) -> Measured:
    """One untimed step, then `steps` timed ones, in a process of their own."""
    told = json.dumps({"way": asdict(way), "rows": size[0], "length": size[1], "steps": steps, "folder": checkpoint})
    done = subprocess.run([sys.executable, "-c", DO, told], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        if way.program != "transformers":
            raise RuntimeError(done.stderr)
        failed = first_line_of_error(done.stderr) or f"exit code {done.returncode}"
        print(f"{size[0]} x {size[1]:5} {way.name}: failed: {failed}", flush=True)
        return Measured((), failed=failed)
    made = Measured(**json.loads(done.stdout.splitlines()[-1]))
    rate = size[0] * size[1] / made.median
    print(f"{size[0]} x {size[1]:5} {way.name}: {rate:,.0f} tokens/s, {made.memory / 1e9:.2f} GB", flush=True)
    return made


def first_line_of_error(stderr: str) -> str:
    """The last error that a traceback tells of, without the lines after its first; empty if there is none."""
    errors = [line for line in stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return errors[-1] if errors else ""


def work(told: str) -> None:
    """What a measured process does: prints a `Measured` as JSON."""
    asked = json.loads(told)
    way, rows, length = Way(**asked["way"]), asked["rows"], asked["length"]
    make = _ours if way.program == "cavelight" else _theirs
    batches = [batch(rows, length, number) for number in range(asked["steps"] + 1)]
    step = make(way, asked["folder"])
    loss, seconds = step(batches[0]), []
    for made in batches[1:]:
        began = time.perf_counter()
        step(made)
        seconds.append(time.perf_counter() - began)
    memory = peak_bytes()  # before kernels of numbers that this way may not use are prepared
    peaks = (matmul_peak(torch.float32), matmul_peak(torch.bfloat16))
    print(json.dumps(asdict(Measured(tuple(seconds), loss, memory, peaks))))


def batch(rows: int, length: int, seed: int) -> Batch:
    """Random tokens: routing of a new model is no less even with them than with text."""
    tokens_T = torch.randint(0, reference().vocab_size, (rows * length,), generator=torch.Generator().manual_seed(seed))
    targets_TJ = tokens_T.roll(-1)[:, None].clone()
    targets_TJ[length - 1 :: length] = IGNORE
    lengths = (length,) * rows
    return Batch(tokens_T, targets_TJ, torch.arange(length).repeat(rows), lengths, lengths)


def _ours(way: Way, folder: str) -> Callable[[Batch], float]:
    """The whole recipe: clipping, balance loss and routing biases are transformers' neither."""
    recipe = TrainSection(steps=100, learning_rate=RATE, warmup_steps=0, moments=way.moments)
    model = read_checkpoint(folder, getattr(torch, way.numbers), mapped=False)
    optimizer = Optimizer(model, recipe)
    return lambda batch: train_step(model, optimizer, [batch], recipe, 0, 0.0).loss


def _theirs(way: Way, folder: str) -> Callable[[Batch], float]:
    from transformers import DeepseekV3ForCausalLM

    dtype = torch.bfloat16 if way.numbers == "bfloat16" else torch.float32
    model: Any = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=way.attention, experts_implementation=way.experts
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return partial(_their_step, model, optimizer, way.numbers == "autocast")


def _their_step(model: Any, optimizer: torch.optim.Optimizer, autocast: bool, batch: Batch) -> float:
    ids_BT: Tensor = batch.tokens_T.view(len(batch.rows), -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def report(
    ours: Sequence[Way],
    tried: dict[tuple[int, int], dict[Way, Measured]],
    turns: dict[tuple[int, int], list[tuple[Measured, ...]]],
    called: Sequence[str],
) -> str:
    config = reference()
    table = ["| rows x tokens | | tokens/s | share of the matmul peak | peak memory, GB | first loss |",
             "|---|---|--:|--:|--:|--:|"]  # fmt: skip
    said, tries = [], ["| | " + " | ".join(f"{rows} x {length}" for rows, length in SIZES) + " |", "|---|--:|--:|"]
    for (rows, length), pairs in turns.items():
        tokens, best = rows * length, fastest(tried[rows, length])
        peak = max(max(made.peaks) for pair in pairs for made in pair)
        flops = flops_per_token(config, 0, queries=length, form="expanded", training=True)
        for way, each in zip((*ours, best), zip(*pairs, strict=True), strict=True):
            rate = tokens / statistics.median(made.median for made in each)
            table.append(
                f"| {rows} x {length} | {way.name} | {rate:,.0f} | {rate * flops / peak:.1%} "
                f"| {max(made.memory for made in each) / 1e9:.2f} | {each[0].loss:.4f} |"
            )
        theirs = [pair[-1] for pair in pairs]
        their_rate = tokens / statistics.median(made.median for made in theirs)
        for number, way in enumerate(ours):
            made = [pair[number] for pair in pairs]
            ratio = statistics.median(b.median / a.median for a, b in zip(made, theirs, strict=True))
            memory = max(a.memory for a in made) / max(b.memory for b in theirs)
            verdict = "reached" if ratio >= ASKED[rows, length] else "not reached"
            said.append(
                f"- {rows} x {length}, {way.name}: **{ratio:.2f} times** transformers' tokens per second, "
                f"**{memory:.2f}** of its memory. Asked for were {ASKED[rows, length]:g} times: {verdict}."
            )
        said.append(
            f"- {rows} x {length}: at this machine's matmul peak of {peak / 1e12:.3f} Tflop/s, with nothing but matrix "
            f"products, the most would be {peak / flops / their_rate:.2f} times."
        )
    for way in THEIRS:
        cells = (_rate(size, tried[size].get(way)) for size in SIZES)
        tries.append(f"| {way.name} | {' | '.join(cells)} |")
    return f"""# A training step beside transformers

{total_parameters(config) / 1e6:.1f}M parameters ({config.hidden_size} wide, {config.num_hidden_layers} layers,
{config.n_routed_experts} experts of {config.moe_intermediate_size}, {config.num_experts_per_tok} a token), no MTP.
Both begin with the same weights, read the same random tokens, clip gradients and update by AdamW (fused); ours also
has the balance loss and moves the routing biases. Moments of bfloat16 are the V3 report's (section 3.3.3), and no
default. Steps after the first, medians over the turns; ratios are medians
over pairs of turns, {len(turns[SIZES[0]])} of them. FLOPs are those of `spec/cost.py`; the peak is the fastest square
product of any kind of numbers that was seen in the same minutes. Memory is the process's high-water mark, program and
libraries included.

{chr(10).join(table)}

{chr(10).join(said)}

What transformers was given to choose from, tokens/s of one step each (the fastest took part above):

{chr(10).join(tries)}

Command: `{shlex.join(["python", "-m", "bench.training", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


def _rate(size: tuple[int, int], made: Measured | None) -> str:
    if made is None:
        return "not tried"
    return f"{size[0] * size[1] / made.median:,.0f}" if made.seconds else f"failed: {made.failed.replace('|', ' ')}"


if __name__ == "__main__":
    leave_with(main)
