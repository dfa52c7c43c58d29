"""One pass over all weights, in blocks of rows: of each tensor a handful of numbers, which all checks then share.

Sums run in the order of the file, so equal tensors have equal summaries to the bit.

Letters: I rows, J columns of a matrix; vectors are one column.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.events import Event, Phase
from cavelight.weights.stored import Checkpoint

WITH_ROWS = ("q_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "mlp.gate.weight")
BLOCK_BYTES = 2**22  # in float32: small enough to be looked at three times before it leaves the processor's cache


@dataclass(frozen=True, slots=True)
class Summary:
    """What is kept of one tensor; all numbers but `bad` are of its finite values.

    bad: NaN and infinities. moments: sums of x and x^2. squares_I: of each row the sum of x^2, where a check wants
    rows; sums_I its sum of x. squares_J: of each column, where a check wants columns. values: a vector, whole.
    """

    name: str
    shape: tuple[int, ...]
    bad: int
    least: float
    most: float
    moments: tuple[float, float]
    squares_I: Tensor | None = None
    sums_I: Tensor | None = None
    squares_J: Tensor | None = None
    values: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.moments[1] / max(1, self.size - self.bad))

    @property
    def is_constant(self) -> bool:
        """All elements equal."""
        return self.least == self.most and not self.bad

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for equal tensors, and hardly ever for others."""
        return (self.shape, self.bad, self.least, self.most, *self.moments)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Summaries by plain name, medians of the scales of packed matrices, and the tensors that could not be read."""

    tensors: Mapping[str, Summary]
    scales: Mapping[str, float]
    refused: Mapping[str, UserError]

    def fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> "Statistics":
        """The same without tensors whose shape is another than they should have, or that should not be there."""
        kept = {name: summary for name, summary in self.tensors.items() if shapes.get(name) == summary.shape}
        return replace(self, tensors=kept)

    def ending(self, *suffixes: str) -> Iterator[Summary]:
        """Summaries of the tensors whose name ends so, in the order of the files."""
        return (summary for name, summary in self.tensors.items() if name.endswith(suffixes))


def gather(checkpoint: Checkpoint, on_event: Callable[[Event], None] = lambda event: None) -> Statistics:
    """Read every tensor once and summarise it. Tensors that cannot be read are named, the others gathered."""
    entries = checkpoint.files.entries
    total = sum(entry.nbytes for entry in entries.values())
    done = 0
    tensors: dict[str, Summary] = {}
    scales: dict[str, float] = {}
    refused: dict[str, UserError] = {}
    for name in checkpoint.shapes:
        parts = checkpoint.parts(name) if checkpoint.is_packed(name) else {"": name}
        try:
            if "weight_scale_inv" in parts:
                scales[name] = float(checkpoint.files.tensor(parts["weight_scale_inv"]).float().median())
            tensors[name] = summarise(name, checkpoint)
        except UserError as refusal:
            refused[name] = refusal.with_traceback(None)  # whose frames hold the blocks that were read
        done += sum(entries[part].nbytes for part in parts.values())
        on_event(Phase("reading weights", done, total, "B"))
    return Statistics(tensors, scales, refused)


def summarise(name: str, checkpoint: Checkpoint) -> Summary:
    """One tensor's summary, read block by block."""
    shape = checkpoint.shapes[name]
    bad, least, most = 0, math.inf, -math.inf
    sums = torch.zeros(2, dtype=torch.float64)
    rows: list[tuple[Tensor, Tensor]] = []
    squares_J: Tensor | None = None
    values: list[Tensor] = []
    for _, block in checkpoint.blocks(name, limit_bytes=BLOCK_BYTES, dtype=torch.float32):
        block_IJ = block.reshape(len(block), -1) if block.ndim else block.reshape(1, 1)
        if not block_IJ.numel():
            continue
        low, high = (float(end) for end in block_IJ.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            is_bad = ~block_IJ.isfinite()
            bad += int(is_bad.sum())
            block_IJ = block_IJ.masked_fill(is_bad, 0.0)
            low, high = (float(end) for end in block_IJ.aminmax())
        least, most = min(least, low), max(most, high)
        sums_I = block_IJ.sum(1).double()
        squares_I = torch.linalg.vector_norm(block_IJ, dim=1).double().square()
        sums += torch.stack([sums_I.sum(), squares_I.sum()])
        if _wants_columns(name):
            columns_J = torch.linalg.vector_norm(block_IJ, dim=0).double().square()
            squares_J = columns_J if squares_J is None else squares_J + columns_J
        if _wants_rows(name):
            rows.append((squares_I, sums_I))
        if len(shape) == 1:
            values.append(block_IJ.flatten().clone())
    return Summary(
        name,
        shape,
        bad,
        least if least <= most else 0.0,
        most if least <= most else 0.0,
        (float(sums[0]), float(sums[1])),
        torch.cat([squares for squares, _ in rows]) if rows else None,
        torch.cat([sums_of_rows for _, sums_of_rows in rows]) if rows else None,
        squares_J,
        torch.cat(values) if values else None,
    )


def _wants_rows(name: str) -> bool:
    return name.endswith(WITH_ROWS)


def _wants_columns(name: str) -> bool:
    return name.endswith("eh_proj.weight")
