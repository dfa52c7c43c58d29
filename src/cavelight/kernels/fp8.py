"""Matrix products of numbers in 8 bits, as DeepSeek-V3 was trained (V3 report, section 3.3), and a plain twin.

Every number becomes an E4M3 code times a float32 scale, which it shares with the others of its tile or block: values
and gradients with 128 numbers along the contracted axis, weights with a block of 128 x 128. All three products of a
Linear (Fprop, Dgrad, Wgrad) take such numbers, add up in float32 and give the working dtype.

A GPU with these products (compute capability 9.0) gets the codes as they are, by `scaled_mm`. That way was written by
torch's rules for its arguments and has not been run: the machine at hand has none. Everywhere else the same numbers are
unpacked to float32 first, which differs in the order of additions alone.

Letters: M rows of a product, N its columns, K the contracted axis, m, n and k blocks of them; T tokens, I inputs and
O outputs of a Linear; D hidden size, F expert width, E experts, P pairs of token and expert, R rows: the pairs sorted
by expert.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.kernels import experts

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SIDE = 128
TILE, COLUMN, BLOCK = (1, SIDE), (SIDE, 1), (SIDE, SIDE)  # of values along a row, down a column; of weights
LEAST_AMAX = 1e-4  # of a tile or block: one of zeros has a scale too (DeepSeek's reference quantiser)
# Gradients are divided by the labels of a whole step: at 1e-4 most of a tile would fall below the smallest code.
LEAST_GRADIENT = 1e-30
_CUDA_WITH_BLOCK_SCALES = (12, 9)


class Quantised(NamedTuple):
    """A matrix [M, K], or a stack of them: codes in its shape, and the float32 scales [m, k] that multiply them."""

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def mT(self) -> "Quantised":
        return Quantised(self.codes.mT, self.scales.mT, (self.block[1], self.block[0]))

    def rows(self, index_M: Tensor) -> "Quantised":
        """These rows, of a matrix whose rows have scales of their own."""
        codes = self.codes.view(torch.uint8).index_select(0, index_M).view(E4M3)
        return Quantised(codes, self.scales.index_select(0, index_M), self.block)

    def split(self, sizes: list[int]) -> list["Quantised"]:
        """So many rows each, of a matrix whose rows have scales of their own."""
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), strict=True)
        return [Quantised(codes, scales, self.block) for codes, scales in parts]

    def unbind(self) -> list["Quantised"]:
        """The matrices of a stack."""
        parts = zip(self.codes.unbind(), self.scales.unbind(), strict=True)
        return [Quantised(codes, scales, self.block) for codes, scales in parts]


def quantise(
    x_MK: Tensor, block: tuple[int, int], least_amax: float = LEAST_AMAX, power_of_two: bool = False
) -> Quantised:
    """Scales amax / 448 of each block, codes x / scale rounded to the nearest E4M3; ragged last blocks are smaller.

    x_MK: a matrix or a stack. power_of_two: round scales up to powers of two. A value that is not finite makes its
    whole block NaN; nothing saturates.
    """
    x_mMkK = _blocked(x_MK.float(), block)
    scales_m1k1 = x_mMkK.abs().amax(dim=(-3, -1), keepdim=True).clamp_(min=least_amax).div_(E4M3_MAX)
    if power_of_two:
        fraction, exponent = torch.frexp(scales_m1k1)  # scale = fraction * 2^exponent, 0.5 <= fraction < 1
        rounded = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())
        scales_m1k1 = torch.where(fraction.isfinite(), rounded, fraction)
    codes_MK = _unblocked((x_mMkK / scales_m1k1).to(E4M3), x_MK.shape)
    return Quantised(codes_MK, scales_m1k1[..., 0, :, 0], block)


def dequantise(q: Quantised) -> Tensor:
    """Code times scale, in float32."""
    values_mMkK = _blocked(_values(q.codes), q.block)
    return _unblocked(values_mMkK.mul_(q.scales[..., :, None, :, None]), q.codes.shape)


def multiply(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> Tensor:
    """a bᵀ [M, N]: `a` in tiles along its rows, `b` too, or in blocks.

    Unpacked, both matrices go into one product. By the definition (`plain`) a scale multiplies a block's sum, here each
    of its terms: that moves a result by a few parts in 10^7 of the sum of its terms' sizes, where fp8 itself rounds by
    some in 100, and takes half the time. With scales that are powers of two the terms are exact.
    """
    if _device_has_it(a_MK, b_NK):
        return F.scaled_mm(**scaled_mm_arguments(a_MK, b_NK, dtype))
    return (dequantise(a_MK) @ dequantise(b_NK).mT).to(dtype)


def plain(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> Tensor:
    """The definition: sum the codes' products over 128 of K, multiply by both scales, add that up in float32."""
    (M, K), N = a_MK.codes.shape, b_NK.codes.shape[0]
    sum_MN = torch.zeros(M, N)
    for k in range(a_MK.scales.shape[1]):
        part = slice(k * SIDE, min((k + 1) * SIDE, K))
        product_MN = a_MK.codes[:, part].float() @ b_NK.codes[:, part].float().T
        scale_N = b_NK.scales[:, k].repeat_interleave(b_NK.block[0])[:N]
        sum_MN += product_MN * a_MK.scales[:, k, None] * scale_N
    return sum_MN.to(dtype)


