"""The reckoning after a conversion: every tensor in, every tensor out, and a rule that explains it.

Names, shapes and dtypes come from the headers as they now stand on the disk, checksums from reading all of it again,
and values from samples of rows that source and output are both asked for. What cannot be explained is an error.

Letters: O outputs (rows), I inputs (columns) of a matrix.
"""

import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.events import Event
from cavelight.spec.formats import Format
from cavelight.weights.bias import for_export
from cavelight.weights.files import Safetensors, bytes_of
from cavelight.weights.headers import Entry, abbreviated
from cavelight.weights.journal import Done
from cavelight.weights.quant import CLIPS, unpack
from cavelight.weights.side_by_side import Progress, side_by_side
from cavelight.weights.snapshot import CONVERSION
from cavelight.weights.stored import Checkpoint
from cavelight.weights.worklist import LOSSY, Job, Worklist, stored_names, work_list

PIECE_BYTES = 2**24  # read at a time
SAMPLE_ROWS, ROWS_A_SAMPLE = 2, 4096  # rows compared at a place; a matrix has a place for each so many rows
SLACK = 1 + 2**-10  # for rounding in float32 on the way
COMMIT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})")


@dataclass(frozen=True)
class Report:
    """What a conversion did; written as conversion.json, and the same for the same conversion.

    `rules` counts plain tensors by what became of them. `largest_error` is, by role, the largest difference between a
    sampled value and the source's, as a share of the largest value of its row; only roles that lost something appear.
    `digest` is over the checksums of all stored tensors.
    """

    source: str
    commit: str | None  # where the source is a snapshot of the Hugging Face hub
    source_format: dict[str, Any] | None  # the quantization_config
    format: dict[str, Any] | None
    dtype: str
    rules: dict[str, int]
    tensors: int
    bytes_read: int
    bytes: int
    values_compared: int
    largest_error: dict[str, float]
    digest: str
    fingerprint: str
    files: list[str]
    left_behind: list[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a folder that a conversion wrote; None where there is none that can be read."""
        try:
            return cls(**json.loads((folder / CONVERSION).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def audit(
    source: Checkpoint, work: Worklist, folder: Path, done: Mapping[str, Done], on_event: Callable[[Event], None]
) -> Report:
    """Hold the finished `folder` against source, work list and journal (`done`). The files are for the caller to name.

    Raises UserError for anything that is not as it was to be.
    """
    output = Checkpoint(folder)
    _check_source(source, work, done)
    _check_headers(output.files.entries, work)
    _check_bytes(output.files, work, done, on_event)
    compared, errors = _compare(source, output, work, on_event)
    rules = Counter[str](job.rule for job in work.jobs) + Counter(work.dropped.values())
    crcs = {name: crc for finished in done.values() for name, crc in finished.written.items()}
    hub = COMMIT.search(source.folder.resolve().as_posix())
    return Report(
        source=f"{hub[1]}/{hub[2]}" if hub else source.folder.resolve().name,
        commit=hub[3] if hub else None,
        source_format=source.raw.get("quantization_config"),
        format=output.raw.get("quantization_config"),
        dtype=work.config.torch_dtype,
        rules=dict(sorted(rules.items())),
        tensors=len(output.files.entries),
        bytes_read=sum(source.files.entries[name].nbytes for job in done.values() for name in job.read),
        bytes=sum(shard.nbytes for shard in work.shards),
        values_compared=compared,
        largest_error=errors,
        digest=hashlib.sha256(json.dumps(sorted(crcs.items())).encode()).hexdigest(),
        fingerprint=work.fingerprint,
        files=[],
        left_behind=[],
    )


def _check_source(source: Checkpoint, work: Worklist, done: Mapping[str, Done]) -> None:
    """The source is still what it was, and each of its tensors was read or is left out for a reason."""
    if work_list(Checkpoint(source.folder), work.options).task != work.task:
        raise _unexplained("The source has changed while it was converted", [str(source.folder)])
    read = {name for finished in done.values() for name in finished.read}
    expected = {name for job in work.jobs for name in stored_names(source, job.source)}
    wrong = sorted((read ^ expected) | (source.files.entries.keys() ^ (read | work.dropped.keys())))
    if wrong:
        raise _unexplained("Not every tensor of the source is accounted for", wrong)


def _check_headers(entries: Mapping[str, Entry], work: Worklist) -> None:
    """Names, shapes and dtypes in the output's files, and each tensor in the file and at the place laid out for it."""
    places = {name: (shard.file, start) for shard in work.shards for name, start in shard.starts.items()}
    wanted = {entry.name: (entry.shape, entry.dtype, *places[entry.name]) for entry in work.entries}
    found = {entry.name: (entry.shape, entry.dtype, entry.file.name, entry.start) for entry in entries.values()}
    wrong = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if wrong:
        raise _unexplained("The files written hold other tensors than were to be written", sorted(wrong))


def _check_bytes(
    files: Safetensors, work: Worklist, done: Mapping[str, Done], on_event: Callable[[Event], None]
) -> None:
    """Read every tensor once more and compare checksums."""
    progress = Progress("checking what was written", work.nbytes, "B", on_event)

    def wrong(job: Job) -> list[str]:
        return [name for name, crc in done[job.name].written.items() if _checksum(files, name, progress) != crc]

    with closing(side_by_side(wrong, work.jobs, progress)) as results:
        for names in results:
            progress.tell()
            if names:
                raise _unexplained("What lies on the disk is not what was written to it", names)


def _checksum(files: Safetensors, name: str, progress: Progress) -> int:
    entry, crc = files.entries[name], 0
    rows = max(1, PIECE_BYTES * entry.shape[0] // entry.nbytes)
    for start in range(0, entry.shape[0], rows):
        data = bytes_of(files.rows(name, start, min(start + rows, entry.shape[0])))
        crc = zlib.crc32(data, crc)
        progress.add(len(data))
    return crc


def _compare(
    source: Checkpoint, output: Checkpoint, work: Worklist, on_event: Callable[[Event], None]
) -> tuple[int, dict[str, float]]:
    """Rows of every tensor beside the source's. Returns how many values, and the largest relative error by role."""
    progress = Progress("comparing values", len(work.jobs), "tensors", on_event)
    compared, errors = 0, dict[str, float]()

    def sample(job: Job) -> tuple[int, float | None]:
        progress.add(1)
        return _sample(source, output, work, job)

    with closing(side_by_side(sample, work.jobs, progress)) as results:
        for job, (count, error) in zip(work.jobs, results, strict=True):
            progress.tell()
            compared += count
            if error:
                errors[job.role] = max(error, errors.get(job.role, 0.0))
    return compared, dict(sorted(errors.items()))


def _sample(source: Checkpoint, output: Checkpoint, work: Worklist, job: Job) -> tuple[int, float | None]:
    """Some rows of one tensor: how many values, and of a rule that may lose something the largest relative error."""
    rows, chance = job.tensor.shape[0], random.Random(job.name)
    starts = [chance.randrange(rows) for _ in range(0, rows, ROWS_A_SAMPLE)]
    places = [(start, min(start + SAMPLE_ROWS, rows)) for start in starts]
    if job.rule == "bias shifted":
        places = [(0, rows)]
    count, errors = 0, []
    for start, stop in places:
        count += (stop - start) * prod(job.tensor.shape[1:])
        if job.rule in LOSSY:
            errors.append(_lossy(source, output, job, start, stop))
            continue
        ours = output.rows(job.name, start, stop)
        exact = source.rows(job.source, start, stop, torch.float32)
        theirs = exact.to(ours.dtype)
        if job.rule == "cast":
            errors.append(_share_of_row(ours.float() - exact, exact))
        theirs = for_export(theirs, work.options.shift_biases) if job.rule == "bias shifted" else theirs
        if not torch.equal(ours, theirs):
            raise _unexplained(f"Values that were to be {job.rule} are not", [job.name])
    return count, max(errors, default=None)


def _lossy(source: Checkpoint, output: Checkpoint, job: Job, start: int, stop: int) -> float:
    """The largest relative error of these rows; UserError if one is larger than the format explains."""
    block = output.format.block if output.format.kind == "fp8" else (1, output.format.group or job.tensor.shape[1])
    first = start // block[0] * block[0]
    parts = output.packed_rows(job.name, first, stop)
    y_OI = unpack(parts, output.format, torch.float32)[start - first :]
    scale = parts["weight_scale_inv" if output.format.kind == "fp8" else "weight_scale"].float()
    scale_OI = scale.repeat_interleave(block[0], dim=0)[start - first : stop - first]
    scale_OI = scale_OI.repeat_interleave(block[1], dim=1)[:, : y_OI.shape[1]]
    x_OI = source.rows(job.source, start, stop, torch.float32)
    error_OI = (x_OI - y_OI).abs()
    if bool((error_OI > _allowed(x_OI, scale_OI, output.format)).any()):
        raise _unexplained(f"Values lost more than {job.rule} explains", [job.name])
    return _share_of_row(error_OI, x_OI)


def _share_of_row(error: Tensor, x: Tensor) -> float:
    """The largest error, as a share of the largest value of its row; of one-dimensional tensors, of itself."""
    most = x.abs().flatten(1).amax(dim=1) if x.dim() > 1 else x.abs()
    worst = error.abs().flatten(1).amax(dim=1) if x.dim() > 1 else error.abs()
    return float((worst / most.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _allowed(x_OI: Tensor, scale_OI: Tensor, format: Format) -> Tensor:
    """How far a value may be from what it was: half the distance between the format's neighbouring numbers."""
    if format.kind == "fp8":  # three bits after the leading one; below 2^-6 steps of 2^-9
        return torch.maximum(x_OI.abs() * 2**-4, scale_OI * 2**-10) * SLACK
    most_OI = scale_OI * (2 ** (format.bits - 1) - 1)
    clipped_OI = (x_OI.abs() - most_OI).clamp(min=0)
    reach = 1 / min(CLIPS) + 2**-7  # of clipped values; scales are rounded to their dtype
    clipped_OI = torch.where(x_OI.abs() <= most_OI * reach, clipped_OI, 0.0)
    return (scale_OI / 2 + clipped_OI) * SLACK


def _unexplained(what: str, names: list[str]) -> UserError:
    return UserError(
        what,
        got=abbreviated(names),
        why="the audit accounts for every tensor, and nothing takes the target's place before that",
        do="try again in a new folder; if it repeats, check disk and memory of this machine, or report a bug of ours",
    )
