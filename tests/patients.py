"""Checkpoints for the doctor: sound ones that look trained, and the means to break them in one place at a time.

Letters: D hidden size, R qk_rope_head_dim, H heads, C latent.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.doctor.examine import Level, examine
from cavelight.doctor.findings import Finding
from cavelight.spec.config import ModelConfig
from cavelight.weights.files import Entry, write_safetensors

from .reference.random_weights import random_weights
from .reference.tiny import tiny

# Everything at once: query compression, groups, an MTP module, more layers than a guess about rotary pairs needs.
WHOLE = tiny(
    hidden_size=64,
    qk_rope_head_dim=16,
    num_hidden_layers=9,
    first_k_dense_replace=7,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
)


@dataclass
class Patient:
    """A checkpoint before it is written: its config.json, its tensors, and further files by name."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, shard_bytes: int = 2**30) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.raw))
        entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()]
        write_safetensors(folder, entries, self.tensors.__getitem__, shard_bytes)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    def examined(self, folder: Path, level: Level = "weights") -> list[Finding]:
        return examine(self.write(folder), level)


Break = Callable[[Patient], None]


def patient(config: ModelConfig = WHOLE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Patient:
    """A sound checkpoint that looks trained, in the ways that the doctor looks at.

    Biases are of one sign and near each other; both rows of a rotary pair are of one size, each pair of another; the
    columns of eh_proj go with the norms that feed them.
    """
    tensors = {
        name: tensor.clone() if name.endswith("e_score_correction_bias") else tensor.to(dtype, copy=True)
        for name, tensor in _trained_weights(config, seed).items()
    }
    return Patient(config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}, tensors)


@lru_cache
def _trained_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    weights, generator = random_weights(config, seed), torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.5 + 0.05 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("eh_proj.weight"):
            at = name.removesuffix("eh_proj.weight")
            tensor *= torch.cat([weights[f"{at}enorm.weight"], weights[f"{at}hnorm.weight"]]) ** 2
        for rows_RD in rotary_rows(name, tensor, config):
            sizes = torch.randn(config.qk_rope_head_dim // 2, generator=generator).repeat_interleave(2)
            rows_RD *= (sizes / 2).exp()[:, None] / rows_RD.norm(dim=1, keepdim=True)
    return weights


def rotary_rows(name: str, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """Views [R, ...] of the rows of a matrix that rotate: one for keys, one a head for queries."""
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return [tensor[config.kv_lora_rank :]]
    if name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
        heads = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        return list(heads[:, config.qk_nope_head_dim :])
    return []


def in_halves(patient: Patient, *endings: str) -> None:
    """Store rotary rows as other engines have them, evens first, in the matrices that end so."""
    config = ModelConfig.from_hf(patient.raw)
    for name, tensor in patient.tensors.items():
        for rows_RD in rotary_rows(name, tensor, config) if name.endswith(endings) else ():
            rows_RD.copy_(torch.cat([rows_RD[0::2], rows_RD[1::2]]))


def not_passed(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict != "pass"]