def linear(x: Tensor, weight_OI: Tensor, power_of_two: bool = False) -> Tensor:
    """y = x Wᵀ with x [..., I]: [..., O] in x's dtype, and a backward pass whose two products are fp8 as well."""
    y: Tensor = _apply_linear(x.flatten(0, -2), weight_OI, power_of_two).unflatten(0, x.shape[:-1])
    return y


def rounded(x_MK: Tensor, block: tuple[int, int], power_of_two: bool = False) -> Tensor:
    """What `x` is in fp8, in its own dtype; its gradient passes as if nothing had been rounded."""
    y_MK: Tensor = _apply_rounding(x_MK, block, power_of_two)
    return y_MK


def grouped(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    power_of_two: bool = False,
) -> Tensor:
    """The routed experts (as kernels.experts.grouped) with all nine products in fp8: [T, D]."""
    y_TD: Tensor = _apply_experts(x_TD, ids_TK, weights_TK, gate_EFD, up_EFD, down_EDF, power_of_two)
    return y_TD


class _Linear(torch.autograd.Function):
    """What is kept of the input are its codes: those the weight's gradient is made from, tiled anew."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, power_of_two: bool) -> Tensor:
        x = quantise(x_TI, TILE, power_of_two=power_of_two)
        weight = quantise(weight_OI, BLOCK, power_of_two=power_of_two)
        ctx.save_for_backward(*x[:2], *weight[:2])
        ctx.power_of_two, ctx.dtypes = power_of_two, (x_TI.dtype, weight_OI.dtype)
        return multiply(x, weight, x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scales, weight_codes, weight_scales = ctx.saved_tensors
        x, weight = Quantised(x_codes, x_scales, TILE), Quantised(weight_codes, weight_scales, BLOCK)
        (dy_TO,), p2, (x_dtype, weight_dtype) = grads, ctx.power_of_two, ctx.dtypes
        dx_TI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_TI = multiply(quantise(dy_TO, TILE, LEAST_GRADIENT, p2), weight.mT, x_dtype)
        if ctx.needs_input_grad[1]:
            dweight_OI = _wgrad(dy_TO, x, weight_dtype, p2)
        return dx_TI, dweight_OI, None


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, block: tuple[int, int], power_of_two: bool) -> Tensor:
        return dequantise(quantise(x_MK, block, power_of_two=power_of_two)).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Experts(torch.autograd.Function):
    """kernels.experts has the same steps in plain numbers."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *rest: Any) -> Tensor:
        (T, K), D, (*matrices, p2), dtype = ids_TK.shape, x_TD.shape[1], rest, x_TD.dtype
        slots, _, sizes = experts._sort(ids_TK, matrices[0].shape[0], _row_multiple(x_TD.device))
        slots_P = slots.flatten()
        tokens_R = slots_P.new_full((sum(sizes),), T)  # rows that fill up are of a token of zeros: no scale sees them
        tokens_R[slots_P] = torch.arange(T, device=x_TD.device).repeat_interleave(K)
        gate, up, down = (quantise(matrix, BLOCK, power_of_two=p2) for matrix in matrices)
        x = quantise(F.pad(x_TD, (0, 0, 0, 1)), TILE, power_of_two=p2).rows(tokens_R)  # the same codes for all experts
        gate_RF, up_RF = _multiply(x, gate, sizes, dtype), _multiply(x, up, sizes, dtype)
        a = quantise(F.silu(gate_RF).mul_(up_RF), TILE, power_of_two=p2)
        y_TKD = _multiply(a, down, sizes, dtype).index_select(0, slots_P).view(T, K, D)
        kept = (x, a, gate, up, down)
        ctx.save_for_backward(
            gate_RF, up_RF, y_TKD, weights_TK, slots_P, tokens_R, *(tensor for q in kept for tensor in q[:2])
        )
        ctx.sizes, ctx.power_of_two, ctx.dtype = sizes, p2, matrices[0].dtype
        return torch.bmm(weights_TK[:, None].to(dtype), y_TKD)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,), sizes, p2 = grads, ctx.sizes, ctx.power_of_two
        gate_RF, up_RF, y_TKD, weights_TK, slots_P, tokens_R, *kept = ctx.saved_tensors
        blocks = zip(kept[::2], kept[1::2], (TILE, TILE, BLOCK, BLOCK, BLOCK), strict=True)
        x, a, gate, up, down = (Quantised(*parts) for parts in blocks)
        dweights_TK = torch.bmm(y_TKD, dy_TD[..., None])[..., 0].to(weights_TK.dtype)
        weights_R = torch.zeros_like(tokens_R, dtype=dy_TD.dtype)
        weights_R[slots_P] = weights_TK.flatten().to(dy_TD.dtype)
        dy_RD = F.pad(dy_TD, (0, 0, 0, 1)).index_select(0, tokens_R).mul_(weights_R[:, None])
        da_RF = _multiply(quantise(dy_RD, TILE, LEAST_GRADIENT, p2), down.mT, sizes, dy_TD.dtype)
        sigmoid_RF = gate_RF.sigmoid()
        dup_RF = da_RF * gate_RF * sigmoid_RF
        dgate_RF = da_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
        dx_RD = _multiply(quantise(dgate_RF, TILE, LEAST_GRADIENT, p2), gate.mT, sizes, dy_TD.dtype)
        dx_RD += _multiply(quantise(dup_RF, TILE, LEAST_GRADIENT, p2), up.mT, sizes, dy_TD.dtype)
        products = ((dgate_RF, x), (dup_RF, x), (dy_RD, a))
        dmatrices = (
            torch.stack([_wgrad(*pair, ctx.dtype, p2) for pair in zip(dy.split(sizes), q.split(sizes), strict=True)])
            for dy, q in products
        )
        dx_TD = dx_RD.index_select(0, slots_P).view_as(y_TKD).sum(dim=1)
        return dx_TD, None, dweights_TK, *dmatrices, None


