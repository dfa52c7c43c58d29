"""Every released layout at tiny size: transformers saves, we convert there and back, other readers open what we wrote.

Letters: T tokens, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, INT4, INT8, PACKED_ROLES, PLAIN, Format
from cavelight.spec.presets import preset
from cavelight.weights.convert import convert
from cavelight.weights.names import hf_tensors, is_mtp
from cavelight.weights.snapshot import read_checkpoint
from cavelight.weights.stored import Checkpoint

from .reference.random_weights import random_weights
from .reference.tiny import some_tokens

CLOSE = 1e-4
# transformers reads fp8 right where blocks of 128 fit, or where one is enough; ragged ones have a test of their own.
TINY = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A released layout: its preset, the dtype and shards in which transformers saves it, and its sizes."""

    preset: str
    dtype: torch.dtype
    shard_size: str
    mtp: int = 0
    groups: tuple[int, int] = (1, 1)
    model_type: str = ""

    @property
    def config(self) -> ModelConfig:
        base = preset(self.preset)
        rank = None if base.q_lora_rank is None else 24
        groups = {"n_group": self.groups[0], "topk_group": self.groups[1]}
        config = base.replace(**TINY, **groups, q_lora_rank=rank, num_nextn_predict_layers=self.mtp)
        return config.replace(torch_dtype=str(self.dtype).removeprefix("torch."))


FAMILIES = {
    "V2": Family("deepseek-v2", torch.float32, "50KB", groups=(2, 1)),
    "V2-Lite": Family("deepseek-v2-lite", torch.bfloat16, "5GB"),
    "V3": Family("deepseek-v3", torch.bfloat16, "50KB", mtp=1, groups=(2, 1)),
    "Moonlight": Family("moonlight-16b-a3b", torch.float16, "5GB"),
    "Kimi-K2": Family("kimi-k2", torch.bfloat16, "50KB", model_type="kimi_k2"),
}
V3 = FAMILIES["V3"]


def their_config(raw: dict[str, Any], config: ModelConfig) -> Any:
    """transformers' configuration; it knows Kimi-K2 as a DeepSeek-V3 only."""
    kind = DeepseekV2Config if config.model_type == "deepseek_v2" else DeepseekV3Config
    return kind(**raw | {"model_type": config.model_type})


def model_class(config: ModelConfig) -> Any:
    return DeepseekV2ForCausalLM if config.model_type == "deepseek_v2" else DeepseekV3ForCausalLM


