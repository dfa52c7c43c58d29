"""Safetensors files to test with: sound ones, and ones with any header at all."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.weights.files import Entry, Safetensors, bytes_of, write_safetensors

# An odd number of 2-byte elements before 4-byte ones: written in this order, the wide tensor would lie askew.
TENSORS = {
    "norm": torch.arange(3).bfloat16(),
    "bias": torch.tensor([0.1, -2.5]),
    "half": torch.tensor([[1.5], [2.5], [-0.0]], dtype=torch.float16),
    "wide": torch.linspace(-1, 1, 12).view(3, 4),
    "last": torch.linspace(-1, 1, 5).bfloat16(),
}


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 2**20) -> None:
    write_safetensors(folder, entries_of(tensors), tensors.__getitem__, shard_bytes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def shard(content: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    header = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(header)) + header + data


def described(start: int, end: int, dtype: str = "F32", shape: tuple[Any, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}


def read_all(folder: Path) -> dict[str, Tensor]:
    checkpoint = Safetensors(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.entries}
