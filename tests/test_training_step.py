"""One training step of ours against the restatement: every part of the loss, every gradient, and the biases after it.

The batch has two rows, of two and three documents, one of them too short for the deeper predictions.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cavelight.data.batches import IGNORE, Batch
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.sections import TrainSection
from cavelight.train.balance import Rows, update_biases
from cavelight.train.ema import Ema
from cavelight.train.loss import Losses, Weights, losses
from cavelight.train.optim import Optimizer
from cavelight.train.step import StepResult, train_step

from .reference import report, training
from .reference.ours import in_hf_names, our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny

MTP_WEIGHT, BALANCE_ALPHA, BIAS_SPEED = 0.3, 0.05, 0.01
WEIGHTS = Weights(MTP_WEIGHT, {"sequence": BALANCE_ALPHA})
RECIPE = TrainSection(
    learning_rate=0.01, warmup_steps=0, mtp_weight=MTP_WEIGHT, balance_alpha=BALANCE_ALPHA, bias_speed=BIAS_SPEED
)
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
CONFIGS = {
    "v3, one module": tiny(num_nextn_predict_layers=1, **GROUPS),
    "v3, three modules": tiny(num_nextn_predict_layers=3, num_hidden_layers=1, first_k_dense_replace=0, **GROUPS),
    "v3, module before the norm": tiny(num_nextn_predict_layers=1, mtp_hidden="pre_norm", q_lora_rank=None),
    "v3, no module": tiny(),
    "v2, group limited": tiny(V2, topk_method="group_limited_greedy", routed_scaling_factor=4.0, **GROUPS),
}
by_config = pytest.mark.parametrize("name", CONFIGS)
by_mask = pytest.mark.parametrize("across", [False, True], ids=["documents masked", "attention across documents"])


def rows_of(config: ModelConfig) -> list[training.Row]:
    tokens = iter(some_tokens(config, 21, seed=5))
    return [[[next(tokens) for _ in range(length)] for length in row] for row in ((7, 4), (3, 2, 5))]


def our_batch(rows: list[training.Row], config: ModelConfig, across: bool) -> Batch:
    """The rows' inputs end to end; at column k of the targets the token k+1 places on, within its document and row."""
    tokens, targets, segments = [], [], []
    for row in rows:
        laid = training.Tokens.of(row)
        read, depths = len(laid.ids) - 1, range(config.num_nextn_predict_layers + 1)
        tokens += laid.ids[:read]
        targets += [[laid.ids[i + k + 1] if laid.has_label(i, k) else IGNORE for k in depths] for i in range(read)]
        lengths = [*(len(document) for document in row[:-1]), len(row[-1]) - 1]
        segments += [read] if across else lengths
    return Batch(
        tokens_T=torch.tensor(tokens),
        targets_TJ=torch.tensor(targets),
        positions_T=torch.cat([torch.arange(length) for length in segments]),
        rows=tuple(sum(map(len, row)) - 1 for row in rows),
        segments=tuple(segments),
    )


@cache
def weights_of(name: str) -> dict[str, Tensor]:
    return random_weights(CONFIGS[name], seed=4)


@cache
def expected(name: str, across: bool) -> tuple[training.Step, dict[str, Tensor]]:
    """The restated step and its gradients."""
    leaves = {n: w.clone().requires_grad_(not n.endswith("correction_bias")) for n, w in weights_of(name).items()}
    step = training.step(leaves, CONFIGS[name], rows_of(CONFIGS[name]), MTP_WEIGHT, BALANCE_ALPHA, across)
    return step, training.gradients(leaves, step.loss)


def our_step(name: str, across: bool) -> tuple[Transformer, Losses]:
    model = our_model(CONFIGS[name], weights_of(name))
    return model, losses(model, our_batch(rows_of(CONFIGS[name]), CONFIGS[name], across), WEIGHTS)


def gradients_in_hf_names(model: Transformer) -> dict[str, Tensor]:
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return in_hf_names(model.config, ours | dict(model.named_buffers()))