def saved(family: Family, folder: Path) -> dict[str, Tensor]:
    """What transformers saves of a random model; MTP, which it leaves out, is laid beside. Returns all tensors."""
    config = family.config
    model = model_class(config)(their_config(config.to_hf(), config)).to(family.dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.normal_(mean=float("norm" in name), std=0.1, generator=generator)
    model.save_pretrained(folder, max_shard_size=family.shard_size)
    if family.model_type:
        change_config(folder, model_type=family.model_type)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if family.mtp:
        beside = {n: t.to(family.dtype) for n, t in random_weights(config).items() if is_mtp(n, config)}
        for name, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            beside[f"model.layers.{config.num_hidden_layers}.{name}.weight"] = tensors[f"{original}.weight"].clone()
        add(folder, beside)
    return tensors | (beside if family.mtp else {})


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def add(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One more shard."""
    save_file(tensors, folder / "model-mtp.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def opened(folder: Path, config: ModelConfig, **options: Any) -> torch.nn.Module:
    """transformers' model of a folder; nothing may be missing, nothing left but the MTP module."""
    raw = json.loads((folder / "config.json").read_text())
    theirs = their_config(raw, config)
    model, info = model_class(config).from_pretrained(folder, config=theirs, output_loading_info=True, **options)
    unexpected = info.pop("unexpected_keys")
    assert not any(info.values()) and all(is_mtp(name.removesuffix("_scale_inv"), config) for name in unexpected)
    return model.eval()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def distance(ours: Transformer, theirs: torch.nn.Module, tokens_T: list[int]) -> float:
    """The largest difference between the logits of our model and theirs."""
    logits_TV = theirs(torch.tensor([tokens_T]), use_cache=False).logits[0]
    return float((ours.logits(torch.tensor(tokens_T)) - logits_TV).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_saves_and_opens_what_we_make_of_it(tmp_path: Path, name: str) -> None:
    """Plain weights come through to the bit, and our model computes what theirs does."""
    family = FAMILIES[name]
    config, tensors = family.config, saved(family, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "hf", PLAIN, shift_biases=False, shard_bytes=100_000)
    ours = Checkpoint(tmp_path / "hf")
    biases = {n: t.float() for n, t in tensors.items() if n.endswith("correction_bias")}
    assert_same({n: ours.tensor(n) for n in ours.shapes}, tensors | biases)
    assert ours.raw["model_type"] == config.model_type  # a name of its own needs code that did not come along
    before, after = (opened(tmp_path / folder, config, dtype=torch.float32) for folder in ("saved", "hf"))
    assert_same(dict(before.state_dict()), dict(after.state_dict()))
    assert distance(read_checkpoint(tmp_path / "hf", torch.float32), after, some_tokens(config, 40)) <= CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_through_each_packed_format_and_back(tmp_path: Path, name: str) -> None:
    """What comes back is what the packed checkpoint stands for, to the bit, and transformers opens it."""
    family = FAMILIES[name]
    config = family.config
    saved(family, tmp_path / "saved")
    for to, format in (("fp8", FP8), ("int8", INT8), ("int4", INT4)):
        report = convert(tmp_path / "saved", tmp_path / to, format)
        convert(tmp_path / to, tmp_path / f"{to}-hf", PLAIN)
        packed, back = Checkpoint(tmp_path / to), Checkpoint(tmp_path / f"{to}-hf")
        assert_same({n: packed.tensor(n) for n in packed.shapes}, {n: back.tensor(n) for n in back.shapes})
        assert {t.name for t in hf_tensors(config) if packed.is_packed(t.name)} == {
            t.name for t in hf_tensors(config) if t.parts[0].role in PACKED_ROLES
        }
        assert max(report.largest_error.values()) < {"fp8": 0.07, "int8": 0.005, "int4": 0.25}[to]
        opened(tmp_path / f"{to}-hf", config)


@pytest.mark.parametrize("format", [FP8, Format("fp8", ue8m0=True)], ids=["V3-0324, R1", "V3.1"])
@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_transformers_dequantises_our_fp8_to_the_same_bits(tmp_path: Path, name: str, format: Format) -> None:
    family = FAMILIES[name]
    saved(family, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "fp8", format, shard_bytes=1)  # scales and values in different files
    convert(tmp_path / "fp8", tmp_path / "hf", PLAIN)
    theirs = opened(
        tmp_path / "fp8", family.config, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = opened(tmp_path / "hf", family.config, dtype=torch.bfloat16)
    assert_same(dict(theirs.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_what_transformers_quantises_is_read_copied_and_unpacked(tmp_path: Path, scale_fmt: str) -> None:
    """Its quantiser leaves matrices that are no whole blocks plain; so is the MTP module here, as in some releases."""
    config, tensors = V3.config, saved(V3, tmp_path / "saved")
    said = SimpleNamespace(scale_fmt=scale_fmt, weight_block_size=[128, 128])
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=said))
    matrices = {t.name for t in hf_tensors(config) if t.parts[0].role in PACKED_ROLES and not is_mtp(t.name, config)}
    stored = {n: t for n, t in tensors.items() if n not in matrices}
    for name in matrices:
        stored |= quantiser.convert({name: tensors[name]})
    (tmp_path / "theirs").mkdir()
    save_file(stored, tmp_path / "theirs/model.safetensors")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": scale_fmt}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config.to_hf() | {"quantization_config": method}))
    theirs = Checkpoint(tmp_path / "theirs")
    packed = {name for name in theirs.shapes if theirs.is_packed(name)}
    assert packed and packed < matrices

    copied = convert(tmp_path / "theirs", tmp_path / "fp8", FP8, shift_biases=False)
    ours = Checkpoint(tmp_path / "fp8")
    assert copied.rules["quantised"] == sum(ours.is_packed(name) for name in ours.shapes) - len(packed)
    assert ours.format.ue8m0 == (scale_fmt == "ue8m0")
    for name in packed:
        assert torch.equal(ours.files.tensor(name).view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(ours.files.tensor(f"{name}_scale_inv"), stored[f"{name}_scale_inv"].float())
    convert(tmp_path / "theirs", tmp_path / "hf", PLAIN, shift_biases=False)
    back = Checkpoint(tmp_path / "hf")
    for name in packed:
        scale = stored[f"{name}_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(back.tensor(name), (stored[name].float() * scale).bfloat16())
    opened(tmp_path / "hf", config)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_dequantises_ragged_blocks_to_the_same_bits(tmp_path: Path) -> None:
    config = V3.config.replace(hidden_size=160, intermediate_size=200, num_attention_heads=6)
    (tmp_path / "source").mkdir()
    save_file(random_weights(config), tmp_path / "source/model.safetensors")
    (tmp_path / "source/config.json").write_text(json.dumps(config.to_hf()))
    convert(tmp_path / "source", tmp_path / "fp8", FP8, shard_bytes=20_000)
    convert(tmp_path / "fp8", tmp_path / "hf", PLAIN, dtype=torch.float32)
    ours = Checkpoint(tmp_path / "hf")
    read = {name: torch.empty(shape) for name, shape in ours.shapes.items()}
    dcp.load(read, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path / "fp8")), no_dist=True)
    assert_same(read, {name: ours.tensor(name) for name in ours.shapes})
