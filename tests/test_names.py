"""Names between our parameters and a Hugging Face checkpoint: full-size models by their tables, small ones in numbers.

Letters: H heads, N width without position, U value width, C latent width, E experts.
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset, preset_names
from cavelight.spec.shapes import Parameter, parameters
from cavelight.weights.names import HFTensor, hf_tensors, is_mtp, load_hf_dict

NANO = preset("nano")
FP8_KINDS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def full_size(name: str) -> tuple[HFTensor, ...]:
    return hf_tensors(preset(name))


def elements(tensors: tuple[HFTensor, ...]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p.name: torch.randn(p.shape, generator=generator) for p in parameters(config)}


def packed(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor.pack(ours) for tensor in hf_tensors(config)}


def blank_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [
        ("deepseek-v3", 46_183, 684_489_845_504),
        ("deepseek-v2-lite", 5_291, 15_706_484_224),
        ("moonlight-16b-a3b", 5_317, 15_960_110_208),
        ("kimi-k2", 69_975, 1_026_408_232_448),
    ],
)
def test_full_size_checkpoints(name: str, tensors: int, numbers: int) -> None:
    table = full_size(name)
    assert (len(table), elements(table)) == (tensors, numbers)


def test_v3_has_the_tensors_of_the_released_headers() -> None:
    """91,991 tensors in all and 1,564 in the MTP layer: ours, and a scale for each block-fp8 matrix."""
    config, table = preset("deepseek-v3"), full_size("deepseek-v3")
    fp8 = [tensor for tensor in table if tensor.name.removesuffix(".weight").endswith(FP8_KINDS)]
    fp8 = [tensor for tensor in fp8 if not tensor.name.endswith("eh_proj.weight")]
    scales = sum(math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in (t.shape for t in fp8))
    of_mtp = [tensor for tensor in [*table, *fp8] if is_mtp(tensor.name, config)]
    assert (len(table) + len(fp8), scales, len(of_mtp)) == (91_991, 41_540_496, 1_564)


def test_v3_names_and_shapes() -> None:
    shapes = {tensor.name: tensor.shape for tensor in full_size("deepseek-v3")}
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.layers.0.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.2.mlp.down_proj.weight": (7168, 18432),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.experts.255.down_proj.weight": (7168, 2048),
        "model.layers.61.mlp.experts.0.gate_proj.weight": (2048, 7168),
        "model.layers.61.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.enorm.weight": (7168,),
        "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }
    assert {name: shapes.get(name) for name in expected} == expected


@pytest.mark.parametrize("name", preset_names())
def test_every_parameter_is_stored_exactly_once(name: str) -> None:
    config, table = preset(name), full_size(name)
    assert max(Counter(tensor.name for tensor in table).values()) == 1

    stored = Counter((part.name, tensor.expert) for tensor in table if not tensor.is_copy for part in tensor.parts)
    assert max(stored.values()) == 1

    def places(p: Parameter) -> list[tuple[str, int | None]]:
        return [(p.name, e) for e in range(p.shape[0])] if p.role == "expert" else [(p.name, None)]

    assert stored.keys() == {place for p in parameters(config) for place in places(p)}
    originals = tuple(tensor for tensor in table if not tensor.is_copy)
    assert elements(originals) == sum(p.size for p in parameters(config))


def test_layer_61_may_be_a_layer_like_any_other() -> None:
    config = NANO.replace(num_hidden_layers=78, num_nextn_predict_layers=2)
    names = [tensor.name for tensor in hf_tensors(config)]
    assert not any(name.startswith("model.layers.61.e") for name in names)
    for module in (0, 1):
        for rest in ("eh_proj", "embed_tokens", "shared_head.head", "shared_head.norm", "self_attn.kv_b_proj"):
            assert f"model.layers.{78 + module}.{rest}.weight" in names


sizes = st.integers(1, 3)


@st.composite
def small_configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(sizes)
    return NANO.replace(
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        num_attention_heads=draw(sizes),
        q_lora_rank=draw(st.none() | sizes),
        qk_nope_head_dim=draw(sizes),
        v_head_dim=draw(sizes),
        kv_lora_rank=draw(sizes),
        hidden_size=draw(sizes),
        moe_intermediate_size=draw(sizes),
        n_shared_experts=draw(st.none() | sizes),
    )


@settings(deadline=None, max_examples=40)
@given(small_configs())
def test_to_their_names_and_back_changes_nothing(config: ModelConfig) -> None:
    ours = random_parameters(config)
    theirs = packed(config, ours)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {t.name: t.shape for t in hf_tensors(config)}
    model = blank_model(config)
    load_hf_dict(model, theirs)
    state = model.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)
    again = packed(config, state)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_what_the_exceptions_hold() -> None:
    config = NANO.replace(num_nextn_predict_layers=2)
    ours = random_parameters(config)
    theirs = packed(config, ours)
    H, N, U = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    kv_b = theirs["model.layers.1.self_attn.kv_b_proj.weight"]
    for h in range(H):
        rows = kv_b[h * (N + U) : (h + 1) * (N + U)]
        assert torch.equal(rows[:N], ours["model.layers.1.self_attn.k_up"][h])
        assert torch.equal(rows[N:], ours["model.layers.1.self_attn.v_up"][h])
    down = theirs["model.layers.2.mlp.experts.5.down_proj.weight"]
    assert torch.equal(down, ours["model.layers.2.mlp.experts.down_proj"][5])
    for module, layer in ((0, 3), (1, 4)):
        for name, mine in (
            ("enorm.weight", f"mtp.{module}.enorm.weight"),
            ("hnorm.weight", f"mtp.{module}.hnorm.weight"),
            ("eh_proj.weight", f"mtp.{module}.eh_proj.weight"),
            ("shared_head.norm.weight", f"mtp.{module}.norm.weight"),
            ("input_layernorm.weight", f"mtp.{module}.block.input_layernorm.weight"),
            ("mlp.gate.e_score_correction_bias", f"mtp.{module}.block.mlp.gate.e_score_correction_bias"),
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        ):
            assert torch.equal(theirs[f"model.layers.{layer}.{name}"], ours[mine])


def test_packing_copies_nothing_but_what_is_joined() -> None:
    ours = random_parameters(NANO)
    storages = {tensor.untyped_storage().data_ptr() for tensor in ours.values()}
    new = {name for name, t in packed(NANO, ours).items() if t.untyped_storage().data_ptr() not in storages}
    assert new == {f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(4)}


def test_reading_casts_weights_and_keeps_the_routing_bias_wide() -> None:
    ours = random_parameters(NANO)
    model = Transformer(NANO, torch.bfloat16)
    load_hf_dict(model, packed(NANO, ours))
    for parameter in parameters(NANO):
        tensor = model.state_dict()[parameter.name]
        expected = ours[parameter.name] if parameter.role == "routing_bias" else ours[parameter.name].bfloat16()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_derived_tensors_are_dropped_and_copies_may_be_absent() -> None:
    theirs = packed(NANO, random_parameters(NANO))
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    del theirs["model.layers.3.embed_tokens.weight"], theirs["model.layers.3.shared_head.head.weight"]
    model = blank_model(NANO)
    load_hf_dict(model, theirs)
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_differs_is_refused(copy: str) -> None:
    theirs = packed(NANO, random_parameters(NANO))
    name = f"model.layers.3.{copy}.weight"
    theirs[name] = theirs[name].clone()
    theirs[name][7, :2] += 1
    with pytest.raises(UserError, match=rf"{name} is not a copy of .* 2 of 32,768 elements differ"):
        load_hf_dict(blank_model(NANO), theirs)


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    theirs = packed(NANO, random_parameters(NANO))
    del theirs["lm_head.weight"], theirs["model.layers.1.mlp.experts.3.up_proj.weight"]
    theirs["model.layers.0.mlp.extra"] = torch.ones(1)
    theirs["model.norm.weight"] = torch.ones(65)
    with pytest.raises(UserError) as error:
        load_hf_dict(blank_model(NANO), theirs)
    for part in (
        "2 missing (",
        "lm_head.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "1 left over (model.layers.0.mlp.extra)",
        "1 of another shape (model.norm.weight is [65], not [64])",
        "check that config.json and weights belong together",
    ):
        assert part in str(error.value)


def test_long_lists_are_abbreviated() -> None:
    with pytest.raises(UserError, match=r"133 missing \((\S+, ){9}\S+ and 123 more\)"):
        load_hf_dict(blank_model(NANO), {})


def test_mtp_modules_are_never_dropped_silently() -> None:
    theirs = packed(NANO, random_parameters(NANO))
    without = {name: tensor for name, tensor in theirs.items() if not is_mtp(name, NANO)}
    with pytest.raises(UserError, match=r"announces MTP modules \(num_nextn_predict_layers is 1\).*without_mtp=True"):
        load_hf_dict(blank_model(NANO), without)
    config = NANO.replace(num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"more MTP modules than config.json announces .* is 0\).*without_mtp=True"):
        load_hf_dict(blank_model(config), theirs)
    load_hf_dict(blank_model(config), without)
