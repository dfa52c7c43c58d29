"""Checkpoints to look inside: of every family, in every format, with something planted in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.reference.random_weights import random_weights
from tests.reference.tiny import V2, tiny
from torch import Tensor

from cavelight.see.measure import Measures, measure
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import PACKED_ROLES, PLAIN, Format
from cavelight.weights.files import Entry, write_safetensors
from cavelight.weights.names import hf_tensors
from cavelight.weights.quant import pack
from cavelight.weights.stored import Checkpoint

Weights = dict[str, Tensor]
FULL = tiny(num_hidden_layers=3, num_nextn_predict_layers=1)
FAMILIES = {
    "V3 with MTP": FULL,
    "V2": tiny(V2),
    "V3 without MTP": tiny(),
    "Moonlight": tiny(q_lora_rank=None, n_shared_experts=2),
    "dense": tiny(n_routed_experts=None, first_k_dense_replace=2),
    "one layer": tiny(num_hidden_layers=1, first_k_dense_replace=0, n_shared_experts=None),
    "three modules, every second layer": tiny(num_hidden_layers=4, num_nextn_predict_layers=3, moe_layer_freq=2),
}


def written(
    folder: Path, config: ModelConfig, weights: Weights, form: Format = PLAIN, dtype: torch.dtype | None = None
) -> Checkpoint:
    """The weights as a checkpoint, packed where the format packs."""
    roles = {tensor.name: tensor.parts[0].role for tensor in hf_tensors(config)}
    stored: Weights = {}
    for name, tensor in weights.items():
        tensor = tensor.to(dtype) if dtype and roles[name] != "routing_bias" else tensor
        if form.kind != "plain" and roles[name] in PACKED_ROLES:
            stem = name.removesuffix(".weight")
            stored |= {f"{stem}.{suffix}": part for suffix, part in pack(tensor, form).items()}
        else:
            stored[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()]
    write_safetensors(folder, entries, stored.__getitem__)
    quantization = form.quantization_config()
    raw = config.to_hf() | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(raw))
    return Checkpoint(folder)


def planted(folder: Path, change: Callable[[Weights], None] = lambda weights: None, **changes: Any) -> Measures:
    """What is measured of FULL with random weights, some of them changed."""
    config = FULL.replace(**changes)
    weights = random_weights(config)
    change(weights)
    return measure(written(folder, config, weights))


def mismatched(folder: Path, config: ModelConfig, weights: Weights) -> Checkpoint:
    """Weights under a configuration that need not be theirs."""
    folder.mkdir()
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
    write_safetensors(folder, entries, weights.__getitem__)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return Checkpoint(folder)
