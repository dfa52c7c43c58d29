"""The planner's memory: V3's own figures, what has to hold for any model and layout, and our engine as it runs.

Letters: T tokens, J prediction depths.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function

from cavelight.data.batches import Batch
from cavelight.kernels import attend, causal, cross_entropy, experts, norm, swiglu
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.plan import here, passes
from cavelight.plan.activations import kept_bytes, layer_tensors, remade_bytes
from cavelight.plan.here import decoding_here, training_here
from cavelight.plan.layout import TENSOR_AXES, Layout, Schedule, stages_of
from cavelight.plan.memory import cache_row_bytes, decoding_memory, in_flight, training_memory
from cavelight.plan.passes import Section, sections, walk
from cavelight.run import generate
from cavelight.spec import cost
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset
from cavelight.spec.sections import TrainSection
from cavelight.spec.shapes import parameters
from cavelight.train import evaluate
from cavelight.train.adamw import AdamW
from cavelight.train.loss import Weights, losses
from cavelight.train.optim import Optimizer, initialise
from cavelight.train.step import train_step

V3, NANO = preset("deepseek-v3"), preset("nano")
REPORT = Layout.of("dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe")
ROOT = Path(__file__).parent.parent


# Clusters -------------------------------------------------------------------------------------------------------------


def test_v3_trains_on_2048_devices_of_80_gigabytes_without_tensor_parallelism() -> None:
    memory = training_memory(V3, REPORT, row=4096, precision="fp8")
    assert 60e9 < memory.total < 80e9
    assert memory.where == "stages 0 and 15"
    # The report's reasons why (section 3.2.3 and 3.3.3): without any of them it would not fit.
    assert training_memory(V3, REPORT.with_(recompute="none"), row=4096, precision="fp8").total > 80e9
    assert training_memory(V3, REPORT, row=4096, precision="bf16").total > 80e9
    assert training_memory(V3, REPORT.with_(zero=0), row=4096, precision="fp8").total > 80e9


def test_cache_of_v3() -> None:
    assert 61 * cache_row_bytes(V3) == 70_272
    assert cache_row_bytes(V3, "fp8") == 656
    context = 131_072
    assert decoding_memory(V3, context=context, mtp=False).parts["cache"] == 70_272 * context
    with_mtp = decoding_memory(V3, context=context, cache="fp8", sequences=3)
    assert with_mtp.parts["cache"] == 62 * 656 * context * 3


def test_one_device_holds_the_whole_model() -> None:
    memory = training_memory(V3, row=1, rows=1)
    elements = cost.total_parameters(V3, mtp=True)
    biases = 59 * 256
    assert memory.parts["weights"] == cost.weight_bytes(V3)
    assert memory.parts["masters"] == memory.parts["gradients"] == memory.parts["optimizer"] == 4 * (elements - biases)
    assert decoding_memory(V3, context=1, form="fp8").parts["MTP weights"] == pytest.approx(11.6e9, rel=0.02)


@pytest.mark.parametrize("schedule, most", [("1f1b", 16), ("zb1p", 16), ("dualpipe", 17), ("dualpipev", 17)])
def test_micro_batches_in_flight_are_table_2s(schedule: Schedule, most: int) -> None:
    layout = REPORT.with_(schedule=schedule)
    kept = [sum(in_flight(layout, stage) for stage in stages_of(layout, r)) for r in range(layout.pipeline)]
    assert max(kept) == most


@given(
    pp=st.integers(1, 3), ep=st.sampled_from([1, 2, 4, 8]), schedule=st.sampled_from(["1f1b", "dualpipe", "dualpipev"])
)
def test_weights_of_all_devices_are_the_model(pp: int, ep: int, schedule: Schedule) -> None:
    layout = Layout(dp=8, ep=ep, pp=pp if schedule == "1f1b" else 2, zero=3, schedule=schedule)
    per_rank = [training_memory(NANO, layout, row=8, rank=rank).parts["weights"] for rank in range(layout.pipeline)]
    copied = 2 * NANO.vocab_size * NANO.hidden_size if schedule == "1f1b" and layout.pp > 1 else 0  # MTP's embedding
    whole = cost.weight_bytes(NANO) + copied
    assert sum(per_rank) * layout.ranks == pytest.approx(whole, rel=0.01)  # what does not divide by 8 is rounded up


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_serving_weights_of_all_devices_are_the_model(pp: int) -> None:
    def weights(layout: Layout) -> int:
        ranks = (decoding_memory(NANO, layout, context=8, rank=rank).parts for rank in range(pp))
        return sum(parts["weights"] + parts["MTP weights"] for parts in ranks)

    copied = 2 * NANO.vocab_size * NANO.hidden_size if pp > 1 else 0  # MTP's embedding
    assert weights(Layout(pp=pp)) == cost.weight_bytes(NANO) + copied
    saved = {ep: weights(Layout(pp=pp)) - weights(Layout(dp=8, ep=ep, pp=pp)) for ep in (1, 2, 4)}
    experts = sum(2 * p.size for p in parameters(NANO) if p.role == "expert")
    assert saved == {1: 0, 2: experts // 2, 4: experts * 3 // 4}
    cut = sum(2 * p.size for p in parameters(NANO) if p.role != "expert" and TENSOR_AXES.intersection(p.axes))
    assert weights(Layout(pp=pp)) - weights(Layout(pp=pp, tp=2)) == (cut + copied) // 2


@given(row=st.integers(16, 4096), rows=st.integers(1, 4), more=st.integers(2, 5), layers=st.integers(4, 8))
def test_training_grows_with_rows_tokens_and_layers(row: int, rows: int, more: int, layers: int) -> None:
    config = preset("small").replace(num_hidden_layers=layers)
    one = training_memory(config, row=row, rows=rows)
    for larger in (
        training_memory(config, row=row * more, rows=rows),
        training_memory(config, row=row, rows=rows * more),
    ):
        for part in ("activations", "logits"):
            assert larger.parts[part] == pytest.approx(more * one.parts[part], abs=more)
        assert larger.parts["weights"] == one.parts["weights"]
    assert training_memory(config.replace(num_hidden_layers=layers + 1), row=row, rows=rows).total > one.total
    assert training_memory(config, row=row, rows=rows, imbalance=1.5).total > one.total
    assert training_memory(config, row=row, rows=rows, logits_chunk=row // 2).parts["logits"] < one.parts["logits"]


@pytest.mark.parametrize("layer", [0, 10])
def test_recomputation_keeps_less_and_makes_the_rest_again(layer: int) -> None:
    tensors = layer_tensors(V3, layer)
    none, selective, full = (kept_bytes(tensors, how) for how in ("none", "selective", "full"))
    assert none > selective > full == 2 * V3.hidden_size
    assert remade_bytes(tensors, "selective") == none - selective
    fp8 = layer_tensors(V3, layer, "fp8")
    assert [t.name for t in fp8] == [t.name for t in tensors] and kept_bytes(fp8, "none") < none


def test_a_moe_layer_of_v3_by_hand() -> None:
    """bf16, nothing recomputed, in elements: eq. 1-11 with 128 heads, then eight experts and the shared one."""
    attention = 2 * 7168 + 2 * 1536 + 576 + 512 + 2 * 128 * 192 + 128 * 128 + 128 * 128
    ffn = 2 * 7168 + 8 * 7168 + 9 * 3 * 2048 + 8 * 7168
    assert kept_bytes(layer_tensors(V3, 10), "none") == 2 * (attention + ffn) + 4 * (128 + 256)


@given(context=st.integers(512, 100_000), more=st.integers(2, 4), cp=st.sampled_from([1, 2, 4]))
def test_serving_grows_with_context_and_shrinks_with_context_ranks(context: int, more: int, cp: int) -> None:
    one = decoding_memory(NANO, context=context)
    assert decoding_memory(NANO, context=context * more).parts["cache"] == more * one.parts["cache"]
    assert decoding_memory(NANO, Layout(dp=2), context=context, sequences=2 * more).parts["cache"] == (
        more * one.parts["cache"]
    )
    cut = decoding_memory(NANO, Layout(cp=cp), context=context * cp)
    assert cut.parts["cache"] == one.parts["cache"]


# Our own engine -------------------------------------------------------------------------------------------------------


def batch_of(config: ModelConfig, rows: int, row: int) -> Batch:
    T, J = rows * row, 1 + config.num_nextn_predict_layers
    tokens_T = torch.randint(config.vocab_size, (T,))
    targets_TJ = torch.randint(config.vocab_size, (T, J))
    lengths = (row,) * rows
    return Batch(tokens_T, targets_TJ, torch.arange(row).repeat(rows), lengths, lengths)


def kept_by_autograd(config: ModelConfig, rows: int, row: int, dtype: torch.dtype) -> int:
    """Bytes of all storages that a micro-batch's graph holds, the model's own left out."""
    model = Transformer(config, dtype)
    initialise(model, 0.02, seed=0)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    pack = norm._pack

    def keep(tensor: torch.Tensor) -> Any:
        kept = pack(tensor)
        if isinstance(kept, torch.Tensor) and kept.untyped_storage().data_ptr() not in own:
            storages[kept.untyped_storage().data_ptr()] = kept.untyped_storage()
        return kept

    with patch.object(norm, "_pack", keep):
        losses(model, batch_of(config, rows, row))
    return sum(storage.nbytes() for storage in storages.values())


CONFIGS = {
    "demo": preset("demo"),
    "dense": preset("demo").replace(num_hidden_layers=1, num_nextn_predict_layers=0),
    "two modules, before the norm": preset("nano").replace(num_nextn_predict_layers=2, mtp_hidden="pre_norm"),
    "no query latent, narrow values": preset("nano").replace(q_lora_rank=None, v_head_dim=8),
    "wide values": preset("nano").replace(v_head_dim=40),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_autograd_keeps_is_counted_to_a_thousandth(name: str, dtype: passes.Dtype) -> None:
    config = CONFIGS[name]
    kept = kept_by_autograd(config, 3, 20, getattr(torch, dtype))  # below 64 tokens: no padding, which hangs on routing
    counted = sum(section.kept for section in sections(config, 3, 20, dtype))
    assert counted == pytest.approx(kept, rel=1e-3)


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `work` has allocated when it comes to "between", and the most at any moment, as torch counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    live, most, between = 0, 0, 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "between":
            between = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return between, most


HEADS = CONFIGS["dense"].replace(num_attention_heads=32, vocab_size=512)
WAYS = {  # and rows, and tokens of each: below 64 in all no padding, which hangs on routing
    "demo": (preset("demo"), 8, 256),
    "wide feed-forward": (CONFIGS["dense"].replace(intermediate_size=4096, vocab_size=512), 8, 256),
    "many heads": (HEADS, 12, 256),
    "many heads of narrow values": (HEADS.replace(v_head_dim=24), 12, 256),
    "many heads of wide values": (HEADS.replace(v_head_dim=96), 4, 256),
    "large vocabulary": (CONFIGS["dense"].replace(vocab_size=16_384), 8, 256),
    "large vocabulary, few tokens": (CONFIGS["dense"].replace(vocab_size=16_384), 2, 16),
    "large vocabulary, two modules": (
        preset("nano").replace(vocab_size=16_384, num_nextn_predict_layers=2),
        2,
        16,
    ),
    "wide experts": (
        preset("demo").replace(num_hidden_layers=1, first_k_dense_replace=0, moe_intermediate_size=256),
        16,
        256,
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WAYS)
def test_the_way_there_and_back_takes_what_was_counted(name: str, dtype: passes.Dtype) -> None:
    """What functions of ours keep beside autograd, and whatever stands while they compute, is counted too."""
    config, rows, row = WAYS[name]
    model, batch = Transformer(config, getattr(torch, dtype)), batch_of(config, rows, row)
    initialise(model, 0.02, seed=0)

    def there_and_back() -> object:
        total = losses(model, batch).total(Weights())
        with record_function("between"):
            pass
        return torch.autograd.grad(total, tuple(model.parameters()), allow_unused=True)

    between, most = allocated(there_and_back)
    counted = sections(*WAYS[name], dtype)
    assert sum(section.kept for section in counted) == pytest.approx(between, rel=0.005)
    assert walk(counted) == pytest.approx(most, rel=0.05)

    @torch.inference_mode()
    def evaluated() -> object:
        hidden_TD, _ = model(batch.tokens_T, batch.positions_T, PackedAttend(batch.segments), GroupedDispatch())
        return sum(nll_t.sum() for nll_t in evaluate._nll(model, hidden_TD, batch.targets_TJ[:, 0].clone()))

    _, most = allocated(evaluated)
    assert passes.forward_bytes(config, rows * row, row, dtype) == pytest.approx(most, rel=0.05)


def test_the_walk_is_highest_before_or_after_what_it_keeps() -> None:
    kept_only = [Section(10, 3, 0, 0), Section(20, 5, 0, 0)]
    assert walk(kept_only) == 35
    assert walk([Section(10, 0, 0, 50), Section(20, 0, 0, 60)]) == 120  # 30 kept, 60 more; then 10 and 50 for 20
    assert walk([Section(0, 0, 7, 50)] * 3) == 157
    config = preset("small")
    few, many = (walk(sections(config, 1, row, "float32")) for row in (1, 2048))
    gradients = 4 * (cost.total_parameters(config, mtp=True) - 8 * 16)
    table = 4 * config.vocab_size * config.hidden_size  # the embedding's second gradient, before it is added
    assert few == pytest.approx(gradients + table, rel=0.02)
    assert many > sum(section.kept for section in sections(config, 1, 2048, "float32")) > gradients


def test_numbers_of_other_files_are_theirs() -> None:
    assert (here.EVALUATED_AT_ONCE, passes.LOGITS_AT_ONCE) == (evaluate.TOKENS_AT_ONCE, evaluate.LOGITS_AT_ONCE)
    assert (here.CHUNK, here.ROOM) == (generate.CHUNK, generate.ROOM)
    assert (cross_entropy.LOGITS_AT_ONCE, cross_entropy.FEWEST_TOKENS) == (
        passes.LOGITS_IN_TRAINING,
        passes.FEWEST_TOKENS,
    )
    assert causal.TOKENS_AT_ONCE == passes.RAISED_AT_ONCE
    assert (swiglu.AT_ONCE, experts.ROWS_AT_ONCE) == (passes.HIDDEN_AT_ONCE, passes.ROWS_AT_ONCE)
    multiples = [experts._row_multiple(torch.empty(rows, 1, dtype=torch.bfloat16)) for rows in (63, 64)]
    assert multiples == [1, passes.PADDED_ROWS]


@given(
    T=st.integers(1, 600), S=st.integers(1, 5000), H=st.integers(1, 16), C=st.integers(8, 512), N=st.integers(8, 128)
)
def test_the_form_of_attention_is_the_engines(T: int, S: int, H: int, C: int, N: int) -> None:
    assert here._absorbs(T, S, N, 16, 32, C) == attend.absorbed_is_cheaper(T, S, H, N, 16, 32, C)


@given(row=st.integers(16, 1024), micro=st.integers(1, 4), threads=st.integers(1, 4))
def test_our_training_grows_with_what_is_under_way(row: int, micro: int, threads: int) -> None:
    config = preset("demo")

    def total(row: int, rows: int, micro: int, threads: int) -> int:
        return training_here(config, row=row, rows=rows, micro_rows=micro, threads=threads).total

    one = total(row, 8 * micro, micro, threads)
    assert total(row + 1, 8 * micro, micro, threads) >= one
    assert total(row, 8 * micro, 2 * micro, threads) >= one
    assert total(row, 8 * micro, micro, threads + 1) > one
    assert total(row, 80 * micro, micro, threads) == one  # further micro-batches take time, not memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_moments_halve_the_optimizer_and_what_it_saves(dtype: passes.Dtype) -> None:
    config = preset("demo")
    model = Transformer(config, getattr(torch, dtype))
    bytes_of: dict[passes.Dtype, tuple[int, int]] = {}
    for moments in get_args(passes.Dtype):
        kept = Optimizer(model, TrainSection(moments=moments)).state()
        tensors = [t for state in kept["adamw"]["state"].values() for kind, t in state.items() if kind != "step"]
        optimizer = sum(t.nbytes for t in tensors)
        bytes_of[moments] = optimizer, optimizer + sum(t.nbytes for t in kept["masters"].values())
        parts = training_here(config, row=256, rows=4, dtype=dtype, moments=moments).parts
        assert (parts["optimizer"], parts["save under way"]) == bytes_of[moments]
    assert bytes_of["float32"][0] == 2 * bytes_of["bfloat16"][0]


def test_an_update_widens_the_moments_of_one_parameter() -> None:
    """Where few tokens keep little, that is the most of a step: beside the gradients of all."""
    config = preset("demo").replace(num_hidden_layers=2, n_routed_experts=2048)
    wide, narrow = (training_here(config, row=1, rows=1, moments=m).parts for m in ("float32", "bfloat16"))
    elements = narrow["weights"] // 4
    largest = 2048 * config.moe_intermediate_size * config.hidden_size
    assert narrow["activations and gradients"] == 4 * elements + 8 * largest > wide["activations and gradients"]
    many = (training_here(config, row=4096, rows=16, moments=m).parts for m in ("float32", "bfloat16"))
    assert len({parts["activations and gradients"] for parts in many}) == 1


def test_micro_batches_leave_nothing_but_their_sum() -> None:
    config, rows, row = WAYS["large vocabulary, few tokens"]
    model, recipe = Transformer(config, torch.float32), TrainSection()
    initialise(model, 0.02, seed=0)
    optimizer, batches = Optimizer(model, recipe), [batch_of(config, rows, row)] * 3
    _, most = allocated(lambda: train_step(model, optimizer, batches, recipe, 0, 0.0))
    summed = 4 * cost.total_parameters(config)
    assert most == pytest.approx(summed + walk(sections(config, rows, row, "float32")), rel=0.05)


def test_an_update_allocates_two_wide_moments_of_one_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1 << 16)) for _ in range(4)]
    adamw = AdamW([parameters], (0.9, 0.95), torch.bfloat16)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    _, most = allocated(lambda: adamw.step([0.1], [0.0]))
    assert most == pytest.approx(8 << 16, rel=0.05)


@given(prompt=st.integers(1, 3000), new=st.integers(1, 1000), more=st.integers(1, 500))
def test_our_decoding_grows_with_prompt_and_answer(prompt: int, new: int, more: int) -> None:
    config = preset("small").replace(max_position_embeddings=100_000)
    one = decoding_here(config, prompt=prompt, new=new)
    assert decoding_here(config, prompt=prompt, new=new, settles=True).total >= one.total
    assert decoding_here(config, prompt=prompt, new=new, dtype="bfloat16").total < one.total
    assert decoding_here(config, prompt=prompt + here.CHUNK * more, new=new).total >= one.total


MEASURED = """
import json, sys
from pathlib import Path
from bench.peak import peak_bytes
from cavelight.plan.here import training_here
from cavelight.spec.recipe import Recipe
from cavelight.train.loop import train

