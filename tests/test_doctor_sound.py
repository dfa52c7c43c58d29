"""Sound checkpoints of every family, size, dtype and writer: the doctor has nothing to say against them."""

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from cavelight.data.tokenizer import train_tokenizer
from cavelight.doctor.examine import examine
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.spec.hf import IMPLIED
from cavelight.spec.presets import preset
from cavelight.spec.recipe import Recipe
from cavelight.train.loop import train
from cavelight.train.optim import initialise
from cavelight.weights.convert import convert
from cavelight.weights.snapshot import write_checkpoint

from .packing import packable, stored_as, write_folder
from .patients import WHOLE, not_passed, patient
from .reference.tiny import V2, tiny, yarn

Maker = Callable[[Path], Path]  # writes a checkpoint into a folder, and says where it is
MTP2 = tiny(num_nextn_predict_layers=2, first_k_dense_replace=0)


def small(name: str) -> ModelConfig:
    """A preset with everything but its sizes."""
    whole = preset(name)
    return whole.replace(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=whole.first_k_dense_replace + 2,
        num_attention_heads=4,
        q_lora_rank=None if whole.q_lora_rank is None else 24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=16,
        moe_intermediate_size=16,
        bos_token_id=0,
        eos_token_id=1,
    )


def looks_trained(config: ModelConfig, dtype: torch.dtype, shard_bytes: int = 2**30) -> Maker:
    return lambda folder: patient(config, dtype=dtype).write(folder / "model", shard_bytes)


def fresh(config: ModelConfig, dtype: torch.dtype) -> Maker:
    """As our own training begins: norms of one, biases of zero."""

    def make(folder: Path) -> Path:
        model = Transformer(config, dtype)
        initialise(model, 0.006, 0)
        write_checkpoint(model, folder / "model")
        return folder / "model"

    return make


def converted(config: ModelConfig, *formats: Format, dtype: torch.dtype = torch.bfloat16) -> Maker:
    def make(folder: Path) -> Path:
        at = patient(config, dtype=dtype).write(folder / "0")
        for n, form in enumerate(formats, 1):
            convert(at, folder / str(n), form)
            at = folder / str(n)
        return at

    return make