def assert_gradients_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Wanted says nothing of experts that no token chose; there nothing may be found either."""
    for name, gradient in found.items():
        if name.endswith("correction_bias"):
            continue
        torch.testing.assert_close(
            gradient,
            wanted.get(name, torch.zeros_like(gradient)),
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@by_mask
@by_config
def test_losses_equal_the_restatement(name: str, across: bool) -> None:
    step, _ = expected(name, across)
    _, parts = our_step(name, across)
    assert parts.main.item() == pytest.approx(step.main.item(), abs=1e-5)
    assert [loss.item() for loss in parts.mtp] == pytest.approx([loss.item() for loss in step.mtp], abs=1e-5)
    assert BALANCE_ALPHA * parts.balance["sequence"].item() == pytest.approx(step.balance.item(), abs=1e-6)
    assert parts.total(WEIGHTS).item() == pytest.approx(step.loss.item(), abs=1e-5)


@by_mask
@by_config
def test_every_gradient_equals_the_restatement(name: str, across: bool) -> None:
    _, wanted = expected(name, across)
    model, parts = our_step(name, across)
    parts.total(WEIGHTS).backward()
    found = gradients_in_hf_names(model)
    assert set(wanted) <= set(found)
    assert_gradients_equal(found, wanted)


@by_mask
@by_config
def test_counts_and_biases_after_the_step_equal_the_restatement(name: str, across: bool) -> None:
    step, _ = expected(name, across)
    model, parts = our_step(name, across)
    assert [counts_E.tolist() for counts_E in parts.counts] == list(step.counts.values())
    if CONFIGS[name].topk_method != "noaux_tc":
        return
    update_biases(model, parts.counts, BIAS_SPEED)
    found = in_hf_names(CONFIGS[name], dict(model.state_dict()))
    for bias, wanted_E in training.updated_biases(weights_of(name), step.counts, BIAS_SPEED).items():
        torch.testing.assert_close(found[bias], wanted_E, rtol=0, atol=1e-7)
        assert not torch.equal(found[bias], weights_of(name)[bias])


def test_a_step_of_micro_batches_equals_the_restatement() -> None:
    """Sums add up to the step's, the gradient's norm is the whole one, and the biases move once, by all counts."""
    name = "v3, one module"
    config, rows = CONFIGS[name], rows_of(CONFIGS[name])
    step, wanted = expected(name, False)
    model = our_model(config, weights_of(name))
    micro_batches = [our_batch([row], config, False) for row in rows]
    result = train_step(model, Optimizer(model, RECIPE), micro_batches, RECIPE, step=0, progress=0.0)
    norm = sum(float((gradient**2).sum()) for gradient in wanted.values()) ** 0.5
    assert result.loss == pytest.approx(step.main.item(), abs=1e-5)
    assert result.mtp_losses == pytest.approx([step.mtp[0].item()], abs=1e-5)
    assert (result.learning_rate, result.skipped) == (0.01, False)
    assert result.balance_loss * BALANCE_ALPHA == pytest.approx(step.balance.item(), abs=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    found = in_hf_names(config, dict(model.state_dict()))
    for bias, wanted_E in training.updated_biases(weights_of(name), step.counts, BIAS_SPEED).items():
        torch.testing.assert_close(found[bias], wanted_E, rtol=0, atol=1e-7)


def test_one_sequence_is_divided_as_the_report_says() -> None:
    """V3 report, equation 24: L_k is a sum of T - k terms over T. By hand, without the restatement's `step`."""
    config, weights = CONFIGS["v3, one module"], weights_of("v3, one module")
    tokens = some_tokens(config, 13)
    with torch.no_grad():
        main_TV, mtp_TV = report.chain_logits(weights, config, tokens[:-1], range(12))
        main = -main_TV.log_softmax(-1)[range(12), tokens[1:]].sum() / 12
        further = -mtp_TV.log_softmax(-1)[range(11), tokens[2:]].sum() / 12
        parts = losses(our_model(config, weights), our_batch([[tokens]], config, False))
    assert parts.main.item() == pytest.approx(main.item(), abs=1e-5)
    assert [loss.item() for loss in parts.mtp] == pytest.approx([further.item()], abs=1e-5)


# What a step adds up from, and what it leaves alone