_apply_linear: Callable[..., Tensor] = _Linear.apply
_apply_rounding: Callable[..., Tensor] = _Rounding.apply
_apply_experts: Callable[..., Tensor] = _Experts.apply


def _wgrad(dy_TO: Tensor, x_TI: Quantised, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """dyᵀ x [O, I], over tokens: the gradient and the unpacked input in tiles of 128 tokens of one channel."""
    dy = quantise(dy_TO, COLUMN, LEAST_GRADIENT, power_of_two)
    x = quantise(dequantise(x_TI), COLUMN, power_of_two=power_of_two)
    return multiply(dy.mT, x.mT, dtype)


def _multiply(a_RX: Quantised, b_EYX: Quantised, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """a bᵀ [R, Y], each expert's rows with its own matrix."""
    pairs = zip(a_RX.split(sizes), b_EYX.unbind(), strict=True)
    return torch.cat([multiply(a, b, dtype) for a, b in pairs])


def _blocked(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    """Blocks on axes of their own, [..., m, rows, k, columns]; ragged ones beside whole ones are filled with zeros."""
    rows, columns = (max(min(side, size), 1) for side, size in zip(block, x_MK.shape[-2:], strict=True))
    ragged = (0, -x_MK.shape[-1] % columns, 0, -x_MK.shape[-2] % rows)
    padded = F.pad(x_MK, ragged) if any(ragged) else x_MK
    x_mMkK: Tensor = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return x_mMkK


def _unblocked(x_mMkK: Tensor, shape: torch.Size) -> Tensor:
    return x_mMkK.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def _values(codes: Tensor) -> Tensor:
    """`codes.float()`, on a CPU by looking them up, which is three times as fast there."""
    if codes.device.type != "cpu":
        return codes.float()
    if codes.mT.is_contiguous() and not codes.is_contiguous():  # in the order in which they lie
        return _values(codes.mT).mT
    index = codes.contiguous().view(torch.uint8).flatten().int()
    return _table().index_select(0, index).view(codes.shape)


@cache
def _table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def _row_multiple(device: torch.device) -> int:
    """Rows of an expert that a product on such a device wants; the CPU takes any."""
    return SIDE if _has_block_scales(device) else 1


def _device_has_it(a_MK: Quantised, b_NK: Quantised) -> bool:
    (M, K), N = a_MK.codes.shape, b_NK.codes.shape[0]
    return _has_block_scales(a_MK.codes.device) and M > 0 and K > 0 and M % 16 == N % SIDE == K % SIDE == 0


def _has_block_scales(device: torch.device) -> bool:
    """cuBLAS scales blocks of 128 from CUDA 12.9 on, on Hopper alone; later GPUs have scales of 32 numbers instead."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(F, "scaled_mm"):  # older torch has not
        return False
    version = tuple(int(part) for part in torch.version.cuda.split("."))
    return version >= _CUDA_WITH_BLOCK_SCALES and torch.cuda.get_device_capability(device) == (9, 0)


def scaled_mm_arguments(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> dict[str, Any]:
    """What `torch.nn.functional.scaled_mm` wants for `multiply`, M, N and K being multiples of 16, 128 and 128.

    Codes: `a` row by row, `b` [K, N] column by column. Scales of tiles: [M, k] (or [N, k]) column by column; of blocks:
    [k, n] column by column, k filled up to a multiple of 4. Grouped products of torch 2.13 take no scales of 128.
    """
    recipes = {TILE: F.ScalingType.BlockWise1x128, BLOCK: F.ScalingType.BlockWise128x128}
    scale_b = b_NK.scales.mT.contiguous().mT
    if b_NK.block == BLOCK:
        scale_b = F.pad(b_NK.scales, (0, -b_NK.scales.shape[1] % 4)).contiguous().mT
    return {
        "mat_a": a_MK.codes.contiguous(),
        "mat_b": b_NK.codes.contiguous().mT,
        "scale_a": a_MK.scales.mT.contiguous().mT,
        "scale_recipe_a": recipes[a_MK.block],
        "scale_b": scale_b,
        "scale_recipe_b": recipes[b_NK.block],
        "output_dtype": dtype,
    }
