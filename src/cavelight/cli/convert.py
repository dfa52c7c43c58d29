"""`cavelight convert`: a checkpoint in another format, audited."""

import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.errors import UserError
from cavelight.spec.formats import Format, named

if TYPE_CHECKING:
    from cavelight.weights.audit import Report

GROUP = 32  # unless told
DTYPES = ("auto", "bfloat16", "float16", "float32")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def convert(
    source: str,
    target: Path,
    to: str,
    dtype: str,
    revision: str | None,
    shift_biases: bool | None,
    scale_fmt: str,
    group: int,
    without_mtp: bool,
    shard_size: str,
    as_json: bool,
) -> None:
    """`source` is a checkpoint's folder, a run's, or owner/name on the hub. A second call continues the first."""
    format, shard_bytes = format_of(to, scale_fmt, group), bytes_in(shard_size)
    if dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}", do=f"choose one of {', '.join(DTYPES)}")

    import torch

    from cavelight.disk import checkpoint_folder
    from cavelight.weights.convert import convert
    from cavelight.weights.hub import local_folder

    with screen(f"converting {source} to {to} in {target}", as_json) as listen:
        folder = checkpoint_folder(local_folder(source, revision, listen))
        began = time.monotonic()
        report = convert(
            folder,
            target,
            format,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            shift_biases=shift_biases,
            without_mtp=without_mtp,
            shard_bytes=shard_bytes,
            on_event=listen,
        )
    seconds = time.monotonic() - began
    if as_json:
        say_json({"kind": "result", "target": target, "seconds": seconds, **asdict(report)})
    else:
        show(report, target, seconds)


def format_of(to: str, scale_fmt: str, group: int) -> Format:
    """The format that the options describe."""
    format = named(to)
    if scale_fmt not in ("float32", "ue8m0"):
        raise UserError(f"There is no scale format {scale_fmt!r}", do="choose float32 or ue8m0")
    if group < 1 or group % 8:
        raise UserError(
            f"{group} weights cannot share a scale",
            why="int4 packs eight of them into a word",
            do="give a multiple of 8",
        )
    if scale_fmt != "float32" and format.kind != "fp8":
        raise UserError(f"--scale-fmt says how fp8 stores its scales, and --to {to} has none of them")
    if group != GROUP and not format.group:
        raise UserError(f"--group says how many weights share a scale in int4, and --to {to} has no groups")
    if format.kind == "fp8":
        return replace(format, ue8m0=scale_fmt == "ue8m0")
    return replace(format, group=group) if format.group else format


def bytes_in(size: str) -> int:
    """A size as people write it: 500MB, 4GiB, 2g, 1000000."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", size.lower())
    number = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if number <= 0:
        raise UserError(f"{size!r} is no size of a file", do="write it as 500MB or 4GiB")
    return number


def show(report: "Report", target: Path, seconds: float) -> None:
    """What became of the tensors, and what was lost."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("tensors", "what became of them"):
        table.add_column(column, justify="right" if column == "tensors" else "left")
    for rule, count in report.rules.items():
        table.add_row(f"{count:,}", rule)
    OUT.print(table)
    if report.largest_error:
        lost = ", ".join(f"{role.replace('_', ' ')} {error:.1%}" for role, error in report.largest_error.items())
        OUT.print(f"largest error in samples, as a share of the row's largest value: {lost}", soft_wrap=True)
    if report.left_behind:
        OUT.print(f"not taken over: {', '.join(report.left_behind)}", soft_wrap=True)
    rate = (report.bytes_read + report.bytes) / max(seconds, 1e-9) / 1e6
    OUT.print(
        f"[bold]{target}[/]: {report.tensors:,} tensors, {report.bytes / 1e9:,.2f} GB, audited; "
        f"{duration(seconds)}, {rate:,.0f} MB/s read and written",
        soft_wrap=True,
    )