EVERYTHING = {"expert_alpha": 0.03, "device_alpha": 0.05, "communication_alpha": 0.02, "batch_alpha": 0.04}
ALL_PARTS = RECIPE.model_copy(update={**EVERYTHING, "balance_devices": 4, "optimizer": "muon"})


class Watched(Optimizer):
    """Keeps the gradients that it steps by."""

    taken: dict[str, Tensor]

    def step(self, learning_rate: float, clip_norm: float, norm: Tensor) -> None:
        self.taken = {name: master.grad.clone() for name, master in self.masters.items() if master.grad is not None}
        super().step(learning_rate, clip_norm, norm)


class Stepped(NamedTuple):
    """What a step told, the gradients that it took, and the model's tensors after it."""

    result: StepResult
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


def a_step(name: str, recipe: TrainSection, parted: bool = False, progress: float = 0.0) -> Stepped:
    """One step over the rows, in one micro-batch, or in one for each."""
    model = our_model(CONFIGS[name], weights_of(name))
    optimizer, rows = Watched(model, recipe), rows_of(CONFIGS[name])
    batches = [our_batch(part, CONFIGS[name], False) for part in ([[row] for row in rows] if parted else [rows])]
    result = train_step(model, optimizer, batches, recipe, 7, progress)
    return Stepped(result, optimizer.taken, dict(model.state_dict()))


@by_config
def test_micro_batches_add_up_to_one_batch_in_every_loss_and_gradient(name: str) -> None:
    at_once, parted = a_step(name, ALL_PARTS), a_step(name, ALL_PARTS, parted=True)
    assert set(at_once.result.balance_parts) == {"sequence", "expert", "device", "communication", "batch"}
    for field in ("loss", "mtp_losses", "balance_parts", "grad_norm"):
        assert getattr(parted.result, field) == pytest.approx(getattr(at_once.result, field), rel=1e-5), field
    assert [c.tolist() for c in parted.result.counts] == [c.tolist() for c in at_once.result.counts]
    assert_gradients_equal(parted.gradients, at_once.gradients)


@pytest.mark.parametrize("part", EVERYTHING)
def test_each_loss_moves_the_gates_by_its_own_weight(part: str) -> None:
    """The gradient is linear in every alpha, and differs from the one without."""
    name = "v3, one module"
    without, once, twice = (
        a_step(name, RECIPE.model_copy(update={part: alpha, "balance_devices": 4})).gradients for alpha in (0, 0.1, 0.2)
    )
    gate = "model.layers.1.mlp.gate.weight"
    assert (once[gate] - without[gate]).abs().max() > 1e-5
    for n, gradient in twice.items():
        torch.testing.assert_close(gradient - without[n], 2 * (once[n] - without[n]), atol=2e-6, rtol=1e-3, msg=n)


