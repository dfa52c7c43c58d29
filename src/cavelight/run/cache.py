"""The latent cache: of every layer and position one row, its latent after the norm and its rotary key after RoPE.

Letters: T tokens of this step, S rows up to and with them, M layers of the trunk and then of the MTP modules, H heads,
N width without position, R rotary width, U value width, C latent width, L = C + R, W numbers of a row as it is stored
(see rows.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.kernels import attend
from cavelight.kernels.native import Places
from cavelight.kernels.room import zeros
from cavelight.run.rows import pack, row_width, unpack
from cavelight.spec.config import ModelConfig

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


class LatentCache:
    """One sequence's past, [M, capacity, W], in a dtype of `rows.cache_dtype`. Nothing expanded is ever stored.

    A row is addressed by its position. It is read by queries at or after that position alone, and whoever puts a
    token there writes the row first. So rejected drafts need no clean-up: their rows are overwritten unread.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.limit, self.C = config.max_position_embeddings, config.kv_lora_rank
        shape = (config.num_layers_with_mtp, min(capacity, self.limit), row_width(config, dtype))
        self.rows_MSW = zeros(shape, dtype, device)

    def at(self, start: int, form: Form | None = None) -> "CachedAttend":
        """`Attend` for one step whose tokens stand at positions `start`, `start` + 1, ...

        `form`: `kernels.attend.expanded` or `.absorbed` throughout, instead of the cheaper one at each call.
        """
        return CachedAttend(self, start, form)

    def write(self, layer: int, start: int, rows_TL: Tensor) -> Tensor:
        """Put rows at `start` and after; all rows [S, L] of the layer from position 0 to the last written."""
        end = start + rows_TL.shape[0]
        self.reserve(end)
        self.rows_MSW[layer, start:end] = pack(rows_TL, self.C, self.rows_MSW.dtype)
        return unpack(self.rows_MSW[layer, :end], self.C)

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`, at least doubling, so that growing costs little in sum."""
        layers, capacity, width = self.rows_MSW.shape
        if length <= capacity:
            return
        assert length <= self.limit, f"position {length - 1} in a context of {self.limit}"
        shape = (layers, min(max(length, 2 * capacity), self.limit), width)
        grown_MSW = zeros(shape, self.rows_MSW.dtype, self.rows_MSW.device)
        grown_MSW[:, :capacity] = self.rows_MSW
        self.rows_MSW = grown_MSW

    def bytes(self) -> int:
        """Memory held, used or not."""
        return self.rows_MSW.numel() * self.rows_MSW.element_size()


@dataclass(frozen=True)
class CachedAttend:
    """One step's `Attend`: its tokens' rows go into the cache, its queries look at them and at all rows before."""

    cache: LatentCache
    start: int
    form: Form | None = None

    def rows(self, tokens: int) -> tuple[Tensor, Places]:
        """For who writes and reads them without us: all rows, and where in them the step's tokens have theirs."""
        self.cache.reserve(self.start + tokens)
        rows_MSW = self.cache.rows_MSW
        return rows_MSW, Places([(0, tokens, self.start, 0)], [0], rows_MSW.shape[1])

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
        (H, N, C), R, U = k_up_HNC.shape, q_rope_THR.shape[-1], v_up_HUC.shape[1]
        rows_SL = self.cache.write(layer, self.start, torch.cat([c_TC, k_rope_TR], dim=-1))
        form = self.form
        if form is None:
            cheaper = attend.absorbed_is_cheaper(c_TC.shape[0], rows_SL.shape[0], H, N, R, U, C)
            form = attend.absorbed if cheaper else attend.expanded
        return form(q_nope_THN[None], q_rope_THR[None], rows_SL[None], k_up_HNC, v_up_HUC, scale)[0]
