"""One tensor's way from the source's form to the wanted one, a block of rows at a time.

Letters: O outputs (rows), I inputs (columns) of a matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.weights.bias import for_export
from cavelight.weights.quant import pack, unpack
from cavelight.weights.stored import Checkpoint
from cavelight.weights.worklist import Job, Options, name_of

Stored = dict[str, Tensor]  # rows of stored tensors, by name


def blocks(source: Checkpoint, options: Options, job: Job) -> Iterator[tuple[Stored, Stored]]:
    """Of each block of rows, in order, what was read and what is to be written.

    What is written as it was read is the very same tensor. Raises UserError for numbers that are not finite, and for
    those that the wanted dtype cannot hold.
    """
    parts = source.parts(job.source) if source.is_packed(job.source) else {}
    for start, stop in job.blocks(source.format):
        if not parts:
            rows = source.files.rows(job.source, start, stop)
            yield {job.source: rows}, _from_plain(rows, options, job, last=stop == job.tensor.shape[0])
            continue
        packed_rows = source.packed_rows(job.source, start, stop)
        stored = {parts[suffix]: part for suffix, part in packed_rows.items()}
        if job.rule == "copied":
            new = _as_it_is(stored, job, last=stop == job.tensor.shape[0])
        else:
            exact = job.packed or job.dtype == torch.float16  # which may not hold them, and _from_plain tells
            values = unpack(packed_rows, source.format, torch.float32 if exact else job.dtype)
            new = _from_plain(values, options, job, last=stop == job.tensor.shape[0])
        yield stored, new


def _as_it_is(stored: Stored, job: Job, last: bool) -> Stored:
    """Packed rows for the same format; scales and sizes may be stored in a wider dtype than before."""
    new = {entry.name: stored[entry.name].to(entry.dtype) for entry in job.entries}
    values = new.get(job.name)
    if values is not None and values.dtype == torch.float8_e4m3fn:
        bad = int(((values.view(torch.uint8) & 0x7F) == 0x7F).sum())  # its only numbers that are none
        if bad:
            raise _not_finite(job.source, bad, values.numel())
    return _with_whole_shape(new, job, last)


def _from_plain(rows: Tensor, options: Options, job: Job, last: bool) -> Stored:
    if not _is_finite(rows):
        raise _not_finite(job.source, int((~rows.isfinite()).sum()), rows.numel())
    if job.packed:
        stem = job.name.removesuffix("weight")
        packed = pack(rows, options.format, job.dtype)
        return _with_whole_shape({stem + suffix: part for suffix, part in packed.items()}, job, last)
    values = for_export(rows, options.shift_biases) if job.rule == "bias shifted" else rows
    cast = values.to(job.dtype)
    if cast is not values and not _is_finite(cast):
        largest, possible = float(values.abs().max()), torch.finfo(job.dtype).max
        raise UserError(
            f"{job.name} does not fit {name_of(job.dtype)}",
            got=f"values up to {largest:,.6g}; the largest possible is {possible:,.6g}",
            do="choose bfloat16 or float32",
        )
    if values.any() and not cast.any():
        raise UserError(
            f"{job.name} does not fit {name_of(job.dtype)}",
            got=f"values of {float(values.abs().max()):.3g} at most, which all become zero",
            do="choose bfloat16 or float32",
        )
    return {job.name: cast}


def _with_whole_shape(new: Stored, job: Job, last: bool) -> Stored:
    """Packed integers tell the whole matrix's shape, once, and not the block's."""
    name = job.name + "_shape"
    if name in new:
        del new[name]
        if last:
            new[name] = torch.tensor(job.tensor.shape)
    return new


def _is_finite(values: Tensor) -> bool:
    least, most = values.aminmax()  # NaN and infinity come through; one pass, no scratch memory
    return bool(least.isfinite() and most.isfinite())


def _not_finite(name: str, bad: int, count: int) -> UserError:
    return UserError(
        f"{name} holds numbers that are not finite",
        got=f"{bad:,} of {count:,} in one block are NaN or infinite",
        why="a single one of them spoils every output",
        do="download the checkpoint again, or use an earlier one",
    )
