"""The planner's memory against measured runs: the peak of resident memory of `train` and of `generate`, small models.

python -m bench.memory writes docs/results/memory.md. Each run is a process of its own (bench.peak). A run with next to
no model measures what the program itself takes on this machine; predictions add that figure and nothing else measured
here. --only NAME runs a part of the cases and prints the table.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from bench.provenance import ROOT, commit, leave_with, processor
from cavelight.disk import file_beside
from cavelight.plan.here import HOLES, decoding_here, training_here
from cavelight.plan.memory import Memory
from cavelight.plan.passes import Dtype
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import total_parameters
from cavelight.spec.presets import preset

RUNS = 2  # of each training, whose highest counts: the heap's holes differ from run to run
BOUND = 0.10
DOCUMENTS, DOCUMENT_CHARACTERS = 40, 6000
MAKE_CHECKPOINT = """
import json, sys, torch
from cavelight.data.tokenizer import Tokenizer
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.train.optim import initialise
from cavelight.weights.snapshot import write_checkpoint
folder, tokenizer, dtype, config = sys.argv[1:]
model = Transformer(ModelConfig.from_hf(json.loads(config)), getattr(torch, dtype))
initialise(model, 0.02, seed=0)
write_checkpoint(model, folder, Tokenizer.load(tokenizer))
"""


@dataclass(frozen=True)
class Decoded:
    """What a run reports: tokens of the prompt, new ones, near-ties computed anew; and its peak in bytes."""

    prompt: int
    new: int
    settled: int
    peak: int


@dataclass(frozen=True)
class Case:
    """A run to measure: a preset with changes, in some number format."""

    name: str
    preset: str = "small"
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float32"

    @property
    def config(self) -> ModelConfig:
        return preset(self.preset).replace(eos_token_id=None, **self.changes)


@dataclass(frozen=True)
class Training(Case):
    """`rows` of `row` tokens a step, `micro` of them at once on each of `threads`."""

    row: int = 256
    rows: int = 4
    micro: int = 4
    threads: int = 2
    moments: Dtype = "float32"

    @property
    def settings(self) -> str:
        return f"{self.rows} rows of {self.row}, {self.micro} at once, {self.threads} thread{'s' * (self.threads > 1)}"

    def predicted(self, runtime: int) -> Memory:
        return training_here(
            self.config,
            row=self.row,
            rows=self.rows,
            micro_rows=self.micro,
            threads=self.threads,
            dtype=self.dtype,
            moments=self.moments,
            runtime=runtime,
        )


@dataclass(frozen=True)
class Decoding(Case):
    """A prompt of about `characters` characters and `new` tokens after it; `load` as --dtype."""

    characters: int = 40
    new: int = 8
    load: Dtype | None = None
    without_mtp: bool = False

    def predicted(self, runtime: int, run: Decoded) -> Memory:
        config = self.config.replace(num_nextn_predict_layers=0) if self.without_mtp else self.config
        return decoding_here(
            config,
            prompt=run.prompt,
            new=run.new,
            dtype=self.load or self.dtype,
            stored=self.dtype,
            settles=run.settled > 0,
            runtime=runtime,
        )


LONG = {"max_position_embeddings": 32_768}
FEW = {"num_hidden_layers": 4}
TRAINING = (
    Training("logits", "demo", {"vocab_size": 16_384}, rows=8, micro=8),
    Training("small models side by side", "demo", rows=16, micro=8),
    Training("one micro-batch"),
    Training("four micro-batches, two at once", micro=1),
    Training("four, one after another", micro=1, threads=1),
    Training("long rows, no MTP", changes={"num_nextn_predict_layers": 0}, row=512),
    Training(
        "one long row", changes={"num_hidden_layers": 3, "num_nextn_predict_layers": 0}, row=1024, rows=1, micro=1
    ),
    Training(
        "many parameters, few tokens", changes={"num_hidden_layers": 12, "vocab_size": 16_384}, row=64, rows=2, micro=2
    ),
    Training("bfloat16 moments", changes={"num_hidden_layers": 12}, row=64, rows=2, micro=2, moments="bfloat16"),
    Training("many small experts", changes={**FEW, "hidden_size": 256, "n_routed_experts": 64}, rows=2, micro=2),
    Training("bfloat16", changes=FEW, dtype="bfloat16", row=128),
    Training("bfloat16, two at once", changes=FEW, dtype="bfloat16", row=128, micro=2),
)
DECODING = (
    Decoding("float32", changes=LONG, characters=4000),
    Decoding("bfloat16", changes=LONG, characters=4000, dtype="bfloat16"),
    Decoding("bfloat16 read as float32", changes=LONG, characters=400, dtype="bfloat16", load="float32"),
    Decoding("large vocabulary, loading", changes={"vocab_size": 65_536}, characters=100),
    Decoding("without its MTP module", changes=LONG, characters=4000, new=64, without_mtp=True),
    Decoding("many heads, long prompt", "demo", {**LONG, "num_attention_heads": 16}, characters=16_000),
    Decoding(
        "a cache that grows", "demo", {**LONG, "num_hidden_layers": 12, "kv_lora_rank": 512}, characters=6000, new=300
    ),
)


@dataclass(frozen=True)
class Row:
    case: Case
    settings: str
    memory: Memory
    measured: int

    @property
    def error(self) -> float:
        return self.memory.total / self.measured - 1


class Bench:
    """Runs commands in `scratch`, with a small corpus and a tokenizer of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.corpus, self.tokenizer = scratch / "corpus", scratch / "tokenizer"
        self.corpus.mkdir()
        self.text = ""
        for number, source in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:DOCUMENTS]):
            text = source.read_text(encoding="utf-8")[:DOCUMENT_CHARACTERS]
            (self.corpus / f"{number:02}.txt").write_text(text, encoding="utf-8")
            self.text += text
        self.train(Training("trains the tokenizer on its way", "nano", row=16, rows=1, micro=1))
        (self.run_folder / "model").rename(self.tokenizer)
        self.runtimes: dict[tuple[type[Case], Dtype], int] = {}
        for dtype in get_args(Dtype):
            training = Training("next to no model", "nano", dtype=dtype, row=16, rows=1, micro=1)
            self.runtimes[Training, dtype] = self.train(training)
            decoding = Decoding("next to no model", "nano", LONG, dtype, characters=1500)
            self.runtimes[Decoding, dtype] = self.decode(decoding).peak

    @property
    def run_folder(self) -> Path:
        return self.scratch / "run"

    def train(self, case: Training) -> int:
        """Peak bytes of a few steps."""
        recipe = self.scratch / "recipe.toml"
        recipe.write_text(f'[model]\npreset = "{case.preset}"\n', encoding="utf-8")
        changes = {f"model.{key}": value for key, value in case.changes.items()} | {
            "data.corpus": self.corpus,
            "data.row_length": case.row,
            "train.rows_per_step": case.rows,
            "train.rows_per_microbatch": case.micro,
            "train.dtype": case.dtype,
            "train.moments": case.moments,
            "train.steps": 3,
            "train.save_every": 1,
        }
        if self.tokenizer.exists():
            changes["data.tokenizer"] = self.tokenizer
        told = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        self.command("rm", "-rf", self.run_folder)
        words = ["--slow-saves", "train", recipe, "--json", "--out", self.run_folder, *told]
        _, peak = self.measured(case.threads, *words)
        return peak

    def decode(self, case: Decoding) -> Decoded:
        """A run on a checkpoint made for it."""
        folder = self.scratch / "checkpoint"
        self.command("rm", "-rf", folder)
        config = json.dumps(case.config.to_hf())
        self.command(sys.executable, "-c", MAKE_CHECKPOINT, folder, self.tokenizer, case.dtype, config)
        more = ["--dtype", case.load] if case.load else []
        more += ["--without-mtp"] if case.without_mtp else []
        told = ["generate", folder, "--json", "--max-new-tokens", case.new, *more, "-p", self.text[: case.characters]]
        output, peak = self.measured(2, *told)
        stats = json.loads(output.splitlines()[-1])["stats"]
        return Decoded(stats["prompt_tokens"], stats["new_tokens"], stats["settled"], peak)

    def measured(self, threads: int, *arguments: object) -> tuple[str, int]:
        """Output and peak bytes of a command of ours."""
        done = self.command(sys.executable, "-m", "bench.peak", *arguments, threads=threads)
        return done.stdout, int(done.stderr.splitlines()[-1])

    def command(self, *arguments: object, threads: int = 2) -> subprocess.CompletedProcess[str]:
        own = {"OMP_NUM_THREADS": str(threads), "CAVELIGHT_CACHE": str(self.scratch / "cache")}
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = os.environ | own | {"PYTHONPATH": path}
        words = [str(argument) for argument in arguments]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicted and measured peaks of memory.")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name holds this; writes no page")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        rows = list(measure(bench, options.only or ""))
    if options.only is None:
        page = options.out / "memory.md"
        called = list(sys.argv[1:] if arguments is None else arguments)
        with file_beside(page) as beside:
            beside.write_text(report(rows, bench, called), encoding="utf-8")
        print(f"wrote {page}")
    return int(any(abs(row.error) > BOUND for row in rows))


