"""A small checkpoint to convert, and what tests ask of the result."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cavelight.spec.formats import FP8, INT4, INT8
from cavelight.weights.files import Safetensors

from .reference.random_weights import random_weights
from .reference.tiny import tiny

# Ragged blocks of 128 in both directions, an MTP module, biases of which half are negative.
CONFIG = tiny(
    num_nextn_predict_layers=1, hidden_size=160, intermediate_size=200, n_routed_experts=4, torch_dtype="bfloat16"
)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
DOWN = "model.layers.0.mlp.down_proj.weight"  # [160, 200]
COPY, HEAD_COPY = "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"
FORMATS = {"fp8": FP8, "int8": INT8, "int4": INT4}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """All stored as `dtype`, but for the routing biases."""
    made = random_weights(CONFIG, dtype=dtype)
    return {name: t.float() if name.endswith("correction_bias") else t for name, t in made.items()}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | config))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = Safetensors(folder)
    return {name: files.tensor(name) for name in files.entries}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change(folder: Path, **changed: Tensor) -> None:
    """Tensors whose names have __ for a dot."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name.replace("__", "."): t for name, t in changed.items()}, folder / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def folder_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.converting")


def journal_of(target: Path) -> Path:
    return folder_of(target) / "journal.jsonl"
