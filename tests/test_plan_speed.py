"""Memory, speed and choices of the planner: published figures, and what has to hold whatever the constants are."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cavelight.errors import UserError
from cavelight.plan import serving, traffic, training
from cavelight.plan.advice import serving_advice, training_advice
from cavelight.plan.devices import find, read_devices, table
from cavelight.plan.layout import Layout
from cavelight.plan.memory import decoding_memory
from cavelight.plan.serving import Serving
from cavelight.plan.share import share
from cavelight.plan.speed import decode, distinct_experts, prefill
from cavelight.plan.training import Plan, train
from cavelight.spec import cost
from cavelight.spec.presets import preset

V3 = preset("deepseek-v3")
H800 = find("H800", table())
REPORT = Layout.of("dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe")
UNIT = Layout(dp=144, ep=144, redundant=32)


def plan(**changes: object) -> Serving:
    return Serving(V3, H800, Layout(dp=2, tp=8, ep=16), 131_072, "fp8", acceptance=0.85).with_(**changes)


# Training -------------------------------------------------------------------------------------------------------------


def test_the_reports_hours_and_money() -> None:
    operations = cost.flops_per_token(V3, 0, queries=4096, form="expanded", training=True, mtp=True)
    used = operations * 1e12 / (180e3 * 3600) / H800.peak("bf16")
    assert used == pytest.approx(0.4067, abs=1e-4)
    step = train(V3, H800, REPORT, row=4096, sequences=15360, form="fp8", utilisation=used)
    assert step.tokens_per_step == 62_914_560
    assert step.days(1e12, 2048) == pytest.approx(3.66, abs=0.01)
    hours = step.device_hours(14.8e12) + 119e3 + 5e3
    assert hours == pytest.approx(2.788e6, rel=1e-6)
    assert hours * H800.price == pytest.approx(5.576e6, rel=1e-6)


def test_the_estimate_is_fitted_to_the_reports_throughput() -> None:
    step = train(V3, H800, REPORT, row=4096, sequences=15360, form="fp8")
    assert step.device_hours(1e12) == pytest.approx(180e3, rel=0.01)


def test_long_rows_cost_what_the_report_says_to_a_fifth() -> None:
    layout = REPORT.with_(dp=32, cp=4)
    hours = sum(
        train(V3, H800, layout, row=row, sequences=rows, form="fp8").device_hours(1000.0 * row * rows)
        for row, rows in ((32_768, 1920), (131_072, 480))
    )
    assert hours == pytest.approx(119e3, rel=0.2)


def test_the_report_chose_as_the_planner_does() -> None:
    asked = Plan(V3, H800, Layout(), 4096, 15360, form="fp8")
    chosen = training.best(asked, 2048)
    assert chosen is not None and chosen.layout == REPORT
    assert training.best(asked, 8) is None


@pytest.mark.parametrize("better", [{"schedule": "dualpipe"}, {"recompute": "none"}, {"pp": 8}])
def test_less_waiting_and_less_work_is_faster(better: dict[str, object]) -> None:
    slow = REPORT.with_(schedule="1f1b", recompute="full")
    fast = slow.with_(**better)
    speeds = [train(V3, H800, one, row=4096, sequences=15360, form="fp8").per_device for one in (slow, fast)]
    assert speeds[0] < speeds[1]


def test_rows_beyond_whole_micro_batches_take_one_more() -> None:
    steps = [train(V3, H800, REPORT, row=4096, sequences=n, form="fp8") for n in (128, 129, 256)]
    assert steps[0].seconds <= steps[1].seconds == steps[2].seconds


def test_a_pipeline_inside_a_node_needs_no_network() -> None:
    alone = replace(H800, network=0.0)
    lite = preset("deepseek-v2-lite")
    step = train(lite, alone, Layout(dp=4, pp=2), row=4096, sequences=64)
    assert step.per_device >= train(lite, H800, Layout(dp=4, pp=2), row=4096, sequences=64).per_device > 0
    assert decode(lite, alone, Layout(pp=2), context=4096, sequences=2, form="bf16").per_device > 0


def test_bubbles_shrink_with_the_batch() -> None:
    shares = [train(V3, H800, REPORT, row=4096, sequences=n, form="fp8").bubble for n in (1920, 3840, 15360)]
    assert shares == sorted(shares, reverse=True)


# Serving --------------------------------------------------------------------------------------------------------------


def test_the_production_unit_decodes_as_published() -> None:
    """20 to 22 tokens/s for each of the 88 users that 14.8k tokens/s a node make (open-infra-index)."""
    shown = decode(V3, H800, UNIT, context=4989, sequences=88, form="fp8")
    assert 18 < shown.per_sequence < 25


@pytest.mark.parametrize(
    "ep, dispatch, combine",
    [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)],
)
def test_the_exchange_takes_what_deepep_measured(ep: int, dispatch: float, combine: float) -> None:
    assert 1e6 * traffic.low_latency(V3, H800, ep, 128, 1) == pytest.approx(dispatch, rel=0.06)
    assert 1e6 * traffic.low_latency(V3, H800, ep, 128, 2) == pytest.approx(combine, rel=0.13)


def test_a_token_goes_to_at_most_four_nodes() -> None:
    for nodes in (1, 2, 4, 8):
        assert traffic.other_nodes(V3, nodes) <= min(4, nodes)
    assert traffic.other_nodes(V3, 16) < 8  # four groups of two nodes each
    assert traffic.other_nodes(V3, 8) == pytest.approx(3.5)
    assert traffic.other_nodes(preset("kimi-k2"), 8) > 4  # its gate has no such limit


@given(tokens=st.floats(0, 1e6))
def test_experts_touched(tokens: float) -> None:
    assert 0 <= distinct_experts(V3, tokens) <= 256
    assert distinct_experts(V3, tokens) <= 8 * tokens + 1e-9 or tokens < 1
    assert distinct_experts(V3, 1) == pytest.approx(8)


@pytest.mark.parametrize("sequences", [1, 1.5, 5000])
def test_models_without_experts_decode(sequences: float) -> None:
    dense = preset("nano").replace(
        n_routed_experts=None, n_shared_experts=None, first_k_dense_replace=3, num_nextn_predict_layers=0,
        n_group=1, topk_group=1, num_experts_per_tok=8,
    )  # fmt: skip
    shown = decode(dense, H800, Layout(), context=256, sequences=sequences, form="bf16")
    assert shown.per_device > 0 and "experts" not in shown.parts


def test_drafts_pay_by_their_acceptance() -> None:
    without = decode(V3, H800, UNIT, context=4096, sequences=1, form="fp8")
    speeds = [
        decode(V3, H800, UNIT, context=4096, sequences=1, form="fp8", acceptance=p).per_sequence
        for p in (0.0, 0.5, 1.0)
    ]
    assert speeds[0] < without.per_sequence < speeds[2]
    assert speeds[2] == pytest.approx(2 * speeds[0])


@given(
    context=st.integers(1, 10**6),
    sequences=st.integers(1, 300),
    more=st.integers(2, 4),
    tp=st.sampled_from([1, 2, 4, 8]),
)
def test_longer_and_more_is_slower_and_larger(context: int, sequences: int, more: int, tp: int) -> None:
    one = plan(layout=Layout(dp=16 // tp, tp=tp, ep=16), context=context)
    longer = one.with_(context=context * more)
    assert sum(longer.memory(sequences).values()) > sum(one.memory(sequences).values())
    assert longer.decode(sequences).seconds > one.decode(sequences).seconds
    assert one.decode(sequences * more).seconds >= one.decode(sequences).seconds
    assert longer.most_sequences() <= one.most_sequences()


@given(sequences=st.integers(1, 64), context=st.integers(256, 200_000), cp=st.sampled_from([1, 2]))
def test_memory_is_the_same_as_counted_parameter_by_parameter(sequences: int, context: int, cp: int) -> None:
    one = plan(layout=Layout(dp=4, tp=2, cp=cp, ep=8), context=context)
    slowly = decoding_memory(
        V3, one.layout, context=context, sequences=4 * sequences, form="fp8", mtp=True, runtime=int(H800.runtime)
    )
    assert sum(one.memory(sequences).values()) == pytest.approx(slowly.total, rel=1e-3)


def test_what_fits_fits_and_one_more_does_not() -> None:
    one = plan(context=8192)
    most, usable = one.most_sequences(), serving.USABLE * H800.memory
    assert sum(one.memory(most).values()) <= usable < sum(one.memory(most + 1).values())
    longest = one.with_(context=one.largest_context())
    assert longest.most_sequences() == 1
    assert longest.with_(context=longest.context + 1000).most_sequences() == 0


def test_half_the_experts_or_half_the_cache_is_half_the_memory() -> None:
    one, other = plan(), plan(layout=Layout(dp=4, tp=8, ep=32))
    assert other.memory(1)["experts"] == one.memory(1)["experts"] / 2
    halved = plan(layout=Layout(tp=8, cp=2, ep=16))
    assert halved.memory(1)["cache"] == one.memory(1)["cache"] / 2
    assert plan(cache="fp8").memory(1)["cache"] == one.memory(1)["cache"] * 656 / 1152


def test_fewest_devices() -> None:
    home = plan(device=find("RTX-4090", table()))
    assert next(n for n in serving.counts(home.device) if serving.best(home, n)) == 128
    few = serving.smallest(home)
    assert few is not None and few.layout.devices == 128
    found = serving.smallest(plan(acceptance=None, context=8192))
    assert found is not None and found.layout.devices == 16
    tiny = serving.smallest(plan().with_(config=preset("demo"), context=256))
    assert tiny is not None and tiny.layout == Layout()
    narrow = serving.smallest(plan(form="int4"))
    assert narrow is not None and narrow.layout.devices == 8


def test_narrower_weights_and_better_devices_need_no_more_devices() -> None:
    for device in table().values():
        fewest = [serving.smallest(plan(device=device, form=form)) for form in ("bf16", "fp8", "int4")]
        counts = [found.layout.devices if found else 10**9 for found in fewest]
        assert counts == sorted(counts, reverse=True)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="So many sequences do not fit"):
        serving.sequences_per_rank(plan(), 10**6)
    assert serving.sequences_per_rank(plan(), 2) == 1


def test_prefill_is_bound_by_products_and_decoding_by_memory() -> None:
    fast = prefill(V3, H800, Layout(dp=32, ep=32), context=4096, form="fp8")
    slow = decode(V3, H800, Layout(dp=32, ep=32), context=4096, sequences=1, form="fp8")
    assert fast.per_device > 100 * slow.per_device


def test_a_cut_share_is_what_is_counted() -> None:
    part = share(V3, UNIT, 0, "fp8", mtp=False)
    assert part.experts_per_layer == 2
    assert part.expert_bytes == pytest.approx(2 / 256 * share(V3, Layout(), 0, "fp8", mtp=False).expert_bytes)


# Advice ---------------------------------------------------------------------------------------------------------------


def test_advice_is_what_planning_anew_says() -> None:
    now = plan()
    before = now.decode(now.busy_sequences()).per_device
    found = {change.what: change for change in serving_advice(now)}
    narrow = now.with_(form="int4")
    assert found["weights in int4"].speed == pytest.approx(narrow.decode(narrow.busy_sequences()).per_device / before)
    speeds = [change.speed for change in serving_advice(now)]
    assert speeds == sorted(speeds, reverse=True)


def test_advice_for_a_batch_keeps_the_batch() -> None:
    """Fewer data ranks have more of it each."""
    now = plan(layout=Layout(dp=16, ep=16), context=8192)
    found = {change.what: change for change in serving_advice(now, 8)}
    other = now.with_(layout=Layout(dp=2, tp=8, ep=16))
    rate = other.decode(4).per_device / (8 / 16 * now.decode(1).per_device)
    assert found["tp=8, dp=2 (now tp=1, dp=16)"].speed == pytest.approx(rate) and rate > 1


def test_advice_on_experts_that_lie_nowhere_spread_is_to_spread_them() -> None:
    now = plan(layout=Layout(dp=16), context=4096, form="int4")
    assert now.most_sequences() == 0
    assert any(change.what == "ep=16 (now ep=1)" and change.fits for change in serving_advice(now))


def test_advice_where_nothing_fits_is_what_makes_it_fit() -> None:
    now = plan(layout=Layout(dp=8, ep=8), context=8192)
    assert now.most_sequences() == 0
    found = serving_advice(now)
    assert found[0].fits
    assert any(change.what == "twice the devices, ep=16" for change in found)


def test_advice_for_training_beyond_memory_is_recomputation() -> None:
    now = Plan(V3, H800, REPORT.with_(recompute="none"), 4096, 15360, form="fp8")
    assert now.spare < 0
    found = training_advice(now)
    assert {"recompute=selective", "recompute=full"} <= {change.what for change in found if change.fits}


# Devices --------------------------------------------------------------------------------------------------------------


def test_devices_by_name() -> None:
    assert find("h100", table()).name == "H100-80GB"
    with pytest.raises(UserError, match="did you mean A100-40GB or A100-80GB"):
        find("A100", table())
    with pytest.raises(UserError, match=r"did you mean H800\?"):
        find("H80O", table())


def test_devices_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[Mine]\nmemory_gb = 100\nbandwidth_gbs = 500\nfp32_tflops = 10\n", encoding="utf-8")
    mine = find("mine", read_devices(file))
    assert (mine.memory, mine.native, mine.per_node, mine.price) == (100e9, "fp32", 1, 0.0)
    assert mine.peak("fp8") == mine.peak("bf16") == 10e12
    assert "H800" in read_devices(file)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "holds no device"),
        ("[A", "is not TOML"),
        ("A = 1", r"\[NAME\] on a line"),
        ("[A]\nmemory_gb = 1\n", "without bandwidth_gbs"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = 1\n", "without a speed"),
        ("[A]\nmemory_gb = -1\nbandwidth_gbs = 1\nbf16_tflops = 1\n", "memory_gb a positive number"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = nan\nbf16_tflops = 1\n", "bandwidth_gbs a positive number"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = 1\nbf16_tflop = 1\n", "did you mean bf16_tflops"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = 1\nbf16_tflops = 1\nper_node = 0\n", "per_node a whole number"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = 1\nbf16_tflops = 1\nper_node = 8\nlink_gbs = 0\n", "what joins them"),
        ("[A]\nmemory_gb = 1\nbandwidth_gbs = 1\nbf16_tflops = 1\nchecked = 'no'\n", "checked true or false"),
    ],
)
def test_device_files_that_cannot_be_planned_with(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        read_devices(file)