def test_weights_of_zero_are_a_step_without_these_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not computed, not merely multiplied by zero."""
    name = "v3, one module"
    bare = RECIPE.model_copy(update={"mtp_weight": 0.0, "balance_alpha": 0.0})

    def fail(*arguments: object) -> None:
        raise AssertionError("nobody asked for this")

    for method in ("draft", "draft_nll"):
        monkeypatch.setattr(Transformer, method, fail)
    monkeypatch.setattr(Rows, "sums", fail)
    stepped = a_step(name, bare)
    alone = our_model(CONFIGS[name], weights_of(name))
    expected = losses(alone, our_batch(rows_of(CONFIGS[name]), CONFIGS[name], False), Weights(0.0, {}))
    expected.main.backward()
    assert_gradients_equal(stepped.gradients, {n: p.grad for n, p in alone.named_parameters() if p.grad is not None})
    assert (stepped.result.mtp_losses, stepped.result.mtp_loss, stepped.result.balance_loss) == ((), 0.0, 0.0)
    before = our_model(CONFIGS[name], weights_of(name)).state_dict()
    bias = "mtp.0.block.mlp.gate.e_score_correction_bias"
    assert not stepped.result.counts[-1].any() and torch.equal(stepped.after[bias], before[bias])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_no_loss_reaches_rests_whatever_its_momentum(optimizer: str) -> None:
    """MTP modules at a lambda of 0, after steps at another."""
    config = CONFIGS["v3, one module"]
    recipe = RECIPE.model_copy(update={"optimizer": optimizer, "mtp_weight_late": 0.0, "mtp_late_from": 0.5})
    model, batch = our_model(config, weights_of("v3, one module")), our_batch(rows_of(config), config, False)
    kept = Optimizer(model, recipe)
    written = [deepcopy(dict(model.named_parameters()))]
    for step, progress in enumerate((0.0, 0.1, 0.6, 0.7)):
        train_step(model, kept, [batch], recipe, step, progress)
        written.append(deepcopy(dict(model.named_parameters())))
    begun, _, learnt, _, rested = written
    for name, weight in rested.items():
        assert not torch.equal(begun[name], learnt[name]), name
        assert torch.equal(weight, learnt[name]) == name.startswith("mtp."), name
    train_step(model, kept, [batch], recipe, 4, 0.2)
    assert not torch.equal(dict(model.named_parameters())["mtp.0.eh_proj.weight"], rested["mtp.0.eh_proj.weight"])


def test_what_changes_in_the_course_of_a_run_reaches_the_step() -> None:
    """From 14.3T of 14.8T tokens on biases stand still; lambda is 0.1 and the rate a tenth of its peak by then."""
    name = "v3, one module"
    late = a_step(name, RECIPE, progress=0.97)
    assert late.result.learning_rate == pytest.approx(0.001)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = our_model(CONFIGS[name], weights_of(name)).state_dict()
    assert torch.equal(late.after[bias], before[bias])
    assert not torch.equal(a_step(name, RECIPE).after[bias], before[bias])
    weak = a_step(name, RECIPE.model_copy(update={"mtp_weight": RECIPE.mtp_weight_late}))
    assert_gradients_equal(late.gradients, weak.gradients)


@contextmanager
def made_nan(weight: Tensor) -> Iterator[None]:
    own = weight.detach().clone()
    weight.data.fill_(float("nan"))
    yield
    weight.data.copy_(own)


@pytest.mark.parametrize("why", ["refused", "not finite"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_left_out_leaves_everything_as_it_was(optimizer: str, why: str) -> None:
    """Weights, moments, masters, biases, the average: the next step is the one that would have come anyway."""
    config = CONFIGS["v3, one module"]
    recipe = ALL_PARTS.model_copy(update={"optimizer": optimizer})
    batches = [our_batch([row], config, False) for row in rows_of(config)]
    written = []
    for disturbed in (True, False):
        model = our_model(config, weights_of("v3, one module"))
        kept, ema = Optimizer(model, recipe), Ema(model, 0.9)
        assert not train_step(model, kept, batches, recipe, 0, 0.0, ema=ema).skipped
        if disturbed:
            asked: list[tuple[float, float]] = []

            def refuse(loss: float, grad_norm: float, asked: list[tuple[float, float]] = asked) -> bool:
                asked.append((loss, grad_norm))
                return False

            with made_nan(model.model.norm.weight) if why == "not finite" else nullcontext():
                left = train_step(model, kept, batches, recipe, 1, 0.1, ema=ema, accept=refuse)
            assert left.skipped
            assert asked == ([(left.loss, left.grad_norm)] if why == "refused" else [])
        assert not train_step(model, kept, batches, recipe, 2, 0.2, ema=ema).skipped
        written.append(flatten([model.state_dict(), kept.state(), ema.state()]))
    assert len(written[0]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


def flatten(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tensor for part in inner for tensor in flatten(part)]


def test_the_average_follows_the_masters() -> None:
    name = "v3, no module"
    model = our_model(CONFIGS[name], weights_of(name)).bfloat16()
    optimizer, ema = Optimizer(model, RECIPE), Ema(model, 0.9)
    first = deepcopy(ema.state())
    train_step(model, optimizer, [our_batch(rows_of(CONFIGS[name]), CONFIGS[name], False)], RECIPE, 0, 0.0, ema=ema)
    for n, average in ema.state().items():
        torch.testing.assert_close(average, 0.1 * first[n] + 0.9 * optimizer.masters[n].detach(), msg=n)
