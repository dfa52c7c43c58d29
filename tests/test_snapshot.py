"""Checkpoint folders: our own round trip, transformers in both directions, and folders that must be refused.

Letters: T tokens, V vocabulary.
"""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.modeling_layers import MtpModel

from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.weights import files
from cavelight.weights.names import hf_tensors, is_mtp
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny

CLOSE = 1e-4
WITH_MTP = tiny(num_nextn_predict_layers=1)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def filled(config: ModelConfig, seed: int = 0) -> Transformer:
    return our_model(config, random_weights(config, seed))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(a: Transformer, b: Transformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


@torch.no_grad()
def our_logits(model: Transformer, tokens_T: list[int]) -> Tensor:
    return model.logits(torch.tensor(tokens_T))


@torch.no_grad()
def their_logits(model: torch.nn.Module, tokens_T: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens_T]), use_cache=False).logits[0]
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with one MTP module, in one file."""
    write_checkpoint(filled(WITH_MTP), tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / files.SINGLE)
    change(tensors)
    save_file(tensors, folder / files.SINGLE)


# Our own round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [5_000, 2**30])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    model = filled(tiny(num_nextn_predict_layers=2, extra_key_of_no_one=None) if False else tiny(num_nextn_predict_layers=2))
    model = model.to(dtype)
    write_checkpoint(model, tmp_path / "a", shard_bytes=shard_bytes)
    read = read_checkpoint(tmp_path / "a")
    expected = model.state_dict()
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) > 10) == (shard_bytes == 5_000)
    write_checkpoint(read, tmp_path / "b", shard_bytes=shard_bytes)
    assert {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()
    }
