"""fp8 products: the quantiser, the three products of a Linear and the nine of experts, and models trained with them."""

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cavelight.kernels import experts, fp8
from cavelight.kernels.fp8 import BLOCK, COLUMN, LEAST_GRADIENT, TILE, Quantised, dequantise, multiply, quantise
from cavelight.model.layers import Linear
from cavelight.model.moe import Experts
from cavelight.model.transformer import Transformer
from cavelight.spec.formats import FP8, PACKED_ROLES
from cavelight.spec.shapes import parameters
from cavelight.train.fp8 import Fp8Experts, Fp8Linear, emulate
from cavelight.weights.quant import pack

from .reference.tiny import tiny
from .trained import ROW, ROWS, learner, loss_of, text

HALF_STEP = 2.0**-4  # of E4M3, three bits of fraction: the largest relative error of one rounding
CODES = sorted({v for v in torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).tolist() if not math.isnan(v)})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    """What quantising to fp8 and back should give: each block by itself, each number to the nearest code."""
    out_MK, codes = torch.empty_like(x_MK), torch.tensor(CODES)
    for m in range(0, x_MK.shape[0], block[0]):
        for k in range(0, x_MK.shape[1], block[1]):
            part = (slice(m, m + block[0]), slice(k, k + block[1]))
            scale = x_MK[part].abs().max().clamp(min=1e-4) / 448
            exact = x_MK[part] / scale
            above = torch.searchsorted(codes, exact.contiguous()).clamp(1, len(codes) - 1)
            low, high = codes[above - 1], codes[above]
            gap = (exact - low) - (high - exact)
            take_low = (gap < 0) | (gap == 0) & (above % 2 == 1)  # a tie goes to the even code, as zero is
            out_MK[part] = torch.where(take_low, low, high) * scale
    return out_MK


@pytest.mark.parametrize("block", [TILE, COLUMN, BLOCK])
@pytest.mark.parametrize("shape", [(3, 256), (130, 5), (129, 131), (1, 1)])
def test_quantising_takes_the_nearest_code_of_each_block(block: tuple[int, int], shape: tuple[int, int]) -> None:
    x = normal(*shape) * normal(shape[0], 1, seed=1).exp()
    q = quantise(x, block)
    assert q.codes.dtype == torch.float8_e4m3fn and q.codes.shape == x.shape
    assert q.scales.shape == tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    torch.testing.assert_close(dequantise(q), naive(x, block), rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantise(q.mT), dequantise(q).mT, rtol=0, atol=0)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (200, 130)])
def test_weights_are_quantised_as_in_checkpoints(shape: tuple[int, int], power_of_two: bool) -> None:
    weight = normal(*shape)
    weight[:128, :128] = 0
    packed = pack(weight, replace(FP8, ue8m0=power_of_two))
    q = quantise(weight, BLOCK, power_of_two=power_of_two)
    assert torch.equal(q.codes.view(torch.uint8), packed["weight"].view(torch.uint8))
    assert torch.equal(q.scales, packed["weight_scale_inv"])


def test_a_stack_is_quantised_matrix_by_matrix() -> None:
    stack = normal(3, 130, 140)
    for q, matrix in zip(quantise(stack, BLOCK).unbind(), stack, strict=True):
        alone = quantise(matrix, BLOCK)
        assert torch.equal(q.scales, alone.scales) and torch.equal(dequantise(q), dequantise(alone))


@settings(max_examples=30, deadline=None)
@given(M=st.integers(0, 9), N=st.integers(1, 140), K=st.integers(1, 300), p2=st.booleans(), seed=st.integers(0, 99))
def test_the_product_equals_the_sum_over_blocks(M: int, N: int, K: int, p2: bool, seed: int) -> None:
    a = quantise(normal(M, K, seed=seed), TILE, power_of_two=p2)
    for block in (BLOCK, TILE):
        b = quantise(normal(N, K, seed=seed + 1), block, power_of_two=p2)
        difference = (multiply(a, b, torch.float32) - fp8.plain(a, b, torch.float32)).abs()
        assert (difference <= 1e-6 * (dequantise(a).abs() @ dequantise(b).abs().T)).all()


