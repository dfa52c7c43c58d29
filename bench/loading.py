"""What mapping weights is worth, and costs: starts, memory of two processes beside each other, and decoding.

python -m bench.loading writes docs/results/loading.md. The model is `mid` with random weights.
Every start and every process that shares is one of its own; mapped and read take turns in all of it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO

import torch

from bench.provenance import commit, leave_with, machine
from cavelight.bench import cases
from cavelight.bench.cases import Case, measure
from cavelight.bench.probes import read_bandwidth
from cavelight.cli.bench import random_model
from cavelight.disk import file_beside, forget
from cavelight.run.generate import generate_tokens
from cavelight.run.quick import without_native
from cavelight.spec.formats import INT8
from cavelight.spec.presets import preset
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

WAYS = ("mapped", "read")
TOKENS, PROMPT = 50, [3, 1, 4, 1, 5]
CASES = (Case("decoding", 128), Case("decoding", 128, batch=8))
TURN, PROBE = 0.5, 0.2  # seconds of a case before another way has its turn, and of reading beside it


@dataclass(frozen=True)
class Start:
    """Seconds from the call to the model, of each of some processes, the file in the system's memory before or not."""

    warm: tuple[float, ...]
    cold: tuple[float, ...]
    unchecked: tuple[float, ...]  # warm, and not looked through for NaN


@dataclass(frozen=True)
class Memory:
    """Of a process beside another one, as /proc/self/smaps_rollup has it, in bytes."""

    own: int  # pages that no other process has
    share: int  # Pss: shared pages count by how many share them

    @classmethod
    def here(cls) -> "Memory":
        lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:])
        kilobytes = {name.rstrip(":"): int(count) for name, count, *_ in lines}
        own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
        return cls(own << 10, kilobytes["Pss"] << 10)


