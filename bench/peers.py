"""How fast `mid` runs beside other programs on the same weights in bfloat16: transformers, llama.cpp, vLLM.

python -m bench.peers writes docs/results/peers.md. The model has random weights. Every peer takes turns with ours, in a
sweep of its own; those whose programs are not named are left out.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.provenance import commit, leave_with, machine
from cavelight.bench import cases as bench_cases
from cavelight.bench.cases import Case
from cavelight.bench.peers.catalogue import Opener, named
from cavelight.bench.peers.subject import Subject
from cavelight.bench.sweep import Row, sweep
from cavelight.cli.bench import random_model
from cavelight.cli.progress import screen
from cavelight.disk import file_beside, forget
from cavelight.run.quick import without_native
from cavelight.spec.presets import preset
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

PROMPT, DEPTHS = 512, (0, 128, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="mid, beside other programs.")
    parser.add_argument("--without-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's own program")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the interpreter that has vLLM")
    parser.add_argument("--seconds", type=float, default=2.0, help="of every case, after warming up (2)")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="of decoding (0 128 4096)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    bench_cases.SECONDS = options.seconds
    programs = {"llama.cpp": options.llama_bench, "vllm": options.vllm}
    openers = {name: named(name, program) for name, program in programs.items() if program}
    if not options.without_transformers:
        openers["transformers"] = named("transformers")
    if not openers:
        parser.error("there is no peer: name one")
    called = list(sys.argv[1:] if arguments is None else arguments)
    with file_beside(options.out / "peers.md") as page:
        found = measured(openers, options.depths)
        page.write_text(report(found, called), encoding="utf-8")
    print(f"wrote {options.out / 'peers.md'}")
    return 0


def measured(openers: dict[str, Opener], depths: Sequence[int]) -> dict[str, list[Row]]:
    """The rows of each peer, by its name and version."""
    wanted, found = [Case("prompt", 0, PROMPT), *(Case("decoding", depth) for depth in depths)], {}
    with TemporaryDirectory() as scratch, screen("Measuring mid", as_json=False) as listen:
        folder = Path(scratch) / "mid"
        write_checkpoint(random_model(preset("mid"), torch.bfloat16), folder)
        for file in folder.glob("*.safetensors"):
            forget(file)  # what was just written lies in memory in small pages: no model that is run begins so
        model = read_checkpoint(folder)
        for name, opener in openers.items():
            room = Path(scratch) / name
            room.mkdir()
            with opener(Subject(model, folder, room)) as peer:
                found[f"{peer.name} {peer.version}"] = sweep(model, wanted, peer, listen)
    return found


def report(found: dict[str, list[Row]], called: Sequence[str]) -> str:
    tables = "\n\n".join(table(name, rows) for name, rows in found.items())
    return f"""\
# mid beside other programs

Tokens a second on the same random weights in bfloat16, on all cores; ours was measured between the peer's cases, and
anew beside each peer. {without_native() or "Layers of ours run natively."}

{tables}

What is counted: of a prompt the time until its next token is known; of decoding the time of a step. llama.cpp is
measured by its `llama-bench` on a GGUF file of these weights (logits of such files of tiny models equal ours in
float32: `tests/test_peers.py`), vLLM by the steps of its engine, compiled; either decodes 16 tokens from each depth on,
ours stays at it. Kinds of attention and numbers of the cache are those that each chooses: llama.cpp keeps it in
float16.

Command: `{shlex.join(["python", "-m", "bench.peers", *map(without_folders, called)])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.bfloat16)}
"""


def table(name: str, rows: Sequence[Row]) -> str:
    lines = [f"| | Cavelight | {name} | times |", "|---|--:|--:|--:|"]
    for row in rows:
        theirs = "– | –" if row.theirs is None else f"{row.theirs.tokens_per_second:,.1f} | {row.ratio:.2f}"
        lines.append(f"| {row.ours.case.name} | {row.ours.tokens_per_second:,.1f} | {theirs} |")
    return "\n".join(lines)


def without_folders(word: str) -> str:
    """Where programs lie here says nothing elsewhere."""
    return re.sub(r".*/", "", word)


if __name__ == "__main__":
    leave_with(main)
