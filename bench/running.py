"""How near running `mid` comes to what this machine can read and multiply, in bfloat16, int8 and int4.

python -m bench.running writes docs/results/running.md and running.png. The model has random weights; probes are taken
beside every case. transformers, on the same checkpoint, takes turns with ours, in the numbers that suit the processor.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.nn.functional as F

from bench.provenance import commit, leave_with, machine
from cavelight.bench import cases as bench_cases
from cavelight.bench.cases import Case
from cavelight.bench.peers.transformers import Transformers
from cavelight.bench.picture import Panel, draw_panels
from cavelight.bench.probes import BUFFER, Probes, read_bandwidth
from cavelight.bench.sweep import Row, cases, sweep
from cavelight.cli.bench import random_model
from cavelight.cli.progress import screen
from cavelight.disk import file_beside, forget
from cavelight.kernels import native
from cavelight.model.transformer import Transformer
from cavelight.run.engine import Engine
from cavelight.run.quick import BUILD, without_native
from cavelight.run.request import Request
from cavelight.run.rows import row_bytes
from cavelight.spec.events import Event
from cavelight.spec.presets import preset
from cavelight.train.optim import pick_dtype
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

PROMPTS, DEPTHS, BATCHES, TOP = (512, 4096), (0, 128, 4096, 16384), (2, 4, 8, 16, 32), (1, 2, 4, 6, 8, 12)
KINDS = ("bfloat16", "int8", "int4")
# What was asked for: the least share of the bandwidth, of the peak for prompts, by kind and case.
ASKED = {
    ("bfloat16", "decoding at 128"): 0.80,
    ("int8", "decoding at 128"): 0.75,
    ("int4", "decoding at 128"): 0.55,
    ("bfloat16", "decoding at 4,096"): 0.70,
    ("int8", "decoding at 4,096"): 0.60,
    ("bfloat16", "decoding at 16,384"): 0.60,
    ("bfloat16", "prompt 512"): 0.45,
    ("bfloat16", "prompt 4,096"): 0.40,
    ("bfloat16", "decoding at 0, 16 at once"): 0.70,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="mid, beside what the machine can do.")
    parser.add_argument("--without-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--seconds", type=float, default=2.0, help="of every case, after warming up (2)")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)  # the child that measures a prompt's memory
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where page and figure go")
    options = parser.parse_args(arguments)
    if options.memory:
        print(memory_of_a_prompt(options.memory))
        return 0
    bench_cases.SECONDS = options.seconds
    with TemporaryDirectory() as scratch, screen("Measuring mid", as_json=False) as listen:
        folders = checkpoints(Path(scratch))
        rows = {kind: measured(folders[kind], kind, not options.without_peer, listen) for kind in KINDS}
        model = read_checkpoint(folders["bfloat16"])
        small = sweep(model, [Case("decoding", depth) for depth in DEPTHS], on_event=listen, cache=torch.int8)
        experts, needed, price = by_experts(model), necessity(model), price_of_invariance(model)
        child = [sys.executable, "-m", "bench.running", "--memory", str(folders["bfloat16"])]
        memory = int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    draw(rows["bfloat16"], experts, options.out / "running.png")
    called = list(sys.argv[1:] if arguments is None else arguments)
    with file_beside(options.out / "running.md") as page:
        page.write_text(report(rows, small, experts, needed, price, memory, called), encoding="utf-8")
    print(f"wrote {options.out / 'running.md'}")
    return 0


def checkpoints(scratch: Path) -> dict[str, Path]:
    """The same weights, stored in each way."""
    folders = {kind: scratch / kind for kind in KINDS}
    write_checkpoint(random_model(preset("mid"), torch.bfloat16), folders["bfloat16"])
    for kind in KINDS[1:]:
        command = [sys.executable, "-m", "cavelight", "convert", folders["bfloat16"], folders[kind], "--to", kind]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for file in folders["bfloat16"].glob("*.safetensors"):
        forget(file)  # converting read it, so that it lies in memory in small pages: no model that is run begins so
    return folders


def measured(folder: Path, kind: str, against: bool, listen: Callable[[Event], None]) -> list[Row]:
    model = read_checkpoint(folder)
    chosen, _ = cases(model.config, model.lm_head.weight.dtype, PROMPTS, DEPTHS, BATCHES)
    peer = Transformers(folder, model.config, pick_dtype("auto")) if against and kind == "bfloat16" else None
    return sweep(model, chosen, peer, listen)


def by_experts(model: Transformer) -> list[tuple[int, Row]]:
    """Decoding with other numbers of experts a token, on the same weights."""
    found = []
    for top in TOP:
        config = model.config.replace(num_experts_per_tok=top)
        other = Transformer(config, torch.bfloat16, device=torch.device("meta"))
        other.load_state_dict(model.state_dict(), assign=True)
        found.append((top, sweep(other, [Case("decoding", 0)])[0]))
    return found


def necessity(model: Transformer) -> list[tuple[str, float]]:
    """What share of the bandwidth torch reaches for one token, and what is reached natively."""
    head_VD = model.lm_head.weight
    weights = [head_VD.clone() for _ in range(-(-BUFFER // head_VD.nbytes))]  # in turn, so that no cache holds them
    matrices, library = [native.matrix(weight) for weight in weights], BUILD.get()
    x_1D = torch.randn(1, head_VD.shape[1])
    half_1D = x_1D.to(head_VD.dtype)
    compiled = torch.compile(F.linear)
    acts: dict[str, Sequence[Callable[[], object]]] = {
        "the head's product, torch eagerly": [partial(F.linear, half_1D, weight) for weight in weights],
        "the head's product, torch compiled": [partial(compiled, half_1D, weight) for weight in weights],
    }
    if library:
        acts["the head's product, natively"] = [partial(native.product, library, m, x_1D) for m in matrices if m]
    with torch.inference_mode():
        found = [(name, head_VD.nbytes / typical(some) / read_bandwidth(seconds=0.3)) for name, some in acts.items()]
    case = Case("decoding", 128)
    with patch.object(bench_cases, "quick", lambda same: same):
        found.append(("a step at 128, the model's own modules in bfloat16", sweep(model, [case])[0].bandwidth_share))
    with patch.object(BUILD, "loaded", None), patch.object(BUILD, "reason", "to see what it is worth"):
        found.append(("a step at 128, plain modules in float32", sweep(model, [case])[0].bandwidth_share))
    return found


def price_of_invariance(model: Transformer) -> tuple[float, float]:
    """How many times as long an invariant engine takes: for a prompt of 512 tokens, and for a step of 16 sequences."""
    prompts: dict[bool, list[float]] = {False: [], True: []}
    steps: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for invariant in (False, True):
            engine = Engine(model, memory=1 << 26, invariant=invariant)
            engine.submit(Request(torch.arange(512).tolist(), 1))
            began = time.perf_counter()
            engine.run()
            prompts[invariant].append(time.perf_counter() - began)
            for first in range(16):
                engine.submit(Request([first, 1], 20, stop_ids=frozenset()))
            engine.step()
            while engine.load.running:
                began = time.perf_counter()
                engine.step()
                steps[invariant].append(time.perf_counter() - began)
    return median(prompts[True]) / median(prompts[False]), median(steps[True]) / median(steps[False])


def typical(acts: Sequence[Callable[[], object]], rounds: int = 4) -> float:
    """Seconds of one of some acts in turn, the first round left out."""
    seconds = []
    for _ in range(rounds):
        for act in acts:
            began = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - began)
    return median(seconds[len(acts) :])


def memory_of_a_prompt(folder: Path) -> int:
    """Bytes by which the process grows at its highest while a prompt of 4,096 goes through the engine."""
    model = read_checkpoint(folder, mapped=False)  # whose pages are all there before, and stay
    without_native()
    engine = Engine(model, memory=80 << 20, budget=512)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    engine.submit(Request(torch.arange(4096).tolist(), 1))
    engine.run()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) << 10


def draw(rows: Sequence[Row], experts: Sequence[tuple[int, Row]], path: Path) -> None:
    steps = [row for row in rows if row.ours.case.kind == "decoding"]
    depths = [(row.ours.case.depth, row) for row in steps if row.ours.case.batch == 1]
    company = [(row.ours.case.batch, row) for row in steps if row.ours.case.depth == 0]
    panels = [
        Panel("A token by depth", "positions in the cache", depths),
        Panel("A token by company", "sequences at once", company),
        Panel("A token by experts", "routed experts a token", experts),
    ]
    facts = [machine(torch.bfloat16), f"reads {rows[0].probes.read / 1e9:.1f} GB/s"]
    draw_panels(panels, path, "What a token of mid costs in bfloat16", facts)


def report(
    rows: dict[str, list[Row]],
    small: Sequence[Row],
    experts: Sequence[tuple[int, Row]],
    needed: Sequence[tuple[str, float]],
    price: tuple[float, float],
    memory: int,
    called: Sequence[str],
) -> str:
    by_name = {kind: {row.ours.case.name: row for row in some} for kind, some in rows.items()}
    kept = [(row, by_name["bfloat16"][row.ours.case.name]) for row in small]
    smaller = [f"| {a.ours.case.name} | {cell('', a)} | {cell('', b)} |" for a, b in kept]
    reading = [(top, 1e3 * row.ours.typical, 1e3 * row.ours.read / row.probes.read) for top, row in experts]
    many = [f"| {top} | {taken:.1f} | {least:.1f} |" for top, taken, least in reading]
    shares = [f"| {name} | {found:.0%} |" for name, found in needed]
    lines = "\n".join
    return f"""# Running `mid` at the machine's limit

