"""Checkpoints of full size that take no room: true headers and index over files that are holes.

A hole reads as zeros and has no blocks on disk, so 688 GB fit anywhere; whatever reads headers alone cannot tell.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, PACKED_ROLES, Format
from cavelight.weights.files import Shard, index_of, layout
from cavelight.weights.headers import DTYPES, INDEX, SINGLE, Entry
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
    files = _cut(entries, shards)
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


def _cut(entries: list[Entry], count: int) -> list[Shard]:
    """So many shards filled one after another, as publishers do, who cut between a layer's experts."""
    limit = sum(entry.nbytes for entry in entries) // count
    while len(groups := _filled(entries, limit)) > count:
        limit += 2**24
    assert len(groups) == count
    whole = [layout(group, limit + 2**40)[0] for group in groups]
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    return [replace(shard, file=name) for shard, name in zip(whole, names, strict=True)]


def _filled(entries: list[Entry], limit: int) -> list[list[Entry]]:
    groups, size = list[list[Entry]]([[]]), 0
    for entry in entries:
        if size and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    return groups
