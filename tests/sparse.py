"""Checkpoints of full size that take no room: true headers and index over files that are holes.

A hole reads as zeros and has no blocks on disk, so 688 GB fit anywhere; whatever reads headers alone cannot tell.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, PACKED_ROLES, Format
from cavelight.weights.files import index_of, layout
from cavelight.weights.headers import DTYPES, INDEX, Entry
from cavelight.weights.names import hf_tensors


def stored_entries(config: ModelConfig, form: Format = FP8) -> Iterator[Entry]:
    """Every tensor as a released checkpoint of this shape stores it: matrices packed, the rest bfloat16 or float32."""
    for tensor in hf_tensors(config):
        if tensor.parts[0].role in PACKED_ROLES:
            for stored in form.companions(tensor.name, (tensor.shape[0], tensor.shape[1])):
                yield Entry(stored.name, stored.shape, DTYPES[stored.code])
        else:
            yield Entry(tensor.name, tensor.shape, torch.float32 if tensor.dtype == "float32" else torch.bfloat16)


def write_sparse(folder: Path, config: ModelConfig, shards: int, form: Format = FP8) -> list[Entry]:
    """Write config.json, index and so many shards of holes into a new folder; returns what they hold."""
    folder.mkdir()
    entries = list(stored_entries(config, form))
    files = layout(entries, _shard_bytes(entries, shards))
    assert len(files) == shards
    for shard in files:
        with open(folder / shard.file, "wb") as handle:
            handle.write(shard.header)
            os.ftruncate(handle.fileno(), shard.nbytes)
    index = index_of(files, entries)
    if index is not None:
        (folder / INDEX).write_bytes(index)
    raw = config.to_hf() | {"quantization_config": form.quantization_config()}
    (folder / "config.json").write_text(json.dumps(raw))
    return entries


def _shard_bytes(entries: list[Entry], shards: int) -> int:
    """The size at which filling one shard after another gives that many."""
    limit = sum(entry.nbytes for entry in entries) // shards
    while _count(entries, limit) > shards:
        limit += 2**24
    return limit


def _count(entries: list[Entry], limit: int) -> int:
    count, size = 1, 0
    for entry in entries:
        if size and size + entry.nbytes > limit:
            count, size = count + 1, 0
        size += entry.nbytes
    return count
