"""What a run writes down while it runs: metrics.jsonl, TensorBoard, and how fast this machine could multiply."""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cavelight.disk import clear_disk_errors
from cavelight.errors import UserError
from cavelight.spec.events import Evaluated, Event, Note, Sampled, Step

# What a step's line says of the clock. All else is the same whenever and however often a run was stopped.
OF_THE_CLOCK = frozenset({"seconds", "seconds_left", "tokens_per_second", "peak_share"})
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsLog:
    """metrics.jsonl: a line each step, look at held-out text, sample, spike. Each line is written whole.

    Begins by cutting the file to its first `size` bytes, which is where the save that a run goes on from had it. While
    the disk is full, lines wait in memory.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with clear_disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        kept = os.pread(self._file, size, 0)
        self._written = kept.rfind(b"\n") + 1
        self.complete = self._written == size  # else somebody shortened it
        self._waiting = b""
        os.truncate(self._file, self._written)

    @property
    def size(self) -> int:
        """Bytes of all lines so far, those that wait among them."""
        return self._written + len(self._waiting)

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Add a line. JSON knows no numbers that are not finite: they become null."""
        self._waiting += (json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n").encode()
        self._write_waiting()

    def flush(self) -> None:
        """Until the disk has every line. UserError if it is full."""
        self._write_waiting()
        with clear_disk_errors(self.path):
            if self._waiting:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)

    def cut(self, size: int) -> None:
        """Take back every line after the first `size` bytes."""
        self._waiting = self._waiting[: max(0, size - self._written)]
        self._written = min(self._written, size)
        os.truncate(self._file, self._written)

    def close(self) -> None:
        os.close(self._file)

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                count = os.write(self._file, self._waiting)
                self._written, self._waiting = self._written + count, self._waiting[count:]
        except OSError as error:
            if error.errno not in FULL:
                raise
            # Nobody is to see half a line, now or after a kill.
            whole = os.pread(self._file, self._written, 0).rfind(b"\n") + 1
            self._waiting = os.pread(self._file, self._written - whole, whole) + self._waiting
            os.truncate(self._file, whole)
            self._written = whole


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def board_writer() -> Any:
    """PyTorch's writer for TensorBoard, which is installed apart: UserError where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, since the package is optional
    except ImportError as error:
        raise UserError(
            "TensorBoard is not installed", got="train.tensorboard = true", do="pip install tensorboard"
        ) from error
    return SummaryWriter


class Board:
    """The log's values for TensorBoard.

    step: what a killed run wrote after this step is hidden, since it comes again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        writer = board_writer()
        with clear_disk_errors(folder):
            self._writer = writer(folder, purge_step=step + 1)

    def step(self, event: Step) -> None:
        scalars = {"loss/next token": event.loss, "loss/balance": event.balance_loss}
        scalars |= {f"loss/MTP {depth}": loss for depth, loss in enumerate(event.mtp_losses, 1)}
        scalars |= {"optimizer/gradient norm": event.grad_norm, "optimizer/learning rate": event.learning_rate}
        scalars |= {"speed/tokens per second": event.tokens_per_second, "speed/share of peak": event.peak_share}
        scalars |= {f"MaxVio/{layer}": vio for layer, vio in enumerate(event.max_vio, 1)}
        scalars |= {f"bias range/{layer}": width for layer, width in enumerate(event.bias_range, 1)}
        scalars |= {"data/tokens": event.tokens, "data/rows per step": event.rows}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, event.step)

    def evaluated(self, event: Evaluated, average: float | None) -> None:
        name = "all of it" if event.whole else "a sample"
        self._writer.add_scalar(f"bits per byte/{name}", event.bits_per_byte, event.step)
        if average is not None:
            self._writer.add_scalar(f"bits per byte/{name}, averaged weights", average, event.step)

    def sampled(self, event: Sampled) -> None:
        self._writer.add_text("sample", f"{event.prompt}**{event.text}**", event.step)
        for depth, share in enumerate(event.acceptance, 1):
            self._writer.add_scalar(f"acceptance/MTP {depth}", share, event.step)

    def close(self) -> None:
        self._writer.close()


class Record:
    """All that a run says of itself: each thing once to the log, to TensorBoard where that is wanted, to the screen."""

    def __init__(
        self, log: MetricsLog, board: Callable[[int], Board] | None, on_event: Callable[[Event], None], step: int
    ) -> None:
        self.log, self.on_event = log, on_event
        self._new_board = board
        self._board = board(step) if board else None
        self._spikes: list[tuple[int, dict[str, Any]]] = []  # where in the log each one's line begins

    def step(self, event: Step, **more: Any) -> None:
        self.log.write("step", asdict(event) | more)
        self._show(lambda board: board.step(event))
        self.on_event(event)

    def evaluated(self, event: Evaluated, average: float | None) -> None:
        """`average`: the same of the weights' moving average, where there is one."""
        self.log.write("evaluated", asdict(event) | ({} if average is None else {"average_bits_per_byte": average}))
        self._show(lambda board: board.evaluated(event, average))
        self.on_event(event)

    def sampled(self, event: Sampled) -> None:
        self.log.write("sampled", asdict(event))
        self._show(lambda board: board.sampled(event))
        self.on_event(event)

    def spike(self, line: dict[str, Any]) -> None:
        self._spikes.append((self.log.size, line))
        self.log.write("spike", line)

    def go_back(self, size: int, step: int) -> None:
        """To after `step`, when the log had `size` bytes: its later lines go, but for those of spikes."""
        again = [line for at, line in self._spikes if at >= size]
        self._spikes = [(at, line) for at, line in self._spikes if at < size]
        self.log.cut(size)
        for line in again:
            self.spike(line)
        self._show(Board.close)
        if self._board and self._new_board:
            self._board = self._new_board(step)

    def close(self) -> None:
        self.log.close()
        self._show(Board.close)

    def _show(self, show: Callable[[Board], None]) -> None:
        if self._board is None:
            return
        try:
            show(self._board)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._board = None  # its writer is of no more use after an error
            self.on_event(Note("The disk is full: TensorBoard hears no more until the run is continued; the log does"))


def matmul_peak(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Floating-point operations a second: of the fastest square product within `seconds`, on all of torch's cores."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    fastest, ends = float("inf"), time.perf_counter() + seconds
    left @ right  # the first one prepares the kernel
    while True:
        began = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - began)
        if time.perf_counter() > ends:
            return 2 * size**3 / fastest
