"""A large checkpoint through conversion: memory, rate, and what SIGKILL does to it.

python -m bench.conversion --gigabytes 10 makes a synthetic checkpoint of that size and converts it by the command: bf16
to fp8, that to bf16, and bf16 to bf16, which is copied. Each is done once undisturbed and once killed at five random
moments and continued, and the two results are compared byte by byte. Writes docs/results/conversion.md.
"""

import argparse
import filecmp
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bench.peak import peak_bytes
from bench.provenance import commit, leave_with, machine
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset
from cavelight.weights.files import write_safetensors
from cavelight.weights.headers import Entry
from cavelight.weights.names import hf_tensors

KILLS = 5
GLANCE = 0.02  # seconds between two looks at a process's memory
COPY_BYTES = 2**24  # read and written at a time by the plain copy
WIDE = {"vocab_size": 129280, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 2048}
NARROW = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 512}
SMALLER = {"num_attention_heads": 32, "q_lora_rank": 768, "n_routed_experts": 16, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


@dataclass(frozen=True)
class Run:
    """One conversion: undisturbed, its seconds and bytes read and written; and the one that was killed.

    `killed_at` holds for each kill how many tensors were in the journal, `peaks` the resident memory of all calls, the
    undisturbed one first. `processor` are the undisturbed call's seconds of processor time.
    """

    way: str
    seconds: float
    processor: float
    bytes: int
    killed_at: tuple[int, ...]
    tensors: int
    peaks: tuple[int, ...]
    same: bool


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    chance = random.Random(options.seed)
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", do="choose another folder with --folder; this script deletes its own")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config = config_of(options.gigabytes)
        made = make(config, folder / "bf16")
        copied = plain_copy(folder / "bf16", folder / "copy")
        runs = [go_through("bf16 to fp8", folder / "bf16", folder / "fp8", "fp8", chance)]
        runs += [go_through("fp8 to bf16", folder / "fp8", folder / "back", "hf", chance)]
        shutil.rmtree(folder / "back")
        runs += [go_through("bf16 to bf16", folder / "bf16", folder / "again", "hf", chance)]
        called = list(sys.argv[1:] if arguments is None else arguments)
        text = report(config, made, size_of(folder / "bf16"), copied, runs, called)
    finally:
        shutil.rmtree(folder)
    with file_beside(options.out) as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return 0 if all(run.same for run in runs) else 1


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a large checkpoint there and back, and kill it on the way.")
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the bf16 checkpoint (default: 10)")
    parser.add_argument("--folder", type=Path, default=Path("runs/conversion"), help="needs four times that size")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/conversion.md"), help="the page to write")
    return parser.parse_args(arguments)


def config_of(gigabytes: float) -> ModelConfig:
    """DeepSeek-V3 with matrices as large as the size allows, and as many layers as it takes."""
    base = preset("deepseek-v3").replace(**(WIDE if gigabytes >= 8 else NARROW), **SMALLER, **GROUPS)
    for layers in range(2, 1000):
        config = base.replace(num_hidden_layers=layers)
        if 2 * sum(prod(tensor.shape) for tensor in hf_tensors(config)) >= gigabytes * 1e9:
            break
    return config


def make(config: ModelConfig, folder: Path) -> float:
    """Write the checkpoint, normally distributed, one tensor in memory at a time. Returns the seconds it took."""
    began = time.monotonic()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2), encoding="utf-8")
    tensors = {tensor.name: tensor for tensor in hf_tensors(config)}
    dtypes = {"model": torch.bfloat16, "float32": torch.float32}
    entries = [Entry(tensor.name, tensor.shape, dtypes[tensor.dtype]) for tensor in tensors.values()]

    def drawn(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(tensors[name].parts[0].name.encode()))
        values = torch.empty(tensors[name].shape, dtype=dtypes[tensors[name].dtype])
        return values.normal_(std=0.02, generator=generator)

    write_safetensors(folder, entries, drawn, shard_bytes=2 * 10**9)
    return time.monotonic() - began


