"""The header pass over a full-size DeepSeek-V3: seconds and memory, on files of the true size that are holes.

python -m bench.headers writes docs/results/headers.md. Reading headers cannot tell a hole from weights, and costs the
same.
"""

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.sparse import write_sparse

from bench.provenance import commit, leave_with, machine
from cavelight.disk import file_beside
from cavelight.spec.presets import preset

SHARDS = 163  # of the released checkpoint
COMMANDS = {"doctor": ("doctor", "--level", "headers"), "plan": ("plan",)}


@dataclass(frozen=True)
class Call:
    """One command on the folder: wall and processor seconds, peak resident bytes, exit code."""

    seconds: float
    processor: float
    peak: int
    code: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The header pass over a full-size DeepSeek-V3.")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "deepseek-v3"
        tensors = len(write_sparse(folder, preset("deepseek-v3"), SHARDS))
        size = sum(file.stat().st_size for file in folder.iterdir())
        calls = {name: _call(command[0], str(folder), *command[1:]) for name, command in COMMANDS.items()}
    called = list(sys.argv[1:] if arguments is None else arguments)
    page = options.out / "headers.md"
    with file_beside(page) as file:
        file.write_text(report(calls, tensors, size, called), encoding="utf-8")
    print(f"wrote {page}")
    return 0 if calls["doctor"].seconds < 60 and calls["doctor"].peak < 10**9 and calls["plan"].seconds < 2 else 1


def _call(*arguments: str) -> Call:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    # Through a process between, since a child's peak memory is only told as the largest of all children.
    script = (
        "import resource, subprocess, sys\n"
        "command = [sys.executable, '-m', 'cavelight', *sys.argv[1:]]\n"
        "code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode\n"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    code, peak = map(int, result.stdout.split())
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Call(seconds, used, peak, code)


def report(calls: dict[str, Call], tensors: int, size: int, called: Sequence[str]) -> str:
    rows = [
        f"| `cavelight {' '.join((COMMANDS[name][0], 'DIR', *COMMANDS[name][1:]))}` | {call.seconds:.1f} "
        f"| {call.processor:.1f} | {call.peak / 1e6:,.0f} | {call.code} |"
        for name, call in calls.items()
    ]
    return f"""# Headers of a full-size DeepSeek-V3

{SHARDS} shards, {tensors:,} tensors, {size / 1e9:,.0f} GB in files that are holes.

| | seconds | of a core | peak memory, MB | exit code |
|---|--:|--:|--:|--:|
{chr(10).join(rows)}

Start-up included. The doctor leaves with 1 if a check fails.

Command: `{shlex.join(["python", "-m", "bench.headers", *called])}`{"  "}
Commit: {commit()}{"  "}
Machine: {machine(torch.float32)}
"""


if __name__ == "__main__":
    leave_with(main)
