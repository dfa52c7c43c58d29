"""Layouts: what can lie how, that parts sum to the whole, and what one device holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cavelight.errors import UserError
from cavelight.plan.layout import Layout, held, stages, stages_of
from cavelight.plan.pipeline import Chunk, schedule, step_seconds
from cavelight.plan.share import share
from cavelight.spec import cost
from cavelight.spec.presets import preset

V3 = preset("deepseek-v3")
REPORT = Layout.of("dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe")


def test_the_reports_layout() -> None:
    assert REPORT.checked(V3).devices == 2048
    assert REPORT.replicas("expert") == 2
    assert REPORT.replicas("attention") == 128
    assert Layout.of("dp=80,tp=4,ep=320,redundant=64").checked(V3).devices == 320  # the decoding unit


@pytest.mark.parametrize(
    "text", ["dp=1", "dp=8,ep=8", "dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe"]
)
def test_layouts_read_as_they_print(text: str) -> None:
    assert str(Layout.of(text)) == text
    assert Layout.of(f" {text.upper()} , ") == Layout.of(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("dp", "whole number"),
        ("dp=0", "whole number"),
        ("dp=-1", "whole number"),
        ("dp=99999999999,ep=77777777777", "whole number"),
        ("dp=2,dp=2", "dp is told twice"),
        ("recomputed=full", r"did you mean recompute\?"),
        ("zero=2", "one of 0, 1, 3"),
        ("recompute=some", "none, selective, full"),
        ("schedule=zb", "1f1b, zb1p"),
    ],
)
def test_what_is_no_layout(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Layout.of(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("dp=3,ep=3", r"ep \(3\) does not divide 256 experts.*redundant=2"),
        ("dp=4,ep=8", r"ep \(8\) does not divide dp\*tp\*cp \(4\).*set ep to 4"),
        ("tp=3", r"tp \(3\) does not divide 128 attention heads.*set tp to 2"),
        ("pp=62", r"more than the model's 61 layers"),
        ("pp=5,schedule=dualpipe", "even number of stages"),
    ],
)
def test_layouts_that_the_model_cannot_take(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Layout.of(text).checked(V3)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    dense = preset("nano").replace(
        n_routed_experts=None,
        n_shared_experts=None,
        first_k_dense_replace=3,
        num_nextn_predict_layers=0,
        n_group=1,
        topk_group=1,
    )
    with pytest.raises(UserError, match="no routed experts"):
        Layout(dp=2, ep=2).checked(dense)
    with pytest.raises(UserError, match="leave redundant at 0"):
        Layout(redundant=8).checked(dense)
    assert share(dense, Layout(tp=2)).expert_bytes == 0


@pytest.mark.parametrize("pp", [1, 2, 3, 16, 61])
def test_stages_take_every_layer_once(pp: int) -> None:
    ranges = stages(V3, Layout(pp=pp))
    assert [layer for one in ranges for layer in one] == list(range(61))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    cp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 3, 8]),
    spread=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(["deepseek-v3", "deepseek-v2-lite", "small"]),
)
def test_what_devices_hold_adds_up_to_the_model(tp: int, cp: int, dp: int, pp: int, spread: int, name: str) -> None:
    """Each element lies somewhere, in as many copies as the layout says."""
    config = preset(name)
    ranks = dp * tp * cp
    ep = min(spread, ranks)
    layout = Layout(dp=dp, ep=ep, pp=pp, tp=tp, cp=cp)
    found: dict[str, int] = {}
    for rank in range(layout.pipeline):
        for p, size in held(config, layout, rank):
            cut = tp if {"H", "H*(N+R)", "H*U", "I", "F*n_shared", "V"} & set(p.axes) else 1
            copies = ranks // (ep if p.role == "expert" else cut)
            found[p.name] = found.get(p.name, 0) + size * ranks // copies
    copied = config.num_nextn_predict_layers > 0 and pp > 1  # the last stage reads the embedding for its module
    table = config.vocab_size * config.hidden_size
    assert sum(found.values()) == cost.total_parameters(config, mtp=True) + (table if copied else 0)


def test_dualpipe_holds_everything_twice() -> None:
    plain, dual = Layout(pp=4), Layout(pp=4, schedule="dualpipe")
    folded = Layout(pp=4, schedule="dualpipev")

    def total(layout: Layout) -> int:
        return sum(size for rank in range(layout.pipeline) for _, size in held(V3, layout, rank, mtp=False))

    assert total(dual) == 2 * total(plain) == 2 * total(folded)
    assert stages_of(dual, 1) == (1, 2)
    assert (plain.devices, dual.devices, folded.devices) == (4, 4, 2)


@pytest.mark.parametrize(
    "form, total", [("bf16", cost.weight_bytes(V3, "bf16")), ("fp8", cost.weight_bytes(V3, "fp8"))]
)
def test_shares_are_parts_of_the_checkpoint(form: str, total: int) -> None:
    whole = share(V3, Layout(), 0, form)  # type: ignore[arg-type]  # from a list of words
    assert whole.bytes == total
    assert (whole.layers, whole.moe_layers) == (62, 59)
    eighth = share(V3, Layout(dp=8, ep=8), 0, form)  # type: ignore[arg-type]
    assert eighth.expert_bytes == whole.expert_bytes / 8
    assert eighth.common_bytes == whole.common_bytes


# Pipelines ------------------------------------------------------------------------------------------------------------

CHUNK = Chunk(forward=1.0, backward=2.0, weight=0.8, pair=2.5)


@pytest.mark.parametrize(
    "name, stages_, bubble, weights, activations, devices",
    [
        ("1f1b", 16, 45.0, 1, 16, 16),
        ("zb1p", 16, 21.0, 1, 16, 16),
        ("dualpipe", 16, 14.7, 2, 17, 16),
        ("dualpipev", 16, 14.7, 2, 17, 8),
        ("1f1b", 2, 3.0, 1, 2, 2),
        ("dualpipe", 2, 0.0, 2, 3, 2),
    ],
)
def test_the_reports_table_of_schedules(
    name: str, stages_: int, bubble: float, weights: int, activations: int, devices: int
) -> None:
    found = schedule(name, stages_, CHUNK)  # type: ignore[arg-type]
    assert found.bubble == pytest.approx(bubble)
    assert (found.parameters, found.activations, found.devices) == (weights, activations, devices)


def test_a_step_is_work_and_bubble() -> None:
    assert step_seconds("1f1b", 1, CHUNK, 8) == (24.0, 0.0)
    assert step_seconds("1f1b", 16, CHUNK, 8) == pytest.approx((24.0, 45.0))
    assert step_seconds("dualpipe", 16, CHUNK, 32) == pytest.approx((80.0, 14.7))
    assert step_seconds("dualpipev", 16, CHUNK, 32) == pytest.approx((160.0, 14.7))  # half the devices


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_one_micro_batch_takes_its_way_through_all_stages_and_back(name: str) -> None:
    way = 16 * (CHUNK.forward + CHUNK.backward - CHUNK.weight) + CHUNK.weight
    assert sum(step_seconds(name, 16, CHUNK, 1)) >= way  # type: ignore[arg-type]  # from a list of words