def mtp_left_plain(folder: Path) -> Path:
    """Trunk in fp8, MTP not, and config.json says so."""
    mtp = f"model.layers.{WHOLE.num_hidden_layers}"
    chosen = {name for name in packable(WHOLE) if not name.startswith(f"{mtp}.")}
    made = write_folder(folder, WHOLE, stored_as(patient().tensors, FP8, chosen.__contains__), FP8)
    raw = json.loads((made / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = ["lm_head", mtp]
    (made / "config.json").write_text(json.dumps(raw))
    return made


def with_tokenizer(folder: Path) -> Path:
    made = patient(tiny(vocab_size=300, pad_token_id=2)).write(folder / "model")
    train_tokenizer([inspect.getsource(textwrap)], 280).save(made)
    return made


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SOUND: dict[str, Maker] = {
    "V3": looks_trained(small("deepseek-v3"), BF16),
    "V2": looks_trained(small("deepseek-v2"), BF16),
    "V2-Lite": looks_trained(small("deepseek-v2-lite"), BF16),
    "Moonlight": looks_trained(small("moonlight-16b-a3b"), BF16),
    "Kimi-K2": looks_trained(small("kimi-k2"), BF16),
    "demo's gate": looks_trained(small("demo"), FP32),
    "V3 in float32": looks_trained(small("deepseek-v3"), FP32),
    "V3 in float16": looks_trained(small("deepseek-v3"), FP16),
    "V3 in shards": looks_trained(small("deepseek-v3"), BF16, shard_bytes=2**14),
    "V2-Lite in shards, float32": looks_trained(small("deepseek-v2-lite"), FP32, shard_bytes=2**15),
    "ten layers with MTP": looks_trained(WHOLE, BF16),
    "two MTP modules, no dense layer": looks_trained(MTP2, FP32),
    "one expert layer in two": looks_trained(tiny(num_hidden_layers=4, moe_layer_freq=2), FP32),
    "dense throughout": looks_trained(tiny(n_routed_experts=0, first_k_dense_replace=2), FP32),
    "YaRN": looks_trained(tiny(rope_scaling=yarn(64)), FP32),
    "YaRN with V2's factor": looks_trained(tiny(V2, rope_scaling=yarn(64, 0.707)), BF16),
    "fresh V3": fresh(small("deepseek-v3"), FP32),
    "fresh V2 in bfloat16": fresh(small("deepseek-v2"), BF16),
    "fresh, two MTP modules": fresh(MTP2, BF16),
    "V3 in fp8": converted(small("deepseek-v3"), FP8),
    "V2-Lite in fp8": converted(small("deepseek-v2-lite"), FP8),
    "V3 in fp8 with scales that are powers of two": converted(small("deepseek-v3"), Format("fp8", ue8m0=True)),
    "V3 from fp8 back to bfloat16": converted(small("deepseek-v3"), FP8, PLAIN),
    "V3 in fp8, MTP left plain": mtp_left_plain,
    "V3 in int8": converted(small("deepseek-v3"), INT8),
    "Moonlight in int4": converted(small("moonlight-16b-a3b"), INT4),
    "Moonlight in int4, from float16": converted(small("moonlight-16b-a3b"), INT4, dtype=FP16),
    "Moonlight in fp8, from float16": converted(small("moonlight-16b-a3b"), FP8, dtype=FP16),
    "V2 from int8 back": converted(small("deepseek-v2"), INT8, PLAIN, dtype=FP32),
    "with a tokenizer": with_tokenizer,
}
assert len(SOUND) >= 20


@pytest.mark.parametrize("name", SOUND)
def test_the_doctor_is_silent(name: str, tmp_path: Path) -> None:
    folder = SOUND[name](tmp_path)
    findings = examine(folder)
    assert not_passed(findings) == []
    assert {"config", "files", "shapes", "finite", "alive", "norms"} <= {finding.check for finding in findings}


def test_the_doctor_is_silent_on_what_our_own_training_leaves(tmp_path: Path) -> None:
    """The nano preset after some steps, with tokenizer and chat template, as it is and in bfloat16."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for module in (json.decoder, json.encoder, textwrap):
        (corpus / f"{module.__name__}.py").write_text(inspect.getsource(module))
    settings = ("model.preset=nano", f"data.corpus={corpus}", "train.steps=8", "train.warmup_steps=2")
    more = ("data.row_length=32", "train.rows_per_step=4", "train.dtype=float32", "train.learning_rate=0.01")
    model = train(Recipe.build({}, (*settings, *more)), tmp_path / "run").model
    convert(model, tmp_path / "bf16", PLAIN, dtype=BF16)
    for folder in (model, tmp_path / "bf16"):
        findings = examine(folder)
        assert not_passed(findings) == []
        assert {"chat", "padding", "routing-bias", "mtp-copies"} <= {finding.check for finding in findings}


@pytest.mark.parametrize("named", [True, False], ids=["gate named", "gate not named"])
@pytest.mark.parametrize("v2", [False, True], ids=["V3", "V2"])
def test_what_transformers_saves_is_sound_but_for_what_it_leaves_out(v2: bool, named: bool, tmp_path: Path) -> None:
    """Left to itself its config.json does not name the gate, and other engines guess: one warning, and a true one."""
    torch.manual_seed(0)
    raw = (tiny(V2) if v2 else tiny()).to_hf()
    kind, build = (DeepseekV2Config, DeepseekV2ForCausalLM) if v2 else (DeepseekV3Config, DeepseekV3ForCausalLM)
    implied = set() if named else set(IMPLIED[raw["model_type"]])
    build(kind(**{key: value for key, value in raw.items() if key not in implied})).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    left_out = [key for key in ("scoring_func", "topk_method", "moe_layer_freq") if written.get(key) is None]
    assert bool(left_out) != named
    found = [(finding.check, finding.verdict, finding.value) for finding in not_passed(examine(tmp_path))]
    assert found == ([] if named else [("keys", "warn", {"missing": left_out})])
