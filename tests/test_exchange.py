"""Checkpoints between Cavelight and transformers, in both directions, MTP included.

Letters: T tokens, V vocabulary, D hidden size.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
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
from cavelight.weights.files import INDEX
from cavelight.weights.names import hf_tensors, is_mtp
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny

CLOSE = 1e-4
WITH_MTP = tiny(num_nextn_predict_layers=1)


def filled(config: ModelConfig) -> Transformer:
    return our_model(config, random_weights(config))


@torch.no_grad()
def our_logits(model: Transformer, tokens_T: list[int]) -> Tensor:
    return model.logits(torch.tensor(tokens_T))


@torch.no_grad()
def their_logits(model: torch.nn.Module, tokens_T: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens_T]), use_cache=False).logits[0]
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "config",
    [tiny(n_group=4, topk_group=2), WITH_MTP, tiny(q_lora_rank=None, num_nextn_predict_layers=2), tiny(V2)],
    ids=["V3", "V3 with MTP", "two MTP modules, no query compression", "V2"],
)
@pytest.mark.parametrize("shard_bytes", [5_000, 2**30], ids=["shards", "one file"])
def test_transformers_opens_an_export(tmp_path: Path, config: ModelConfig, shard_bytes: int) -> None:
    """Nothing missing, nothing unexpected but the MTP layers, the same logits."""
    model, tokens = filled(config), some_tokens(config, 40)
    write_checkpoint(model, tmp_path / "export", shard_bytes=shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    unexpected = info.pop("unexpected_keys")
    assert not any(info.values())
    assert all(is_mtp(name, config) for name in unexpected)
    assert bool(unexpected) == bool(config.num_nextn_predict_layers)
    assert distance(our_logits(model, tokens), their_logits(theirs, tokens)) <= CLOSE


@torch.no_grad()
def test_transformers_drafts_with_exported_mtp_modules(tmp_path: Path) -> None:
    """Its MTP reader takes our layers past the last by name, and both chains give the same logits."""
    config = tiny(num_nextn_predict_layers=2)
    model, tokens_T = filled(config), torch.tensor(some_tokens(config, 20))
    write_checkpoint(model, tmp_path / "export", shard_bytes=5_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    theirs._keys_to_ignore_on_load_unexpected = {r"model\.layers\.[23]\."}  # by default it looks for V3's layer 61
    predictors = MtpModel.from_pretrained(theirs)
    positions_T = torch.arange(20)
    hidden_TD, _ = model(tokens_T, positions_T, PackedAttend([20]), GroupedDispatch())
    their_hidden = theirs.model(tokens_T[None], use_cache=False).last_hidden_state
    for depth in (0, 1):
        left = 19 - depth
        next_T, at_T = tokens_T[depth + 1 :], positions_T[:left]
        hidden_TD, _ = model.draft(depth, hidden_TD[:left], next_T, at_T, PackedAttend([left]), GroupedDispatch())
        their_hidden = predictors.forward_layer(depth, their_hidden[:, :left], at_T[None], None, input_ids=next_T[None])
        assert distance(model.draft_head(depth, hidden_TD), theirs.lm_head(their_hidden)[0]) <= CLOSE


def of_transformers(config: ModelConfig) -> DeepseekV2ForCausalLM | DeepseekV3ForCausalLM:
    """transformers' own random model of our tiny configuration, with biases that matter."""
    torch.manual_seed(0)
    v2 = config.model_type == "deepseek_v2"
    kind, build = (DeepseekV2Config, DeepseekV2ForCausalLM) if v2 else (DeepseekV3Config, DeepseekV3ForCausalLM)
    model = build(kind(**config.to_hf())).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "layernorm.weight")):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "config", [tiny(), tiny(q_lora_rank=None), tiny(V2)], ids=["V3", "V3 without query compression", "V2 greedy"]
)
@pytest.mark.parametrize("shard_size", ["10KB", "5GB"])
def test_what_transformers_saves_is_read(tmp_path: Path, config: ModelConfig, shard_size: str) -> None:
    theirs, tokens = of_transformers(config), some_tokens(config, 40)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "10KB")
    ours = read_checkpoint(tmp_path)
    assert distance(our_logits(ours, tokens), their_logits(theirs, tokens)) <= CLOSE


def test_what_transformers_saves_in_bfloat16_is_read(tmp_path: Path) -> None:
    theirs = of_transformers(tiny()).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours, tensors = read_checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    assert ours.lm_head.weight.dtype == torch.bfloat16
    packed = {tensor.name: tensor.pack(ours.state_dict()) for tensor in hf_tensors(ours.config)}
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[name], tensors[name].to(packed[name].dtype)) for name in tensors)


def test_transformers_announces_an_mtp_module_that_it_does_not_save(tmp_path: Path) -> None:
    """It drops the module of a checkpoint, and its configuration says there is one all the same."""
    write_checkpoint(filled(WITH_MTP), tmp_path / "with")
    AutoModelForCausalLM.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match=r"announces MTP modules .*transformers for one drops them.*without_mtp=True"):
        read_checkpoint(tmp_path / "without")
    read = read_checkpoint(tmp_path / "without", without_mtp=True)
    tokens = some_tokens(WITH_MTP, 40)
    assert (read.config.num_nextn_predict_layers, len(read.mtp)) == (0, 0)
    assert torch.equal(our_logits(read, tokens), our_logits(filled(WITH_MTP), tokens))
