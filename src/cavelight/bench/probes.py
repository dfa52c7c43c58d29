"""What the machine can do, measured in the same run as the model: the shares that follow mean something anywhere."""

import time
from dataclasses import dataclass

import torch

from cavelight.train.metrics import matmul_peak

BUFFER = 1 << 30  # bytes that are read, more than caches hold
SECONDS = 1.0


@dataclass(frozen=True)
class Probes:
    """read: bytes a second, by all of torch's threads. Products: operations a second."""

    read: float
    float32: float
    bfloat16: float

    @property
    def peak(self) -> float:
        """Of the faster of the two kinds of numbers."""
        return max(self.float32, self.bfloat16)


def probe() -> Probes:
    return Probes(read_bandwidth(), matmul_peak(torch.float32), matmul_peak(torch.bfloat16))


def read_bandwidth(size: int = BUFFER, seconds: float = SECONDS) -> float:
    """The fastest of several sums over a buffer."""
    buffer, fastest = torch.ones(size // 4), float("inf")
    buffer.sum()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or fastest == float("inf"):
        began = time.perf_counter()
        buffer.sum()
        fastest = min(fastest, time.perf_counter() - began)
    return size / fastest
