"""Each fast form against its plain twin: attention's two forms, grouped experts with their gradients, packing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.kernels import attend, causal, cross_entropy, experts, norm, swiglu
from cavelight.model.ports import PackedAttend


def attention_inputs(B: int, T: int, S: int, H: int, N: int, R: int, U: int, C: int, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return draw(B, T, H, N), draw(B, T, H, R), draw(B, S, C + R), draw(H, N, C) * C**-0.5, draw(H, U, C) * C**-0.5


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 6),
    past=st.integers(0, 9),
    H=st.integers(1, 3),
    N=st.integers(1, 9),
    half_R=st.integers(1, 3),
    U=st.integers(1, 12),
    C=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_both_forms_of_attention_equal_the_plain_one(
    B: int, T: int, past: int, H: int, N: int, half_R: int, U: int, C: int, seed: int
) -> None:
    inputs = attention_inputs(B, T, T + past, H, N, 2 * half_R, U, C, seed)
    scale = (N + 2 * half_R) ** -0.5
    expected = attend.plain(*inputs, scale)
    for form in (attend.expanded, attend.absorbed):
        torch.testing.assert_close(form(*inputs, scale), expected, atol=1e-5, rtol=0)


def test_the_cost_rule_absorbs_few_queries_and_expands_many() -> None:
    v3 = {"H": 128, "N": 128, "R": 64, "U": 128, "C": 512}
    assert attend.absorbed_is_cheaper(T=1, S=4096, **v3)
    assert attend.absorbed_is_cheaper(T=5, S=16384, **v3)  # verifying drafts, not only T == 1
    assert not attend.absorbed_is_cheaper(T=4096, S=4096, **v3)
    assert not attend.absorbed_is_cheaper(T=512, S=8192, **v3)


def test_packed_sequences_see_only_themselves() -> None:
    q, r, rows, k_up, v_up = attention_inputs(1, 9, 9, H=2, N=4, R=2, U=4, C=6, seed=1)
    flat = (q[0], r[0], rows[0, :, :6], rows[0, :, 6:], k_up, v_up, 0.3)
    packed = PackedAttend((4, 5))(0, *flat)
    for part in (slice(0, 4), slice(4, 9)):
        alone = attend.plain(q[:, part], r[:, part], rows[:, part], k_up, v_up, 0.3)[0]
        torch.testing.assert_close(packed[part], alone, atol=1e-5, rtol=0)
    equal = PackedAttend((3, 3, 3))(0, *flat)
    torch.testing.assert_close(equal[3:6], attend.plain(q[:, 3:6], r[:, 3:6], rows[:, 3:6], k_up, v_up, 0.3)[0])


@pytest.mark.parametrize("lengths", [(9, 9), (21,), (3, 3, 12, 1, 2), (8, 8, 5), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize(("N", "R", "U"), [(6, 4, 5), (2, 2, 7), (4, 0, 4)])
def test_the_way_back_through_packed_attention_equals_the_plain_one(
    lengths: tuple[int, ...], N: int, R: int, U: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks so small that sequences and heads take several of them."""
    monkeypatch.setattr(causal, "QUERIES", 4)
    monkeypatch.setattr(causal, "KEYS", 8)
    monkeypatch.setattr(causal, "SCORES_AT_ONCE", 64)
    monkeypatch.setattr(causal, "TOKENS_AT_ONCE", 8)
    T, scale = sum(lengths), 0.7
    q, r, rows, k_up, v_up = attention_inputs(1, T, T, H=3, N=N, R=R, U=U, C=5, seed=2)
    flat = [q[0], r[0], rows[0, :, :5], rows[0, :, 5:], k_up, v_up]
    weight = torch.arange(T * 3 * U).view(T, 3, U).cos()

    def plain(q: Tensor, r: Tensor, c: Tensor, k_rope: Tensor, k_up: Tensor, v_up: Tensor) -> Tensor:
        parts = zip(*(t.split(lengths) for t in (q, r, torch.cat([c, k_rope], dim=1))), strict=True)
        return torch.cat([attend.plain(q[None], r[None], s[None], k_up, v_up, scale)[0] for q, r, s in parts])

    results = []
    for form in (lambda *leaves: attend.packed(*leaves, lengths, scale), plain):
        leaves = [t.clone().requires_grad_() for t in flat]
        o = form(*leaves)
        results.append([o.detach(), *torch.autograd.grad((o * weight).sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("frozen", [4, 5], ids=["keys", "values"])
def test_a_frozen_up_projection_leaves_the_others_gradient_as_it_is(frozen: int) -> None:
    q, r, rows, k_up, v_up = attention_inputs(1, 6, 6, H=2, N=4, R=2, U=4, C=6, seed=1)
    leaves = [t.clone().requires_grad_() for t in (q[0], r[0], rows[0, :, :6], rows[0, :, 6:], k_up, v_up)]
    wanted = torch.autograd.grad(attend.packed(*leaves, (4, 2), 0.5).square().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    attend.packed(*leaves, (4, 2), 0.5).square().sum().backward()
    for place, leaf in enumerate(leaves):
        assert leaf.grad is None if place == frozen else torch.equal(leaf.grad, wanted[place])


def test_far_scores_neither_overflow_nor_leak_on_the_way_back() -> None:
    """A later key that would win by far is not seen, and probabilities of e^-200 are nothing."""
    q, r, rows, k_up, v_up = attention_inputs(1, 6, 6, H=2, N=4, R=2, U=4, C=6, seed=1)
    rows[0, 5] *= 200
    q[0, :3] *= 100
    leaves = [t.requires_grad_() for t in (q[0], r[0], rows[0, :, :6], rows[0, :, 6:], k_up, v_up)]
    grads = torch.autograd.grad(attend.packed(*leaves, (6,), 1.0)[:5].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[5].any() for g in grads[:4])


def expert_inputs(T: int, K: int, E: int, D: int, F: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    x_TD, weights_TK = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    matrices = [(torch.randn(*s, generator=g) * 0.3).to(dtype) for s in ((E, F, D), (E, F, D), (E, D, F))]
    return x_TD, ids_TK, weights_TK, *matrices


@pytest.mark.parametrize(("T", "K", "E"), [(1, 1, 4), (7, 3, 5), (40, 2, 16), (5, 4, 4)])
def test_grouped_experts_equal_the_plain_ones_forward_and_backward(T: int, K: int, E: int) -> None:
    results = []
    for form in (experts.grouped, experts.plain):
        x, ids, *rest = expert_inputs(T, K, E, D=6, F=5, dtype=torch.float32)
        leaves = [t.clone().requires_grad_() for t in (x, *rest)]
        y = form(leaves[0], ids, *leaves[1:])
        weight = torch.arange(y.numel()).view_as(y).cos()
        results.append((y.detach(), torch.autograd.grad((y * weight).sum(), leaves)))
    (y, grads), (expected_y, expected_grads) = results
    torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=0)
    for got, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("T", [1, 3, 40])
def test_without_gradients_few_tokens_take_another_way_to_the_same(T: int) -> None:
    inputs = expert_inputs(T=T, K=3, E=6, D=8, F=5, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(experts.grouped(*inputs), experts.plain(*inputs), atol=1e-5, rtol=0)


def test_rows_padded_for_bfloat16_change_nothing_but_rounding() -> None:
    """bfloat16 on a CPU takes the path with padded rows; float32 of the same numbers does not."""
    inputs = expert_inputs(T=96, K=3, E=8, D=8, F=6, dtype=torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        x, ids, weights, *matrices = inputs
        leaves = [x.to(dtype).requires_grad_(), weights.clone().requires_grad_()]
        leaves += [m.to(dtype).requires_grad_() for m in matrices]
        y = experts.grouped(leaves[0], ids, *leaves[1:])
        gradients.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for got, expected in zip(*gradients, strict=True):
        spread = expected.float().abs().max()
        assert (got.float() - expected.float()).abs().max() < 0.03 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_a_head_and_its_gradients_equal_the_plain_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", 4 * 31)  # three chunks, the last one short
    monkeypatch.setattr(cross_entropy, "FEWEST_TOKENS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 7, generator=generator), torch.randn(31, 7, generator=generator)
    hidden[3] *= 60  # a certain one: most probabilities are zero
    labels = torch.randint(31, (9,), generator=generator)
    labels[[1, 7]] = -100
    results = []
    for form in (cross_entropy.linear, cross_entropy.plain):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = form(*leaves, labels, -100)
        results.append((loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)))
    for got, expected in zip(*results, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_gated_feed_forward_and_its_gradients_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "AT_ONCE", 4 * 5)  # four tokens at a time
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in ((9, 6), (5, 6), (5, 6), (6, 5))]
    results = []
    for form in (swiglu.swiglu, swiglu.plain):
        leaves = [t.clone().requires_grad_() for t in given]
        y = form(*leaves)
        weight = torch.arange(y.numel()).view_as(y).cos()
        results.append((y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_outputs_of_norms_that_are_made_anew_are_the_same_to_the_bit() -> None:
    """With two uses, one of them by a norm; what else is kept, views of the output among it, is left alone."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in ((7, 6), (6,), (6,), (4, 6))]

    def gradients() -> tuple[Tensor, ...]:
        x, weight, other, matrix = (t.clone().requires_grad_() for t in given)
        y = norm.rms(x, weight, 1e-6)
        z = norm.rms(y, other, 1e-6) @ matrix.mT + y @ matrix.mT + (y[:, :2] * y[:, 2:4]).sum()
        return torch.autograd.grad(z.square().sum(), (x, weight, other, matrix))

    kept = gradients()
    with norm.outputs_remade():
        remade = gradients()
    assert all(torch.equal(one, other) for one, other in zip(kept, remade, strict=True))


def test_what_a_norm_made_is_remade_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it taken for its transpose, which lies at the same address in the same shape."""
    generator = torch.Generator().manual_seed(0)
    x, weight, matrix = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((6, 6), (6,), (4, 6)))
    made: list[Tensor] = []
    scaled = norm._scaled
    monkeypatch.setattr(norm, "_scaled", lambda *given: made.append(scaled(*given)) or made[-1])
    with norm.outputs_remade():
        y = norm.rms(x, weight, 1e-6)
        z = (y @ matrix.mT).square().sum() + (y @ matrix.mT).sum() + (y.mT * 2).square().sum()
    node, address = y.grad_fn, y.data_ptr()
    assert norm._outputs[address] is y
    made.clear()
    del y
    assert address not in norm._outputs
    gradients = torch.autograd.grad(z, (x, weight, matrix))
    assert len(made) == 1
    assert node.output is None
    plainly = norm.plain(x, weight, 1e-6)
    z = (plainly @ matrix.mT).square().sum() + (plainly @ matrix.mT).sum() + (plainly * 2).square().sum()
    for got, expected in zip(gradients, torch.autograd.grad(z, (x, weight, matrix)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


TWICE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda *given: norm.rms(*given, 1e-6), ((3, 4), (4,))),
    "feed-forward": (swiglu.swiglu, ((3, 4), (5, 4), (5, 4), (4, 5))),
    "head": (lambda *given: cross_entropy.linear(*given, torch.arange(3), -100), ((3, 4), (7, 4))),
    "experts": (
        lambda x, *given: experts.grouped(x, torch.tensor([[0], [2], [0]]), *given),
        ((3, 4), (3, 1), (3, 5, 4), (3, 5, 4), (3, 4, 5)),
    ),
    "attention": (
        lambda *given: attend.packed(*given, (2, 1), 1.0),
        ((3, 2, 4), (3, 2, 2), (3, 5), (3, 2), (2, 4, 5), (2, 4, 5)),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_nothing_that_is_differentiated_by_hand_is_so_twice(name: str) -> None:
    """What is kept between the passes is no part of the graph: a second derivative would be wrong without a word."""
    form, shapes = TWICE[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    first = torch.autograd.grad(form(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([gradient.square().sum() for gradient in first]).sum().backward()


def test_cross_entropy_without_labels_is_nothing() -> None:
    leaves = [torch.ones(3, 2, requires_grad=True), torch.ones(5, 2, requires_grad=True)]
    loss = cross_entropy.linear(*leaves, torch.full((3,), -100), -100)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_an_expert_that_nobody_chose_gets_no_gradient() -> None:
    x, _, weights, *matrices = expert_inputs(T=4, K=2, E=5, D=6, F=5, dtype=torch.float32)
    ids = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1]])
    leaves = [m.requires_grad_() for m in matrices]
    grads = torch.autograd.grad(experts.grouped(x, ids, weights, *leaves).sum(), leaves)
    for grad in grads:
        assert not grad[[2, 4]].any() and grad[[0, 1, 3]].any()


def test_the_heads_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of halves in bfloat16 would stand still at 128."""
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(cross_entropy, "FEWEST_TOKENS", 1)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy.linear(
        torch.ones(1024, 1, dtype=torch.bfloat16), weight, torch.zeros(1024, dtype=torch.int64), ignore=-1
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.tolist() == [[-512.0], [512.0]]