def test_with_powers_of_two_a_single_block_is_equal_to_the_bit() -> None:
    # The codes are whole: their products and sums fit into float32, and such scales only move the point.
    codes = torch.randint(-8, 9, (2, 64, 128), generator=torch.Generator().manual_seed(0)).float().to(fp8.E4M3)
    a = Quantised(codes[0], 2.0 ** torch.randint(-9, 9, (64, 1)), TILE)
    b = Quantised(codes[1], torch.tensor([[2.0**-7]]), BLOCK)
    assert torch.equal(multiply(a, b, torch.float32), fp8.plain(a, b, torch.float32))


def linear_gradients(x: Tensor, weight: Tensor, dy: Tensor, form: Any) -> tuple[Tensor, ...]:
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = form(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def naive_linear(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The three products as the report describes them, each from the definition of its parts."""
    x_q, weight_q = naive(x, TILE), naive(weight, BLOCK)
    dx = naive(dy, TILE) @ weight_q
    return x_q @ weight_q.T, dx, naive(dy, COLUMN).T @ naive(x_q, COLUMN)


@pytest.mark.parametrize(("T", "I", "O"), [(130, 140, 150), (1, 128, 7), (5, 3, 129)])
def test_all_three_products_of_a_linear_are_fp8(T: int, I: int, O: int) -> None:  # noqa: E741
    x, weight, dy = normal(T, I), normal(O, I, seed=1) * 0.1, normal(T, O, seed=2)
    ours, expected = linear_gradients(x, weight, dy, fp8.linear), naive_linear(x, weight, dy)
    plain = linear_gradients(x, weight, dy, F.linear)
    for got, wanted, exact in zip(ours, expected, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        assert 0 < float((got - exact).norm() / exact.norm()) < 2 * HALF_STEP


def test_gradients_may_be_as_small_as_the_labels_of_a_step_make_them() -> None:
    x, weight, dy = normal(20, 140), normal(30, 140, seed=1), normal(20, 30, seed=2)
    usual = linear_gradients(x, weight, dy, fp8.linear)
    tiny_ones = linear_gradients(x, weight, dy * 2.0**-40, fp8.linear)
    for gradient, small in zip(usual[1:], tiny_ones[1:], strict=True):
        torch.testing.assert_close(small * 2.0**40, gradient, rtol=1e-6, atol=1e-6)
    assert LEAST_GRADIENT < 2.0**-80  # with the floor of values they would be nothing
    assert dequantise(quantise(dy * 2.0**-40, TILE)).abs().max() == 0


def test_outputs_and_gradients_have_the_working_dtype_and_shape() -> None:
    x, weight = normal(2, 3, 140).bfloat16().requires_grad_(), normal(9, 140).bfloat16().requires_grad_()
    y = fp8.linear(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 9)
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2 and grads[0].shape == x.shape


def expert_inputs(T: int, K: int, E: int, D: int, F: int) -> tuple[Tensor, ...]:
    ids_TK = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)])
    matrices = (normal(E, F, D, seed=3), normal(E, F, D, seed=4), normal(E, D, F, seed=5))
    return normal(T, D), ids_TK, normal(T, K, seed=2).sigmoid(), *(0.1 * matrix for matrix in matrices)


def gradients_of_experts(form: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, ids, *rest = inputs
    leaves = [t.clone().requires_grad_() for t in (x, *rest)]
    y = form(leaves[0], ids, *leaves[1:])
    return y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=7))


def one_by_one(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The experts made of fp8 Linears, each on its own tokens."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(gate_EFD.shape[0]):
        tokens, places = (ids_TK == e).nonzero(as_tuple=True)
        x_RD = x_TD[tokens]
        a_RF = F.silu(fp8.linear(x_RD, gate_EFD[e])) * fp8.linear(x_RD, up_EFD[e])
        y_TD = y_TD.index_add(0, tokens, fp8.linear(a_RF, down_EDF[e]) * weights_TK[tokens, places, None])
    return y_TD


@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize(("T", "K", "E"), [(200, 1, 3), (7, 2, 5)])  # an expert of more than 128 tokens; idle ones
def test_experts_are_fp8_linears(T: int, K: int, E: int, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_row_multiple", lambda device: multiple)  # GPUs want whole tiles
    inputs = expert_inputs(T, K, E, D=140, F=20)
    ours, alone = gradients_of_experts(fp8.grouped, inputs), gradients_of_experts(one_by_one, inputs)
    plain = gradients_of_experts(experts.grouped, inputs)
    for got, expected, exact in zip(ours, alone, plain, strict=True):
        # A code on the edge may fall to either side; it is one of many.
        assert float((got - expected).norm() / expected.norm()) < 2e-3
        assert 0 < float((got - exact).norm() / exact.norm()) < 4 * HALF_STEP


def test_tiles_keep_what_blocks_lose_beside_an_outlier() -> None:
    # Gradients of a few tokens are far larger than the others' (V3 report, appendix B.2): a block's scale is theirs.
    dy = normal(128, 128) * 1e-6
    dy[::32] *= 1e6
    quiet = torch.ones(128, dtype=torch.bool)
    quiet[::32] = False

    def error(block: tuple[int, int]) -> float:
        rounded = dequantise(quantise(dy, block, LEAST_GRADIENT))
        return float((rounded - dy)[quiet].norm() / dy[quiet].norm())

    assert error(TILE) < HALF_STEP < error(BLOCK) == 1  # all of it is gone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_shows(bad: float, power_of_two: bool) -> None:
    x, weight = normal(4, 300), normal(5, 300)
    x[1, 200] = bad
    y = fp8.linear(x, weight, power_of_two)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    assert dequantise(quantise(x, BLOCK, power_of_two=power_of_two))[:, 128:256].isnan().all()


def test_a_scale_that_is_a_power_of_two_stays() -> None:
    x_MK = torch.tensor([[448.0 * 2.0**-5, 1.0], [449.0 * 2.0**-5, 1.0]])
    assert fp8.quantise(x_MK, fp8.TILE, power_of_two=True).scales.flatten().tolist() == [2.0**-5, 2.0**-4]


def test_nothing_saturates() -> None:
    for size in (1e-30, 1.0, 3e38):
        x = normal(50, 128, seed=3).clamp(-1, 1) * size
        largest = dequantise(quantise(x, TILE, LEAST_GRADIENT)).abs().amax(dim=1)
        torch.testing.assert_close(largest, x.abs().amax(dim=1), rtol=1e-6, atol=0)


def test_rows_of_zeros_and_no_rows_at_all() -> None:
    weight = normal(9, 140)
    assert torch.equal(fp8.linear(torch.zeros(3, 140), weight), torch.zeros(3, 9))
    y, dx, dweight = linear_gradients(torch.empty(0, 140), weight, torch.empty(0, 9), fp8.linear)
    assert y.shape == (0, 9) and dx.shape == (0, 140) and torch.equal(dweight, torch.zeros(9, 140))
    x, ids, weights, *matrices = expert_inputs(2, 1, 3, D=8, F=8)
    assert fp8.grouped(x[:0], ids[:0], weights[:0], *matrices).shape == (0, 8)


def test_arguments_for_the_gpu_have_the_layouts_that_torch_asks_for() -> None:
    x = quantise(normal(256, 640), TILE)
    weight = quantise(normal(384, 640, seed=1), BLOCK)
    dy = quantise(normal(256, 384, seed=2), TILE)
    columns = quantise(normal(256, 384, seed=2), COLUMN), quantise(dequantise(x), COLUMN)
    for a, b in ((x, weight), (dy, weight.mT), (columns[0].mT, columns[1].mT)):
        arguments = fp8.scaled_mm_arguments(a, b, torch.float32)
        a_codes, b_codes = arguments["mat_a"], arguments["mat_b"]
        (M, K), N = a_codes.shape, b_codes.shape[1]
        assert a_codes.stride() == (K, 1) and b_codes.stride() == (1, K)
        assert arguments["scale_a"].shape == (M, K // 128) and arguments["scale_a"].stride() == (1, M)
        if b.block == BLOCK:
            filled = -(-K // 512) * 4
            assert arguments["scale_b"].shape == (filled, N // 128) and arguments["scale_b"].stride() == (1, filled)
            spread = arguments["scale_b"][: K // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            assert arguments["scale_b"].shape == (N, K // 128) and arguments["scale_b"].stride() == (1, N)
            spread = arguments["scale_b"].repeat_interleave(128, 1).T
        product = (a_codes.float() * arguments["scale_a"].repeat_interleave(128, 1)) @ (b_codes.float() * spread)
        torch.testing.assert_close(product, multiply(a, b, torch.float32), rtol=0, atol=1e-3)
        # torch's own check of shapes and strides, which runs without a GPU; it hands on empty tensors.
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert torch.nn.functional.scaled_mm(**meta).shape == (M, N)
        assert arguments.keys() <= inspect.signature(torch.nn.functional.scaled_mm).parameters.keys()


def test_a_cpu_has_no_such_products() -> None:
    assert not fp8._has_block_scales(torch.device("cpu"))


CONFIG = tiny(num_nextn_predict_layers=1)


def filled(model: Transformer) -> Transformer:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=index) * 0.1 + (parameter.ndim == 1))
    return model


def test_an_emulated_model_has_the_same_parameters() -> None:
    model = filled(Transformer(CONFIG))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    plain = model.logits(torch.arange(20))
    emulate(model)
    once = model.logits(torch.arange(20))
    emulate(model)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert 0 < float((once - plain).detach().norm() / plain.detach().norm()) < 0.2
    assert torch.equal(once, model.logits(torch.arange(20)))


@pytest.mark.parametrize("config", [CONFIG, tiny(q_lora_rank=None, n_shared_experts=None)], ids=["v3", "without"])
def test_what_is_exchanged_follows_from_the_role(config: Any) -> None:
    model = Transformer(config)
    emulate(model)
    roles = {parameter.name: parameter.role for parameter in parameters(config)}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            assert isinstance(module, Fp8Linear) == (roles[f"{name}.weight"] in PACKED_ROLES)
        assert not isinstance(module, Experts) or isinstance(module, Fp8Experts)


def test_keys_and_values_are_those_of_the_checkpoints_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = filled(Transformer(CONFIG)), []
    emulate(model)
    attention = model.model.layers[0].self_attn

    def attend(layer: int, *arguments: Any) -> Tensor:
        seen.append(arguments)
        return torch.zeros(3, CONFIG.num_attention_heads, CONFIG.v_head_dim)

    x_TD = normal(3, CONFIG.hidden_size)
    attention(0, x_TD, model.rotary(torch.arange(3)), attend)
    _, _, c_TC, _, k_up, v_up, _ = seen[0]
    kv_b = torch.cat([attention.k_up, attention.v_up], dim=1).flatten(0, 1).detach()
    assert torch.equal(torch.cat([k_up, v_up], dim=1).flatten(0, 1), dequantise(quantise(kv_b, BLOCK)))
    assert torch.equal(c_TC, fp8.rounded(c_TC, TILE)) and not torch.equal(k_up, attention.k_up)
    grads = torch.autograd.grad((k_up * 3).sum() + v_up.sum(), (attention.k_up, attention.v_up))
    assert (grads[0] == 3).all() and (grads[1] == 1).all()


def test_training_in_fp8_follows_training_in_float32() -> None:
    losses = {}
    for in_fp8 in (False, True):
        model = filled(Transformer(learner()))
        if in_fp8:
            emulate(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses[in_fp8] = []
        for tokens_T in text(16 * ROW * ROWS, seed=1).split(ROW * ROWS):
            optimizer.zero_grad()
            loss = loss_of(model, tokens_T)
            loss.backward()
            optimizer.step()
            losses[in_fp8].append(loss.item())
    plain, ours = sum(losses[False][-8:]) / 8, sum(losses[True][-8:]) / 8
    assert plain < 0.8 * losses[False][0]  # it did learn
    assert ours != plain and abs(ours - plain) < 0.02 * plain
