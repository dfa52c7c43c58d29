"""What packing costs a trained model: held-out bits per byte of each format beside bfloat16, all read the same way; and
what keeping its past in int8 costs.

python -m bench.packing runs/demo writes docs/results/packing.md. The model is converted by `cavelight convert`'s own
code; each result is evaluated in float32, so that the formats alone differ.
"""

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.provenance import commit, leave_with, machine
from cavelight.api import load
from cavelight.cli.progress import screen
from cavelight.disk import checkpoint_folder, file_beside
from cavelight.run.rows import CACHE_DTYPES, CacheDtype
from cavelight.spec.formats import named
from cavelight.train.evaluate import held_out_bits_per_byte, loss_by_position
from cavelight.train.prepare import held_out, read_corpora
from cavelight.train.state import RunFolder
from cavelight.train.workers import Workers
from cavelight.weights.convert import convert

FORMATS = {"hf": None, "fp8": None, "int8": 0.005, "int4": 0.03}  # what each may lose, where a bound was set


@dataclass(frozen=True)
class Outcome:
    """What evaluating one format gave, and the bytes of its files."""

    bits_per_byte: float
    nbytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Held-out bits per byte of a run's model in each format.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="a run's folder (runs/demo)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = measure(options.run, Path(folder))
        past = {cache: over_cache(options.run, cache) for cache in CACHE_DTYPES.values()}
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "packing.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(outcomes, past, called), encoding="utf-8")
    print(f"wrote {page}")
    plain = outcomes["hf"].bits_per_byte
    kept = (bound is None or outcomes[name].bits_per_byte <= plain * (1 + bound) for name, bound in FORMATS.items())
    return 0 if all(kept) else 1


def measure(run: Path, scratch: Path) -> dict[str, Outcome]:
    recipe, outcomes = RunFolder(run).read_recipe(), {}
    corpora = read_corpora(recipe.data)
    for name in FORMATS:
        with screen(f"{run} as {name}", as_json=False) as listen:
            convert(checkpoint_folder(run), scratch / name, named(name), dtype=torch.bfloat16, on_event=listen)
            model, tokenizer = load(scratch / name, torch.float32)
            store, _ = held_out(corpora, tokenizer, listen)
            workers = Workers(torch.get_num_threads())
            bits = held_out_bits_per_byte(model, store, recipe.data.row_length, None, listen, workers)
        nbytes = sum(file.stat().st_size for file in (scratch / name).glob("*.safetensors"))
        outcomes[name] = Outcome(bits, nbytes)
    return outcomes


def over_cache(run: Path, cache: CacheDtype) -> float:
    """Bits per byte of rows of held-out text as long as the model's context, read over a latent cache."""
    corpora = read_corpora(RunFolder(run).read_recipe().data)
    with screen(f"{run} over a cache in {cache}", as_json=False) as listen:
        model, tokenizer = load(run, torch.float32)
        store, _ = held_out(corpora, tokenizer, listen)
        length = min(model.config.max_position_embeddings, len(store) - 1)
        buckets = loss_by_position(model, tokenizer, store, length, on_event=listen, cache=cache)
    nats, size = sum(bucket.nats for bucket in buckets), sum(bucket.bytes for bucket in buckets)
    return nats / size / math.log(2)


def report(outcomes: dict[str, Outcome], past: dict[CacheDtype, float], called: Sequence[str]) -> str:
    plain = outcomes["hf"].bits_per_byte
    rows = []
    for name, outcome in outcomes.items():
        allowed = f"{bound:.1%}" if (bound := FORMATS[name]) else "-"
        more, title = outcome.bits_per_byte / plain - 1, "bf16" if name == "hf" else name
        rows.append(f"| {title} | {outcome.bits_per_byte:.6f} | {more:+.4%} | {allowed} | {outcome.nbytes / 1e6:.2f} |")
    return f"""# What packing costs

A run's model in each format that `cavelight convert --to` writes, on all of its held-out text. Everything that a format
leaves plain is bfloat16; all are evaluated in float32, int8 and int4 from their packed weights.

| format | held-out bits per byte | more than bf16 | allowed | MB of weights |
|---|--:|--:|--:|--:|
{chr(10).join(rows)}

The past in int8 (`--cache int8`, [how](../design.md)) and as the weights are, on sixteen rows of held-out text as long
as the model's context, in float32: {past["int8"]:.6f} and {past["auto"]:.6f} bits per byte,
{past["int8"] / past["auto"] - 1:+.4%}.

Command: `{shlex.join(["python", "-m", "bench.packing", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
