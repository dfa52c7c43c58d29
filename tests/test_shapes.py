"""The table of parameters: names, axes and shapes, and the sizes of the released checkpoints."""

import pytest
import torch

from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import scale_count
from cavelight.spec.formats import PACKED_ROLES
from cavelight.spec.presets import preset, preset_names
from cavelight.spec.shapes import Parameter, axis_sizes, parameters

NANO_BLOCK = """
input_layernorm.weight                        D            64        norm
self_attn.q_a_proj.weight                     Q,D          32,64     attention
self_attn.q_a_layernorm.weight                Q            32        norm
self_attn.q_b_proj.weight                     H*(N+R),Q    96,32     attention
self_attn.kv_a_proj_with_mqa.weight           C+R,D        24,64     attention
self_attn.kv_a_layernorm.weight               C            16        norm
self_attn.k_up                                H,N,C        4,16,16   attention
self_attn.v_up                                H,U,C        4,16,16   attention
self_attn.o_proj.weight                       D,H*U        64,64     attention
post_attention_layernorm.weight               D            64        norm
"""
NANO_DENSE = """
mlp.gate_proj.weight                          I,D          192,64    dense
mlp.up_proj.weight                            I,D          192,64    dense
mlp.down_proj.weight                          D,I          64,192    dense
"""
NANO_MOE = """
mlp.gate.weight                               E,D          8,64      gate
mlp.gate.e_score_correction_bias              E            8         routing_bias
mlp.experts.gate_proj                         E,F,D        8,32,64   expert
mlp.experts.up_proj                           E,F,D        8,32,64   expert
mlp.experts.down_proj                         E,D,F        8,64,32   expert
mlp.shared_experts.gate_proj.weight           F*n_shared,D 32,64     shared_expert
mlp.shared_experts.up_proj.weight             F*n_shared,D 32,64     shared_expert
mlp.shared_experts.down_proj.weight           D,F*n_shared 64,32     shared_expert
"""
NANO_MTP = """
mtp.0.enorm.weight                            D            64        norm
mtp.0.hnorm.weight                            D            64        norm
mtp.0.eh_proj.weight                          D,2D         64,128    mtp_projection
"""


def written(rows: str, at: str = "") -> list[Parameter]:
    table = []
    for row in rows.strip().splitlines():
        name, axes, shape, role = row.split()
        dtype = "float32" if role == "routing_bias" else "model"
        table.append(Parameter(at + name, tuple(axes.split(",")), tuple(map(int, shape.split(","))), role, dtype))
    return table


def test_the_whole_table_of_nano() -> None:
    assert list(parameters(preset("nano"))) == [
        *written("model.embed_tokens.weight V,D 512,64 embedding"),
        *written(NANO_BLOCK + NANO_DENSE.lstrip(), "model.layers.0."),
        *written(NANO_BLOCK + NANO_MOE.lstrip(), "model.layers.1."),
        *written(NANO_BLOCK + NANO_MOE.lstrip(), "model.layers.2."),
        *written("model.norm.weight D 64 norm"),
        *written("lm_head.weight V,D 512,64 head"),
        *written(NANO_MTP),
        *written(NANO_BLOCK + NANO_MOE.lstrip(), "mtp.0.block."),
        *written("mtp.0.norm.weight D 64 norm"),
    ]


def named(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for p in parameters(config)}


def test_without_query_compression_groups_bias_or_shared_experts() -> None:
    lite = named(preset("deepseek-v2-lite"))
    assert lite["model.layers.5.self_attn.q_proj.weight"] == (3072, 2048)
    assert lite["model.layers.5.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert not [name for name in lite if "q_a_" in name or "e_score" in name or name.startswith("mtp.")]
    alone = named(preset("nano").replace(n_shared_experts=None))
    assert "model.layers.1.mlp.experts.up_proj" in alone
    assert not [name for name in alone if "shared" in name]


def test_dense_layers_lie_where_the_configuration_says() -> None:
    table = named(preset("nano").replace(num_hidden_layers=5, moe_layer_freq=2, num_nextn_predict_layers=2))
    dense = {name.removesuffix(".mlp.up_proj.weight") for name in table if name.endswith(".mlp.up_proj.weight")}
    # Module i is like a layer 5 + i, so the first of the two is dense.
    assert dense == {"model.layers.0", "model.layers.1", "model.layers.3", "mtp.0.block"}


@pytest.mark.parametrize("name", preset_names())
def test_names_are_unique_and_shapes_follow_the_axes(name: str) -> None:
    config = preset(name)
    table, sizes = parameters(config), axis_sizes(config)
    assert len({p.name for p in table}) == len(table)
    assert all(p.shape == tuple(sizes[axis] for axis in p.axes) and min(p.shape) > 0 for p in table)


def stored_tensors(config: ModelConfig, fp8: bool) -> int:
    """How many tensors a Hugging Face checkpoint has: experts apart, k_up and v_up together, MTP's two copies."""
    count = 2 * config.num_nextn_predict_layers
    for p in parameters(config):
        if p.name.endswith(".v_up"):
            continue
        each = 2 if fp8 and p.role in PACKED_ROLES else 1
        count += each * (p.shape[0] if p.role == "expert" else 1)
    return count


def test_released_checkpoints_have_as_many_tensors() -> None:
    assert stored_tensors(preset("deepseek-v3"), fp8=True) == 91_991
    assert stored_tensors(preset("deepseek-v2-lite"), fp8=False) == 5_291


def test_released_fp8_checkpoint_has_as_many_scales() -> None:
    table = [p for p in parameters(preset("deepseek-v3")) if p.role in PACKED_ROLES]
    assert sum(scale_count(p) for p in table) == 41_540_496
    ragged = next(p for p in table if p.name.endswith("kv_a_proj_with_mqa.weight"))
    assert (ragged.shape[0], scale_count(ragged)) == (576, 5 * 56)


@pytest.mark.parametrize("name", preset_names())
def test_the_model_holds_just_what_the_table_lists(name: str) -> None:
    """On the meta device, so that the 671B one costs no memory."""
    config = preset(name)
    model = Transformer(config, torch.bfloat16, torch.device("meta"))
    held = {key: (tuple(t.shape), t.dtype) for key, t in model.state_dict().items()}
    dtypes = {"model": torch.bfloat16, "float32": torch.float32}
    assert held == {p.name: (p.shape, dtypes[p.dtype]) for p in parameters(config)}
