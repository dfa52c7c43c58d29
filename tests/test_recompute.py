"""Recomputation changes what is kept between the passes, and nothing else."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.run.generate import TokenStream
from cavelight.run.quick import quick
from cavelight.spec.config import ModelConfig
from cavelight.spec.sections import Recompute, TrainSection
from cavelight.train.fp8 import emulate
from cavelight.train.loss import Weights, losses
from cavelight.train.optim import Optimizer
from cavelight.train.recompute import recompute
from cavelight.train.step import train_step
from cavelight.train.workers import Workers

from .reference.ours import our_model
from .reference.random_weights import random_weights
from .reference.tiny import V2, tiny
from .test_training_step import our_batch, rows_of

WEIGHTS = Weights(0.3, {"sequence": 0.05})
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
CONFIGS = {
    "v3 with a module": tiny(num_nextn_predict_layers=1, **GROUPS),
    "queries not compressed": tiny(q_lora_rank=None, first_k_dense_replace=0),
    "v2": tiny(V2),
    "wide values": tiny(v_head_dim=24),
}
by_config = pytest.mark.parametrize("name", CONFIGS)
by_way = pytest.mark.parametrize("how", ["selective", "full"])


def model_of(config: ModelConfig, how: Recompute, fp8: bool = False) -> Transformer:
    model = our_model(config, random_weights(config, seed=3))
    if fp8:
        emulate(model)
    recompute(model, how)
    return model


@cache
def gone_through(name: str, how: Recompute, fp8: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and counts of the experts."""
    config = CONFIGS[name]
    model = model_of(config, how, fp8)
    part = losses(model, our_batch(rows_of(config), config, across=True), WEIGHTS)
    gradients = torch.autograd.grad(
        part.total(WEIGHTS), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return list(gradients), list(part.counts)


def kept_bytes(config: ModelConfig, how: Recompute) -> int:
    """What stands between the passes and did not before."""
    model, tokens = model_of(config, how), 256
    ids_T, positions_T = torch.arange(tokens) % config.vocab_size, torch.arange(tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made = model(ids_T, positions_T, PackedAttend((tokens,)), GroupedDispatch())
    kept = sum(event.self_cpu_memory_usage for event in seen.events())
    del made
    return kept


class Counted(TorchDispatchMode):
    """Counts the operations that are computed within."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.counts[str(operation)] += 1
        return operation(*given, **(named or {}))


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@by_config
@by_way
def test_gradients_and_counts_are_the_same_to_the_bit(name: str, how: Recompute, fp8: bool) -> None:
    gradients, counts = gone_through(name, how, fp8)
    plain, plain_counts = gone_through(name, "none", fp8)
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(counts, plain_counts, strict=True))


def test_less_is_kept() -> None:
    config = tiny(num_hidden_layers=4)
    none, selective, full = (kept_bytes(config, how) for how in ("none", "selective", "full"))
    layers_input = 4 * 256 * config.hidden_size * config.num_hidden_layers
    assert full < 0.3 * none and selective < 0.8 * none
    assert full < 3 * layers_input


def computed(config: ModelConfig, how: Recompute, fp8: bool = False) -> Counter[str]:
    """How often each operation is, on the way there and back."""
    model, batch = model_of(config, how, fp8), our_batch(rows_of(config), config, across=True)
    counts = Counter[str]()
    with Counted(counts):
        total = losses(model, batch, WEIGHTS).total(WEIGHTS)
        torch.autograd.grad(total, list(model.parameters()))
    return counts


@pytest.mark.parametrize("compressed", [False, True])
def test_attention_and_down_projections_are_computed_once(compressed: bool) -> None:
    """By `selective`, and the products inside SwiGLU twice."""
    layers = 3
    config = tiny(num_hidden_layers=layers, first_k_dense_replace=layers)
    config = config if compressed else config.replace(q_lora_rank=None)
    none, selective, full = (computed(config, how) for how in ("none", "selective", "full"))
    attention, product = "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten.mm.default"
    assert none[attention] == selective[attention] == full[attention] / 2
    again = 2 * none[attention] + layers * compressed  # keys, values and compressed queries go up
    assert selective[product] - none[product] == again
    silus = [computed(config, how, fp8=True)["aten.silu.default"] for how in ("none", "selective")]
    assert silus == [layers, 2 * layers]


def test_recomputing_keeps_parameters_and_their_names() -> None:
    config = CONFIGS["v3 with a module"]
    assert list(model_of(config, "selective").state_dict()) == list(model_of(config, "none").state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_way
def test_a_model_in_training_is_run_like_any_other(how: Recompute, dtype: torch.dtype) -> None:
    """By a view of its own modules, which widens their numbers, and not by what training put in place of methods."""
    config = CONFIGS["v3 with a module"]
    prompt = [token % config.vocab_size for token in range(40)]  # more than go through layers in one piece
    tokens = []
    for way in (how, "none"):
        model = Transformer(config, dtype)
        model.load_state_dict(model_of(config, "none").state_dict())
        recompute(model, way)
        assert quick(model) is not model
        tokens.append(list(TokenStream(model, prompt, max_new_tokens=5, drafts=1)))
    assert tokens[0] == tokens[1]


@by_way
def test_a_step_of_micro_batches_side_by_side(how: Recompute) -> None:
    config, recipe = CONFIGS["v3 with a module"], TrainSection(learning_rate=0.01, warmup_steps=0, bias_speed=0.01)
    batch = our_batch(rows_of(config), config, across=True)
    after = []
    for way in (how, "none"):
        model = model_of(config, way)
        result = train_step(model, Optimizer(model, recipe), [batch] * 3, recipe, 0, 0.0, Workers(2))
        after.append((result.counts, model.state_dict()))
    assert all(torch.equal(one, other) for one, other in zip(after[0][0], after[1][0], strict=True))
    assert all(torch.equal(tensor, after[1][1][name]) for name, tensor in after[0][1].items())
