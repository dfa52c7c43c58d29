"""The two acts that the model is given: `Attend` and `Dispatch`, and their versions without a cache or a cluster.

Letters: T tokens of all sequences in one row, H heads, N width without position, R rotary width, U value width,
C latent width, D hidden size, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cavelight.kernels import attend


class Attend(Protocol):
    """Let each token look at those before it in its sequence. Who belongs together only the implementation knows."""

    def __call__(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        k_up_HNC: Tensor,
        v_up_HUC: Tensor,
        scale: float,
    ) -> Tensor:
        """Mixed values [T, H, U]. `c_TC` is past its norm, both rotary parts past RoPE."""
        ...


class RoutedExperts(Protocol):
    """A layer's routed experts, as `Dispatch` is given them: in which form they are stored is their own business."""

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's chosen experts [T, D]."""
        ...


class Dispatch(Protocol):
    """Send each token to its chosen experts and bring back the weighted sum."""

    def __call__(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: RoutedExperts
    ) -> Tensor: ...


@dataclass(frozen=True)
class PackedAttend:
    """Sequences laid end to end, each seeing only itself, no past: for training and evaluation."""

    lengths: Sequence[int]

    def __call__(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        k_up_HNC: Tensor,
        v_up_HUC: Tensor,
        scale: float,
    ) -> Tensor:
        return attend.packed(q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, self.lengths, scale)


@dataclass(frozen=True)
class GroupedDispatch:
    """All experts at home: one grouped product."""

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: RoutedExperts) -> Tensor:
        return experts(x_TD, ids_TK, weights_TK)