{method(rows["bfloat16"][0].probes)}

| | bfloat16, tokens/s (share) | int8 | int4 | transformers, {str(pick_dtype("auto")).removeprefix("torch.")} |
|---|--:|--:|--:|--:|
{lines(all_ways(by_name))}

{asked_for(by_name, price, memory)}

| bfloat16 weights, tokens/s (share) | cache in int8 | in bfloat16 |
|---|--:|--:|
{lines(smaller)}

A row takes {row_bytes(preset("mid"), torch.int8)} bytes in int8 and {row_bytes(preset("mid"), torch.bfloat16)} in
bfloat16; each share counts its own rows.

![by depth, company and experts](running.png)

| experts a token | ms a token | reading alone |
|--:|--:|--:|
{lines(many)}

## Why layers are computed natively

| for one token, in bfloat16 | share of the bandwidth |
|---|--:|
{lines(shares)}

Command: `{shlex.join(["python", "-m", "bench.running", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.bfloat16)}
"""


def method(probes: Probes) -> str:
    return f"""\
Hidden size 1024, 12 layers, 64 experts of which 6 a token, random weights. Shares: of decoding and verifying, the bytes
that a step has to read (weights of all layers and experts met, rows of the cache, each once) over what could have been
read in its time; of prompts, the operations of `spec/cost.py` over what could have been multiplied. Both probes are
taken in the same run, the first beside every case: reading 1 GB by all threads ({probes.read / 1e9:.1f} GB/s at the
start), and the fastest square product of any kind of numbers ({probes.peak / 1e12:.2f} Tflop/s, float32 here). Packed
matrices are those of `cavelight convert`: embedding, head, router and both latent up-projections stay in bfloat16.
Weights are mapped, from files that nothing else has just read, so that they lie in huge pages.
Layers: {"natively" if not without_native() else without_native()}."""


def all_ways(by_name: dict[str, dict[str, Row]]) -> list[str]:
    """A line for each case."""
    found = []
    for name, row in by_name["bfloat16"].items():
        cells = [cell(kind, by_name[kind][name]) for kind in KINDS]
        peer = f"{row.theirs.tokens_per_second:,.1f}" if row.theirs else "–"
        found.append(f"| {name} | {' | '.join(cells)} | {peer} |")
    return found


def asked_for(by_name: dict[str, dict[str, Row]], price: tuple[float, float], memory: int) -> str:
    """What of it was reached."""
    asked = [(kind, name, row) for kind, some in by_name.items() for name, row in some.items() if (kind, name) in ASKED]
    missed = [(kind, name, row) for kind, name, row in asked if not reached(kind, row)]
    shares = [f"{kind}, {name}: {share(row):.0%} of {ASKED[kind, name]:.0%}" for kind, name, row in missed]
    also = f" Not reached: {'; '.join(shares)}." if shares else ""
    one, five = by_name["bfloat16"]["decoding at 16,384"], by_name["bfloat16"]["verifying 5 at 16,384"]
    times, more = five.ours.typical / one.ours.typical, five.ours.read / one.ours.read
    reading, products = times * five.bandwidth_share, times * five.peak_share
    return f"""\
- Asked for and reached: {len(asked) - len(missed)} of {len(ASKED)} shares.{also}
- Verifying 5 tokens at a depth of 16,384 takes {times:.2f} times one token (asked: at most 1.5). With random weights
  five tokens meet other experts: they have to read {more:.2f} times as much. At the measured limits reading alone would
  take {reading:.2f} times one token, multiplying alone {products:.2f} times.
- A prompt of 4,096 tokens takes {memory / 1e6:,.0f} MB beside the weights and its cache (asked: under 500).
- `Engine(invariant=True)`, in bfloat16: a prompt of 512 tokens takes {price[0]:.2f} times as long, a step of 16
  sequences {price[1]:.2f} times."""


def cell(kind: str, row: Row) -> str:
    mark = {True: "", False: " ✗", None: ""}[reached(kind, row)]
    return f"{row.ours.tokens_per_second:,.1f} ({share(row):.0%}{mark})"


def share(row: Row) -> float:
    return row.peak_share if row.ours.case.kind == "prompt" else row.bandwidth_share


def reached(kind: str, row: Row) -> bool | None:
    """Whether what was asked for was reached; None if nothing was."""
    asked = ASKED.get((kind, row.ours.case.name))
    return None if asked is None else round(share(row), 2) >= asked


if __name__ == "__main__":
    leave_with(main)
