"""The small parts: Linear without bias, RMSNorm, SwiGLU, rotary positions with YaRN.

Letters: T tokens, D hidden size, F width of a feed-forward, H heads, R rotary width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cavelight.kernels import norm, swiglu
from cavelight.spec.config import ModelConfig, Yarn


class Linear(nn.Linear):
    """y = x Wᵀ. Left unfilled: weights come from a checkpoint or from the recipe's initialisation."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return norm.rms(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): a dense feed-forward, or the shared experts as one."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, dtype, device)
        self.up_proj = Linear(hidden, width, dtype, device)
        self.down_proj = Linear(width, hidden, dtype, device)

    @property
    def trains_as_one(self) -> bool:
        """Whether training takes it for one operation: not where its Linears have been exchanged, or are narrow."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return all(type(linear) is Linear and linear.weight.dtype == torch.float32 for linear in linears)

    def forward(self, x_TD: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.trains_as_one:
            return swiglu.swiglu(x_TD, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        y_TD: Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


class Rotary:
    """cos and sin of each token's angles, [T, R/2] each, in float32."""

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies = rotary_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        yarn = config.rope_scaling
        self.factor = yarn_mscale(yarn, yarn.mscale) / yarn_mscale(yarn, yarn.mscale_all_dim) if yarn else 1.0

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions_T.float()[:, None] * self.frequencies.to(positions_T.device)
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate(x_THR: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on adjacent pairs (2i, 2i+1), as DeepSeek's checkpoints have them; float32 inside."""
    turns = torch.complex(*cos_sin)[:, None]
    pairs = x_THR.float().unflatten(-1, (-1, 2))
    if any(step % 2 for step in (*pairs.stride()[:-1], pairs.storage_offset())):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # a pair is one complex number; it must lie like one
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x_THR.dtype)


def rotary_frequencies(width: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians a position for each pair, [width / 2]; with YaRN the slow ones are divided by its factor.

    YaRN (arXiv 2309.00071, section 3.2): pairs that turn more than beta_fast times within the original context stay,
    those that turn less than beta_slow times are interpolated, a linear ramp lies between.
    """
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if yarn is None:
        return frequencies

    def pair_that_turns(times: float) -> float:
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp


def yarn_mscale(yarn: Yarn, mscale: float) -> float:
    """m = 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
