"""One training step of ours against the restatement: every part of the loss, every gradient, and the biases after it.

The batch has two rows, of two and three documents, one of them too short for the deeper predictions.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from cavelight.data.batches import IGNORE, Batch
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.recipe import TrainSection
from cavelight.train.balance import update_biases
from cavelight.train.loss import Losses, losses
from cavelight.train.optim import Optimizer
from cavelight.train.step import train_step

from .reference import report, training
from .reference.ours import in_hf_names, our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny

MTP_WEIGHT, BALANCE_ALPHA, BIAS_SPEED = 0.3, 0.05, 0.01
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
    return model, losses(model, our_batch(rows_of(CONFIGS[name]), CONFIGS[name], across))


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
    assert BALANCE_ALPHA * parts.balance.item() == pytest.approx(step.balance.item(), abs=1e-6)
    assert parts.total(MTP_WEIGHT, BALANCE_ALPHA).item() == pytest.approx(step.loss.item(), abs=1e-5)


@by_mask
@by_config
def test_every_gradient_equals_the_restatement(name: str, across: bool) -> None:
    _, wanted = expected(name, across)
    model, parts = our_step(name, across)
    parts.total(MTP_WEIGHT, BALANCE_ALPHA).backward()
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
    recipe = TrainSection(mtp_weight=MTP_WEIGHT, balance_alpha=BALANCE_ALPHA, bias_speed=BIAS_SPEED)
    step, wanted = expected(name, False)
    model = our_model(config, weights_of(name))
    micro_batches = [our_batch([row], config, False) for row in rows]
    result = train_step(model, Optimizer(model, recipe), micro_batches, recipe, learning_rate=0.0)
    norm = sum(float((gradient**2).sum()) for gradient in wanted.values()) ** 0.5
    assert result.loss == pytest.approx(step.main.item(), abs=1e-5)
    assert result.mtp_loss == pytest.approx(step.mtp[0].item(), abs=1e-5)
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