import torch
torch.set_num_threads(1)
corpus, out = sys.argv[1:]
size = ["data.row_length=16", "train.rows_per_step=1"]
large = ["data.row_length=128", "train.rows_per_step=4", "model.hidden_size=256", "model.vocab_size=20000"]
peaks = []
for name, changes in (("alone", size), ("model", large)):
    told = [f"data.corpus={corpus}", "train.steps=2", "train.dtype=float32", "train.evaluate_every=100", *changes]
    tokenizer = [f"data.tokenizer={out}/alone/model"] if peaks else []
    recipe = Recipe.build({"model": {"preset": "nano"}}, told + tokenizer)
    train(recipe, Path(out) / name)
    peaks.append(peak_bytes())
predicted = training_here(recipe.config, row=128, rows=4, runtime=peaks[0])
print(json.dumps({"alone": peaks[0], "measured": peaks[1], "predicted": predicted.total}))
"""


def test_a_training_run_takes_what_was_predicted(tmp_path: Path) -> None:
    """In a process of its own, first with next to no model: that is what the program takes by itself."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, page in enumerate(sorted((ROOT / "docs").glob("*.md"))):
        (corpus / f"{number}.txt").write_text(page.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "CAVELIGHT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, corpus, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    bytes_of = json.loads(done.stdout.splitlines()[-1])
    assert bytes_of["predicted"] == pytest.approx(bytes_of["measured"], rel=0.10)
    model = bytes_of["measured"] - bytes_of["alone"]
    assert model > 200e6
    assert bytes_of["predicted"] - bytes_of["alone"] == pytest.approx(model, rel=0.20)
