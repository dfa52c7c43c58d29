"""Costs against the published figures, exactly, and against plain arithmetic on a small model."""

import json
from dataclasses import astuple

import pytest

from cavelight.errors import UserError
from cavelight.plan.table import facts, rows, tokens_of
from cavelight.spec import cost
from cavelight.spec.formats import PACKED_ROLES
from cavelight.spec.presets import preset, preset_names
from cavelight.spec.shapes import parameters


@pytest.mark.parametrize(
    "name, total",
    [
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-v2-lite", 15_706_484_224),
        ("moonlight-16b-a3b", 15_960_110_208),
    ],
)
def test_totals(name: str, total: int) -> None:
    assert cost.total_parameters(preset(name)) == total


def test_totals_need_the_routing_biases() -> None:
    biases = sum(p.size for p in parameters(preset("deepseek-v3")) if p.role == "routing_bias")
    assert biases == 59 * 256  # 58 layers and the prediction module


def test_prediction_modules_of_v3() -> None:
    v3 = preset("deepseek-v3")
    assert cost.mtp_parameters(v3) == 11_610_068_224
    assert cost.total_parameters(v3, mtp=True) == 671_026_419_200 + 11_610_068_224
    assert cost.checkpoint_elements(v3) == 684_489_845_504


def test_active_parameters_of_v3() -> None:
    v3 = preset("deepseek-v3")
    assert f"{cost.active_parameters(v3) / 1e9:.2f}" == "37.55"
    assert f"{cost.active_parameters(v3, embedding=False) / 1e9:.2f}" == "36.63"
    # A prediction module activates 2.54 billion, its uses of embedding, head and projection included.
    module = cost.active_parameters(v3, mtp=True) - cost.active_parameters(v3)
    assert f"{(module + 2 * v3.vocab_size * v3.hidden_size) / 1e9:.2f}" == "2.54"


@pytest.mark.parametrize(
    "name, bytes_per_token",
    [
        ("deepseek-v3", (70_272, 4_997_120, 3_997_696, 249_856, 31_232)),
        ("deepseek-v2", (69_120, 4_915_200, 3_932_160, 245_760, 30_720)),
        ("deepseek-v2-lite", (31_104, 276_480, 221_184, 110_592, 13_824)),
    ],
)
def test_cache_bytes_per_token(name: str, bytes_per_token: tuple[int, ...]) -> None:
    assert astuple(cost.cache_bytes_per_token(preset(name))) == bytes_per_token


def test_cache_of_other_widths_and_with_prediction_modules() -> None:
    v3 = preset("deepseek-v3")
    assert cost.cache_bytes_per_token(v3, bytes_per_element=4).mla == 2 * 70_272
    assert cost.cache_bytes_per_token(v3, mtp=True).mla == 62 * 576 * 2
    demo = cost.cache_bytes_per_token(preset("demo"))
    assert demo.gqa8 == demo.mha  # two heads make no eight groups


def test_weight_bytes() -> None:
    nano = preset("nano")
    assert cost.weight_bytes(nano) == 2 * cost.total_parameters(nano, mtp=True) + 2 * 3 * 8  # biases take four bytes
    fp8 = cost.weight_bytes(preset("deepseek-v3"), "fp8")
    wide = sum(p.size for p in parameters(preset("deepseek-v3")) if p.role not in PACKED_ROLES)
    assert fp8 == cost.total_parameters(preset("deepseek-v3"), mtp=True) + wide + 2 * 59 * 256 + 4 * 41_540_496


NARROW = preset("nano").replace(kv_lora_rank=20)  # so that C differs from N and U, and the two forms in cost


def by_hand(mixing: float, mtp: bool = False) -> float:
    """Multiply-adds of NARROW per token, `mixing` in each layer: 64 wide, 4 heads of 16 + 8, experts 2 + 1 of 32."""
    queries, latent, output = 64 * 32 + 32 * 96, 64 * (20 + 8), 64 * 64
    attention = queries + latent + output + mixing
    dense, moe, head = 3 * 64 * 192, 64 * 8 + 3 * 3 * 64 * 32, 512 * 64
    return 3 * attention + dense + 2 * moe + head + (64 * 128 + attention + moe + head if mtp else 0)


def test_operations_against_plain_arithmetic() -> None:
    up = 4 * (16 * 20 + 16 * 20)
    absorbed, expanded = 4 * (20 + 8 + 20), 4 * (16 + 8 + 16)  # per row seen
    assert cost.flops_per_token(NARROW, 99, form="absorbed") == 2 * by_hand(up + 100 * absorbed)
    assert cost.flops_per_token(NARROW, 99, form="expanded") == 2 * by_hand(100 * up + 100 * expanded)
    # A row of 101 tokens sees 51 on average and expands each latent once.
    trained = cost.flops_per_token(NARROW, 0, queries=101, form="expanded", training=True, mtp=True)
    assert trained == 6 * by_hand(up + 51 * expanded, mtp=True)
    # Seven queries after 14 cached rows expand 21 rows, three for each.
    assert cost.flops_per_token(NARROW, 14, queries=7, form="expanded") == 2 * by_hand(3 * up + 18 * expanded)


def test_absorbed_costs_more_per_row_seen_and_far_less_per_step() -> None:
    v3 = preset("deepseek-v3")
    one_row = cost.flops_per_token(v3, 1001, form="absorbed") - cost.flops_per_token(v3, 1000, form="absorbed")
    assert one_row == 2 * 61 * 128 * 1088
    assert 100 * cost.flops_per_token(v3, 131_071) < cost.flops_per_token(v3, 131_071, form="expanded")


def test_a_training_step_of_v3_costs_250_gigaflops_per_token() -> None:
    assert (
        cost.flops_per_token(preset("deepseek-v3"), 0, queries=4096, form="expanded", training=True) == 250_457_382_912
    )


# The planner's table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_facts_are_json(name: str) -> None:
    plan = facts(preset(name))
    assert json.loads(json.dumps(plan)) == plan
    assert plan["context"] == plan["max_context"] == preset(name).max_position_embeddings


def test_table_of_v3() -> None:
    lines = dict(rows(facts(preset("deepseek-v3"), tokens_of("128k"))))
    assert lines["parameters"] == "671,026,419,200 (671.0 B)"
    assert lines["  and in prediction modules (MTP)"] == "11,610,068,224 (11.6 B)"
    assert lines["active per token"] == "37,552,297,472 (37.6 B)"
    assert lines["weights in bf16"] == "1.37 TB"
    assert lines["  MLA (what Cavelight stores)"] == "70,272 B   9.21 GB"
    assert lines["  MHA of the same shape"] == "3,997,696 B   524.0 GB   56.9 x MLA"
    assert lines["training, per token in rows of 4,096"] == "260.6 GFLOP"


def test_table_of_a_small_model_leaves_out_what_it_has_not() -> None:
    labels = [label for label, _ in rows(facts(preset("demo").replace(num_nextn_predict_layers=0), 4096))]
    assert not [label for label in labels if "MTP" in label or "GQA" in label]
    assert "cache per token, and for 4,096 tokens, beyond the model's 256" in labels


@pytest.mark.parametrize("text, tokens", [("4096", 4096), ("128k", 131_072), (" 1M ", 1_048_576)])
def test_lengths_as_people_write_them(text: str, tokens: int) -> None:
    assert tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0", "-5", "1.5k", "²", "128kb"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="no number of tokens"):
        tokens_of(text)


def test_a_context_has_a_token() -> None:
    with pytest.raises(UserError, match="at least one token"):
        facts(preset("nano"), 0)
