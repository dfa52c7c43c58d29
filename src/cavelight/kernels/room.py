"""Memory in huge pages: what is read again and again from end to end is found sooner there than in many small ones."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 2**23  # bytes of a tensor from which huge pages, of 2 MB, are worth asking for


def in_huge_pages(memory: mmap.mmap) -> mmap.mmap:
    """Where the system has them; of a file, for what is not in memory yet."""
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """As torch.zeros, RuntimeError included; a large one asks for huge pages, and takes memory where it is written."""
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE and torch.device(device or "cpu").type == "cpu":
        with suppress(OSError, OverflowError, AttributeError):  # no such memory, which torch tells; another system
            # Private: what is shared lies in small pages, and a process that forks would hand it on.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(in_huge_pages(memory), dtype=dtype).view(*shape)
    return torch.zeros(shape, dtype=dtype, device=device)
