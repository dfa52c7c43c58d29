"""The single product over all shapes and values; softmax, router and norms at the edges of what floats can hold."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.kernels import native
from cavelight.model.transformer import Transformer
from cavelight.run.quick import BUILD
from cavelight.spec.formats import Format
from cavelight.weights.quant import pack, unpack

from .native_views import Case, Outcome, Store, assert_close, case, native_view, plain_only, step, stored
from .reference.tiny import V2, tiny
from .run_models import small_config

CONFIG = small_config()
FORMATS = [Format("int", bits=8), *(Format("int", bits=8, group=g) for g in (16, 32, 48, 128))]
FORMATS += [Format("int", bits=4), *(Format("int", bits=4, group=g) for g in (8, 16, 32, 64, 128, 256, 384))]
KINDS: list[Store] = [torch.float32, torch.bfloat16, *FORMATS]
SCALES = [torch.float32, torch.float16, torch.bfloat16]


def product(m: native.Matrix, x_TI: Tensor) -> Tensor:
    library = BUILD.get(wait=True)
    assert library is not None
    return native.product(library, m, x_TI)


def as_stored(weight_OI: Tensor, store: Store, scale: torch.dtype) -> tuple[native.Matrix, Tensor]:
    """As the library has it, and its true values."""
    if isinstance(store, torch.dtype):
        weight_OI = weight_OI.to(store)
        made = native.matrix(weight_OI)
        assert made is not None
        return made, weight_OI
    parts = pack(weight_OI, store, scale)
    made = native.packed_matrix(
        parts["weight_packed"], parts["weight_scale"], store.bits, store.group, weight_OI.shape[1]
    )
    assert made is not None
    return made, unpack(parts, store, torch.float64)


def values(shape: tuple[int, int], kind: str, source: torch.Generator) -> Tensor:
    plain = torch.randn(shape, generator=source)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "some zeros":
        return plain * (torch.rand(shape, generator=source) < 0.3)
    if kind == "large":
        return plain * 1e15
    if kind == "tiny":
        return plain * 1e-15
    if kind == "outliers":
        return plain * 10 ** (3 * torch.rand(shape, generator=source) ** 8)
    return plain


VALUES = st.sampled_from(["plain", "zeros", "some zeros", "large", "tiny", "outliers"])
WIDTHS = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 127, 128, 129, 255, 256, 257, 384, 512]), st.integers(1, 700)
)


@settings(max_examples=300, deadline=None)
@given_by(
    st.sampled_from(KINDS), st.sampled_from(SCALES), st.integers(1, 19), WIDTHS, st.integers(1, 9), VALUES, VALUES,
    st.integers(0, 1 << 30),
)  # fmt: skip
def test_a_product_of_any_shape_and_values(
    store: Store,
    scale: torch.dtype,
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    T: int,
    of_w: str,
    of_x: str,
    seed: int,
) -> None:
    if scale == torch.float16 and of_w in ("large", "tiny"):
        scale = torch.bfloat16  # no such scales in float16
    source = torch.Generator().manual_seed(seed)
    m, weight_OI = as_stored(values((O, I), of_w, source), store, scale)
    x_TI = values((T, I), of_x, source)
    y_TO = product(m, x_TI)
    true_TO = x_TI.double() @ weight_OI.double().T
    most_TO = x_TI.double().abs() @ weight_OI.double().abs().T
    # Sixteen sums side by side, each rounding once a number; scales round once more.
    assert ((y_TO - true_TO).abs() <= 2.0**-23 * (math.sqrt(I / 16) + 4) * most_TO + 1e-38).all()
    for t in range(T):
        assert torch.equal(product(m, x_TI[t : t + 1])[0], y_TO[t])


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, *FORMATS[:2], *FORMATS[5:8]], ids=str)
def test_long_rows_and_many(store: Store) -> None:
    """More than one part of a matrix (512 rows) and more columns than the models here have."""
    source = torch.Generator().manual_seed(0)
    m, weight_OI = as_stored(torch.randn(1037, 2100, generator=source), store, torch.bfloat16)
    x_TI = torch.randn(7, 2100, generator=source)
    assert_close(product(m, x_TI).double().float(), (x_TI.double() @ weight_OI.double().T).float(), 2e-6)


def both(model: Transformer, given: Case) -> tuple[Outcome, Outcome]:
    view = native_view(model)
    ours = step(view, given)
    with plain_only():
        return ours, step(view, given)


def assert_both(model: Transformer, given: Case, error: float = 1e-5) -> None:
    for a, b in zip(*(outcome.all() for outcome in both(model, given)), strict=True):
        assert_close(a, b, error)
        assert torch.isfinite(b).all()


def change(model: Transformer, name: str, act: Callable[[Tensor], Any]) -> None:
    for full, tensor in model.named_parameters():
        if name in full:
            act(tensor.data)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e9, 1e14])
def test_scores_of_any_size(factor: float) -> None:
    """Equal ones, all but equal ones, and ones of which the largest takes all."""
    model = stored(CONFIG, torch.float32)
    change(model, "q_b_proj", lambda t: t.mul_(factor))
    assert_both(model, case(CONFIG, [(0, 2), (3, 1), (70, 4), (600, 2)], 4, torch.float32))


def test_equal_rows() -> None:
    given = case(CONFIG, [(700, 3)], 4, torch.float32)
    given.cache.rows_MZW[:] = given.cache.rows_MZW[:, :1].clone() * 100
    assert_both(stored(CONFIG, torch.float32), given)


def test_scores_far_below_zero() -> None:
    """Where all that a query sees is, say, -1e33, it still has a largest."""
    model = stored(CONFIG, torch.float32)
    change(model, "q_b_proj", lambda t: t.mul_(1e17))
    change(model, "kv_a_proj_with_mqa", lambda t: t[CONFIG.kv_lora_rank :].mul_(1e16))
    assert_both(model, case(CONFIG, [(0, 1), (0, 1), (0, 1), (0, 1)], 4, torch.float32))


def test_a_past_that_counts_for_nothing() -> None:
    """Whole pieces of which no weight is left, before the piece that has it all, and after it."""
    model = stored(CONFIG, torch.float32)
    for position in (5, 300, 690):
        given = case(CONFIG, [(700, 2)], 4, torch.float32)
        given.cache.rows_MZW[:, given.cache.slots(given.spans[0])[position]] *= 1e6
        assert_both(model, given)


WHERE = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_up", "v_up", "o_proj", "gate.weight", "experts.gate_proj",
         "experts.down_proj", "shared_experts.up_proj", "layers.0.mlp.down_proj", "input_layernorm", "q_a_layernorm",
         "kv_a_layernorm", "post_attention_layernorm"]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", WHERE)
def test_what_is_not_finite_comes_out_where_the_twin_has_it(where: str, dtype: torch.dtype, value: float) -> None:
    source = random.Random(where)
    for config in (small_config(num_nextn_predict_layers=0), tiny(V2, q_lora_rank=24)):
        model = stored(config, dtype)
        change(model, where, lambda t: t.view(-1).__setitem__(source.randrange(t.numel()), value))
        ours, theirs = both(model, case(config, [(4, 1), (5, 1), (70, 1), (3, 1), (9, 1)], 4, torch.float32))
        broken = [~torch.isfinite(outcome.hidden[0]).all(dim=1) for outcome in (ours, theirs)]
        assert torch.equal(*broken)
        whole_T = ~broken[0]
        assert_close(ours.hidden[0][whole_T], theirs.hidden[0][whole_T])


@pytest.mark.parametrize("groups", [1, 4])
def test_a_router_that_gives_no_number_is_heard(groups: int) -> None:
    """NaN is chosen, whichever expert's it is, and so comes out."""
    for expert in range(8):
        model = stored(small_config(n_group=groups, topk_group=(groups + 1) // 2), torch.float32)
        change(model, "mlp.gate.weight", lambda t, e=expert: t[e].fill_(math.nan))  # type: ignore[misc]
        ours, theirs = both(model, case(CONFIG, [(0, 3), (5, 1)], 4, torch.float32))
        assert theirs.hidden[0].isnan().all() and ours.hidden[0].isnan().all()


def test_cache_rows_of_nobody_may_hold_anything() -> None:
    given = case(CONFIG, [(0, 3), (70, 2), (513, 1)], 4, torch.float32)
    model = stored(CONFIG, torch.float32)
    before = step(native_view(model), given)
    kept_Z = torch.zeros(given.cache.rows_MZW.shape[1], dtype=torch.bool)
    for span in given.spans:
        kept_Z[given.cache.slots(span)[: span.start]] = True
    given.cache.rows_MZW[:, ~kept_Z] = math.nan
    for a, b in zip(before.rows(), step(native_view(model), given).rows(), strict=True):
        assert torch.equal(a, b)