def measure(bench: Bench, only: str) -> Iterator[Row]:
    for case in (*TRAINING, *DECODING):
        if only not in case.name:
            continue
        if isinstance(case, Training):
            predicted = case.predicted(bench.runtimes[Training, case.dtype])
            row = Row(case, case.settings, predicted, max(bench.train(case) for _ in range(RUNS)))
        else:
            run = bench.decode(case)
            predicted = case.predicted(bench.runtimes[Decoding, case.load or case.dtype], run)
            row = Row(case, f"prompt of {run.prompt:,}, {run.new} new", predicted, run.peak)
        print(line(row), flush=True)
        yield row


def line(row: Row) -> str:
    model = f"{total_parameters(row.case.config, mtp=True) / 1e6:.0f}M, {row.case.dtype}"
    predicted, measured = row.memory.total / 1e6, row.measured / 1e6
    return f"| {row.case.name} | {model} | {row.settings} | {predicted:,.0f} | {measured:,.0f} | {row.error:+.1%} |"


def report(rows: Sequence[Row], bench: Bench, called: Sequence[str]) -> str:
    head = "| case | model | settings | predicted, MB | measured, MB | error |\n|---|---|---|--:|--:|--:|\n"
    tables = [
        head + "\n".join(line(row) for row in rows if isinstance(row.case, kind)) for kind in (Training, Decoding)
    ]
    alone = ", ".join(
        f"{kind.__name__.lower()} in {dtype} {size / 1e6:.0f} MB" for (kind, dtype), size in bench.runtimes.items()
    )
    worst = max(abs(row.error) for row in rows)
    lines = [
        "# Memory, predicted and measured",
        "The peak of resident memory of `cavelight train` (three steps, each saved while the next is taken, the "
        "evaluation at the end; the higher of two runs) and of `cavelight generate`, each run in a process of its own, "
        "against `plan/here.py`. What is counted and how stands in [the planner's page](../plan.md).",
        f"Of all {len(rows)} runs the worst is off by {worst:.1%}, {'within' if worst <= BOUND else 'NOT within'} the "
        f"{BOUND:.0%} asked for.",
        "Taken from this machine: what the programs take with next to no model, that is Python, torch's libraries as "
        f"far as they are touched, threads, the corpus: {alone}. Fitted once, to training runs like these: what the C "
        f"library's heap loses to holes, {HOLES:g} of the gradients' size for each micro-batch under way. All else is "
        "counted.",
        "## Training",
        tables[0],
        "## Decoding",
        tables[1],
        f"Command: `{shlex.join(['python', '-m', 'bench.memory', *called])}`  \nCommit: {commit()}  \n"
        f"Machine: {processor()}, {os.cpu_count()} cores, {' '.join(platform.libc_ver())}",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    leave_with(main)