def plain_copy(source: Path, target: Path) -> float:
    """Read a folder and write it elsewhere, down to the disk. Returns bytes read and written, per second."""
    forget(source)
    began, done = time.monotonic(), 0
    target.mkdir()
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as reader, open(target / file.name, "wb", buffering=0) as writer:
            while data := reader.read(COPY_BYTES):
                writer.write(data)
                done += 2 * len(data)
            os.fsync(writer.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return done / seconds


def go_through(way: str, source: Path, target: Path, to: str, chance: random.Random) -> Run:
    """Convert undisturbed, then again with kills, and compare."""
    forget(source)
    began = time.monotonic()
    peak, processor = convert(source, target, to)
    peaks = [peak]
    seconds = time.monotonic() - began
    disturbed = target.with_name(f"{target.name}-disturbed")
    killed_at: list[int] = []
    while len(killed_at) < KILLS:
        peak, _ = convert(source, disturbed, to, kill_after=chance.uniform(0, seconds / (KILLS + 1)))
        peaks.append(peak)
        journal = disturbed.with_name(f".{disturbed.name}.converting") / "journal.jsonl"
        if disturbed.exists():  # it was quicker this time
            break
        killed_at.append(max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0)
    if not disturbed.exists():
        peaks.append(convert(source, disturbed, to)[0])
    files = sorted(file.name for file in target.iterdir())
    same = files == sorted(file.name for file in disturbed.iterdir()) and not any(
        filecmp.cmpfiles(target, disturbed, files, shallow=False)[1:]
    )
    shutil.rmtree(disturbed)
    total = size_of(source) + size_of(target)
    tensors = json.loads((target / "conversion.json").read_bytes())["rules"]
    return Run(way, seconds, processor, total, tuple(killed_at), sum(tensors.values()), tuple(peaks), same)


def convert(source: Path, target: Path, to: str, kill_after: float | None = None) -> tuple[int, float]:
    """One call of the command: its peak of resident memory in bytes, and seconds of processor time.

    kill_after: SIGKILL after so many seconds of work.
    """
    command = [sys.executable, "-m", "cavelight", "convert", str(source), str(target), "--to", to, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL if kill_after is None else subprocess.PIPE)
    ends = float("inf")
    if process.stdout is not None and kill_after is not None:
        next((line for line in process.stdout if b'"converting"' in line), None)  # it has begun
        ends = time.monotonic() + kill_after
    peak, ended = 0, 0
    while not ended:
        peak = max(peak, peak_bytes(process.pid))
        if time.monotonic() >= ends:
            os.kill(process.pid, signal.SIGKILL)  # send_signal would collect an ended process
            ends = float("inf")
        time.sleep(GLANCE)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if process.stdout is not None:
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 and kill_after is None:
        raise UserError(f"The conversion to {to} failed", got=f"exit code {process.returncode}")
    return peak, usage.ru_utime + usage.ru_stime


def forget(folder: Path) -> None:
    """Ask the system to drop what it keeps of these files in memory, so that reading means the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def report(
    config: ModelConfig, made: float, nbytes: int, copied: float, runs: Sequence[Run], called: Sequence[str]
) -> str:
    """The page for docs/results."""
    largest = max(2 * prod(tensor.shape) for tensor in hf_tensors(config))
    rows = [
        f"| {run.way} | {run.seconds:,.0f} | {run.processor:,.0f} | {run.bytes / run.seconds / 1e6:,.0f} "
        f"| {run.bytes / run.seconds / copied:.2f} | {run.peaks[0] / 1e6:,.0f} | {max(run.peaks) / 1e6:,.0f} |"
        for run in runs
    ]
    kills = [
        f"| {run.way} | {len(run.killed_at)} | {', '.join(f'{count:,}' for count in run.killed_at)} "
        f"of {run.tensors:,} | {'yes' if run.same else 'NO'} |"
        for run in runs
    ]
    lines = [
        "# Converting a large checkpoint",
        f"A synthetic DeepSeek-V3 of {config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, vocabulary "
        f"{config.vocab_size:,}, with its MTP module: {nbytes / 1e9:.2f} GB in bfloat16, written in {made:,.0f} s; the "
        f"largest tensor has {largest / 1e6:,.0f} MB. It goes to block-fp8 and back by `cavelight convert`, and to "
        "bfloat16 as it is, which is a copy; audit included. Each is done once undisturbed, and once killed with "
        "SIGKILL and continued by the same command.",
        "| | seconds | of a core | MB/s read and written | of a plain copy's rate | peak memory, MB | of all calls |\n"
        "|---|--:|--:|--:|--:|--:|--:|\n" + "\n".join(rows),
        f"The plain copy reads and writes the bfloat16 checkpoint in the same run: {copied / 1e6:,.0f} MB/s. Bytes "
        "count once read and once written; the audit reads the output once more, which is in the seconds and not in "
        "the bytes. Memory is the process's largest resident set, Python and PyTorch included.",
        "| | kills | tensors in the journal after each | equal to the undisturbed result, byte by byte |\n"
        "|---|--:|---|---|\n" + "\n".join(kills),
        f"Command: `{shlex.join(['python', '-m', 'bench.conversion', *called])}`  \nCommit: {commit()}  \n"
        f"Machine: {machine(torch.bfloat16)}",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    leave_with(main)
