"""Checkpoints written in a packed format, tensor by tensor, for tests of what reads them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import PACKED_ROLES, Format
from cavelight.weights.files import Entry, write_safetensors
from cavelight.weights.names import hf_tensors
from cavelight.weights.quant import pack

Tensors = dict[str, Tensor]


def packable(config: ModelConfig) -> set[str]:
    """Names of the matrices that our own conversion packs."""
    return {t.name for t in hf_tensors(config) if t.parts[0].role in PACKED_ROLES and not t.is_copy}


def stored_as(
    weights: Mapping[str, Tensor], format: Format, chosen: Callable[[str], bool], dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """The tensors of a checkpoint with the chosen matrices packed and all others plain."""
    stored: Tensors = {}
    for name, tensor in weights.items():
        if not chosen(name):
            stored[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
            continue
        stem = name.removesuffix("weight")
        stored |= {f"{stem}{suffix}": part for suffix, part in pack(tensor, format, dtype).items()}
    return stored


def write_folder(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], format: Format, shard_bytes: int = 2**30
) -> Path:
    """A checkpoint folder of tensors as they are, with the format in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    said = format.quantization_config(["lm_head"])
    raw = config.to_hf() | {"torch_dtype": "bfloat16"} | ({"quantization_config": said} if said else {})
    (folder / "config.json").write_text(json.dumps(raw))
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder, entries, dict(tensors).__getitem__, shard_bytes)
    return folder


def write_packed(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], format: Format, shard_bytes: int = 2**30
) -> Path:
    """A checkpoint with everything packed that our own conversion packs, the rest bfloat16."""
    return write_folder(folder, config, stored_as(weights, format, packable(config).__contains__), format, shard_bytes)
