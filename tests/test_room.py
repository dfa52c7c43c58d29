"""Memory for large tensors: in huge pages, of this process alone, zero; and as torch gives it where that cannot be."""

import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cavelight.kernels.room import LARGE, zeros
from cavelight.run.cache import LatentCache
from cavelight.run.paged import PagedCache
from cavelight.weights.files import empty

from .reference.tiny import tiny

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = SWITCH.is_file() and "[never]" not in SWITCH.read_text()


def said_of(tensor: Tensor) -> str:
    """What the system says of the range of memory in which a tensor begins."""
    for range_ in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(number, 16) for number in range_.split(maxsplit=1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return range_
    raise AssertionError("it lies nowhere")


def huge_bytes(tensor: Tensor) -> int:
    (kilobytes,) = re.findall(r"AnonHugePages: +(\d+) kB", said_of(tensor))
    return int(kilobytes) << 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_it_is_zero_and_of_its_own(dtype: torch.dtype) -> None:
    for size in (0, 3, LARGE - dtype.itemsize, LARGE, 3 * LARGE):
        tensor = zeros((1, size // dtype.itemsize), dtype)
        assert tensor.shape == (1, size // dtype.itemsize) and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(1)
        assert tensor.sum(dtype=torch.float64) == tensor.numel()


@pytest.mark.skipif(not HUGE, reason="this system gives no huge pages")
def test_large_ones_lie_in_huge_pages() -> None:
    config = tiny(kv_lora_rank=512, qk_rope_head_dim=64, max_position_embeddings=2**16)
    kept, paged = LatentCache(config, 16, torch.float32), PagedCache(config, 1024, 64, torch.float32)
    kept.reserve(2**16)
    weights = empty((4 * LARGE,), torch.int8, "these")
    for tensor in (zeros((4 * LARGE,), torch.int8), kept.rows_MSW, paged.rows_MZW, weights):
        before = huge_bytes(tensor)  # of neighbours, which the system counts with it
        tensor.fill_(1)
        assert huge_bytes(tensor) - before > tensor.nbytes / 2  # and only what is written is there


def test_what_is_written_after_a_fork_is_not_shared() -> None:
    tensor = zeros((LARGE,), torch.int8)
    child = os.fork()
    if child == 0:
        tensor[:] = 1
        os._exit(int(tensor[-1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not tensor.any()


@pytest.mark.parametrize("system", ["that refuses", "that knows no huge pages", "that has nothing private"])
def test_other_systems(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    if system == "that refuses":
        monkeypatch.setattr(mmap, "mmap", refuse)
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE" if "huge" in system else "MAP_PRIVATE", raising=False)
    tensor = zeros((LARGE,), torch.int8)
    assert tensor.shape == (LARGE,) and not tensor.any()


def test_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        zeros((2**60,), torch.float32)


def test_other_devices() -> None:
    assert zeros((LARGE,), torch.int8, torch.device("meta")).is_meta