@dataclass(frozen=True)
class Found:
    """Of one way on one checkpoint; memory as one of two processes has it: before loading, loaded, after generating."""

    start: Start
    before: Memory
    loaded: Memory
    used: Memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Weights mapped and read.")
    parser.add_argument("--rounds", type=int, default=4, help="of every start, and half the turns (4)")
    parser.add_argument("--kinds", default="bfloat16,int8", help="bfloat16, int8, or both (bfloat16,int8)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    parser.add_argument("--start", type=json.loads, help=argparse.SUPPRESS)  # a child: the arguments of `start`
    parser.add_argument("--beside", type=json.loads, help=argparse.SUPPRESS)  # a child: the arguments of `beside`
    options = parser.parse_args(arguments)
    if options.start:
        print(start(*options.start))
        return 0
    if options.beside:
        beside(*options.beside)
        return 0
    with TemporaryDirectory() as scratch:
        folders = {kind: Path(scratch) / kind for kind in options.kinds.split(",")}
        plain = Path(scratch) / "bfloat16"
        write_checkpoint(random_model(preset("mid"), torch.bfloat16), plain)
        if "int8" in folders:
            convert(plain, folders["int8"], INT8)
        without_native()
        busy = os.getloadavg()[0]
        sizes = {kind: sum(file.stat().st_size for file in folder.iterdir()) for kind, folder in folders.items()}
        found = {kind: both(folder, options.rounds) for kind, folder in folders.items()}
        speeds = {kind: turns(folder, options.rounds) for kind, folder in folders.items()}
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "loading.md"
    with file_beside(page) as file:
        file.write_text(report(found, speeds, sizes, busy, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0


def both(folder: Path, rounds: int) -> dict[str, Found]:
    """Mapped and read, in turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for kind in ("warm", "cold", "unchecked"):
            for way in WAYS:
                child = [sys.executable, "-m", "bench.loading", "--start", json.dumps([str(folder), way, kind])]
                done = subprocess.run(child, check=True, capture_output=True, text=True)
                seconds.setdefault((way, kind), []).append(float(done.stdout))
    made = {}
    for way in WAYS:
        warm, cold, unchecked = (tuple(seconds[way, kind]) for kind in ("warm", "cold", "unchecked"))
        made[way] = Found(Start(warm, cold, unchecked), *two(folder, way))
    return made


def start(folder: str, way: str, kind: str) -> float:
    """Seconds of one start, in this process."""
    for file in Path(folder).glob("*.safetensors"):
        if kind == "cold":
            forget(file)
        else:
            with open(file, "rb", buffering=0) as handle:
                while handle.read(1 << 24):
                    pass
    began = time.perf_counter()
    read_checkpoint(folder, mapped=way == "mapped", check_finite=kind != "unchecked")
    return time.perf_counter() - began


def two(folder: Path, way: str) -> list[Memory]:
    """Memory of one of two processes at the same stage: before loading, when loaded, when they have generated."""
    command = [sys.executable, "-m", "bench.loading", "--beside", json.dumps([str(folder), way])]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = []
    for _ in range(3):
        for child in pair:  # each comes to the end of a stage
            assert answer_of(child.stdout) == "there"
        seen = [ask(child) for child in pair]  # and is asked when both are
        found.append(max(seen, key=lambda memory: memory.own))
        for child in pair:
            tell(child.stdin)
    for child in pair:
        child.wait()
    return found


def beside(folder: str, way: str) -> None:
    """The child of `two`: says when it has come to a stage, then its memory when asked, and goes on when told."""

    def stage() -> None:
        print("there", flush=True)
        sys.stdin.readline()
        here = Memory.here()
        print(json.dumps([here.own, here.share]), flush=True)
        sys.stdin.readline()

    without_native()
    stage()
    model = read_checkpoint(folder, mapped=way == "mapped")
    stage()
    list(generate_tokens(model, PROMPT, max_new_tokens=TOKENS, stop_ids=frozenset()))
    stage()


def ask(child: "subprocess.Popen[str]") -> Memory:
    tell(child.stdin)
    return Memory(*json.loads(answer_of(child.stdout)))


def tell(to: IO[str] | None) -> None:
    assert to is not None
    to.write("\n")
    to.flush()


def answer_of(child: IO[str] | None) -> str:
    assert child is not None
    return child.readline().strip()


def turns(folder: Path, rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By case and way, tokens a second and the share of the bandwidth: medians of turns of half a second."""
    cases.SECONDS = TURN
    models = {way: read_checkpoint(folder, mapped=way == "mapped") for way in WAYS}
    found = {}
    for case in CASES:
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in models}
        for number in range(2 * rounds):
            for way in models if number % 2 else reversed(models):
                bandwidth = read_bandwidth(seconds=PROBE)
                measured = measure(models[way], case)
                share = measured.read / measured.typical / bandwidth
                seen[way].append((measured.tokens_per_second, share))
        columns = {way: [*zip(*rows, strict=True)] for way, rows in seen.items()}
        found[case.name] = {way: (median(each[0]), median(each[1])) for way, each in columns.items()}
    return found


def report(
    found: dict[str, dict[str, Found]],
    speeds: dict[str, dict[str, dict[str, tuple[float, float]]]],
    sizes: dict[str, int],
    busy: float,
    called: Sequence[str],
) -> str:
    starts, memory, decoding = [], [], []
    for kind, ways in found.items():
        for way, of in ways.items():
            seconds = [f"{min(some):.2f} ({median(some):.2f})" for some in (of.start.warm, of.start.cold)]
            unchecked = f"{min(of.start.unchecked):.2f} ({median(of.start.unchecked):.2f})"
            starts.append(f"| {kind}, {sizes[kind] / 1e9:.2f} GB | {way} | {' | '.join([*seconds, unchecked])} |")
            more = [
                f"{(now.own - of.before.own) / 1e6:,.0f} | {(now.share - of.before.share) / 1e6:,.0f}"
                for now in (of.loaded, of.used)
            ]
            memory.append(f"| {kind} | {way} | {' | '.join(more)} |")
    for kind, by_case in speeds.items():
        for name, by_way in by_case.items():
            cells = [f"{speed:,.1f} ({share:.0%})" for speed, share in by_way.values()]
            ratio = by_way["mapped"][0] / by_way["read"][0]
            decoding.append(f"| {kind} | {name} | {' | '.join(cells)} | {ratio:.3f} |")
    rows = "\n".join
    return f"""# Weights mapped, and read

`mid` with random weights. Seconds from the call to the model, without Python's own start: the best of some processes
(and their median), the file in the system's memory before (warm), or nothing of it (cold). Unchecked: warm, without
the look for NaN.

| | weights | warm | cold | unchecked |
|---|---|--:|--:|--:|
{rows(starts)}

Two processes beside each other on the same checkpoint, and what one of them has more than before it loaded, in MB: of
its own, which nobody shares, and its share of everything (Pss). What is its own of mapped weights are the two halves of
`kv_b_proj`, which are wanted apart, and the cache and buffers of generating {TOKENS} tokens.

| | weights | loaded: own | share | generated: own | share |
|---|---|--:|--:|--:|--:|
{rows(memory)}

Tokens a second (and the share of what could be read in the time), in one process, in turns of {TURN} seconds: medians.

| | | mapped | read | mapped to read |
|---|---|--:|--:|--:|
{rows(decoding)}

Transparent huge pages of this system: `{transparent()}`; what is read asks for them.
Load of the machine when it began: {busy:.1f}. Where that is above 1, others
took part in all times here, and the ratios of decoding say nothing: repeat it on an idle machine.

Command: `{shlex.join(["python", "-m", "bench.loading", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.bfloat16)}
"""


def transparent() -> str:
    """The system's setting of transparent huge pages."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text(encoding="ascii").strip() if setting.exists() else "none"


if __name__ == "__main__":
    leave_with(main)
