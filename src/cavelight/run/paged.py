"""The latent cache of many sequences, in pages, and attention over it.

Letters: T tokens of this step, of all sequences end to end, S rows of one sequence up to and with its tokens, M layers
of the trunk and then of the MTP modules, H heads, N width without position, R rotary width, U value width, C latent
width, L = C + R, W numbers of a row as it is stored (see rows.py), Z slots: places for one row each, page after page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from cavelight.kernels import attend
from cavelight.kernels.native import Places
from cavelight.kernels.room import zeros
from cavelight.run.pages import Copy
from cavelight.run.rows import pack, row_width, unpack
from cavelight.spec.config import ModelConfig


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a step: `count` of them from position `start` on, their rows in these pages."""

    pages: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class PagedCache:
    """[M, Z, W]: memory that is there from the start and never grows, in a dtype of `rows.cache_dtype`."""

    def __init__(
        self, config: ModelConfig, pages: int, size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.size = size
        self.rows_MZW = zeros((config.num_layers_with_mtp, pages * size, row_width(config, dtype)), dtype, device)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Pages onto others, in this order."""
        for source, target in copies:
            a, b = source * self.size, target * self.size
            self.rows_MZW[:, b : b + self.size] = self.rows_MZW[:, a : a + self.size]

    def at(self, spans: Sequence[Span], alone: bool = False) -> "PagedAttend":
        """`Attend` for a step over these spans, whose tokens lie end to end.

        alone: every query by itself in the absorbed form, so that nothing depends on which others are in the step.
        """
        return PagedAttend(self, spans, alone)

    def slots(self, span: Span) -> Tensor:
        """Of every position before the span's end, in order: [S]."""
        pages = torch.tensor(span.pages[: -(-span.end // self.size)])
        slots_S = (pages[:, None] * self.size + torch.arange(self.size)).flatten()[: span.end]
        return slots_S.to(self.rows_MZW.device)

    def bytes(self) -> int:
        return self.rows_MZW.numel() * self.rows_MZW.element_size()


class PagedAttend:
    """One step's `Attend`: all rows are written, then each sequence's queries look at its own."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span], alone: bool) -> None:
        self.cache, self.spans, self.alone = cache, spans, alone
        tokens = accumulate((span.count for span in spans), initial=0)
        pages = accumulate((len(span.pages) for span in spans), initial=0)
        self.places = Places(
            [(first, s.count, s.start, page) for s, first, page in zip(spans, tokens, pages, strict=False)],
            [page for s in spans for page in s.pages],
            cache.size,
        )

    @cached_property
    def read_and_write(self) -> tuple[list[Tensor | slice], Tensor]:
        """Where each sequence's rows lie, and those of all tokens [T]. Only asked for where torch computes."""
        slots = [self.cache.slots(span) for span in self.spans]
        write_T = torch.cat([slots_S[span.start :] for slots_S, span in zip(slots, self.spans, strict=True)])
        return [_whole(slots_S) for slots_S in slots], write_T

    def rows(self, tokens: int) -> tuple[Tensor, Places]:
        """For who writes and reads them without us: all rows, and where in them the step's tokens have theirs."""
        return self.cache.rows_MZW, self.places

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
        rows_ZW = self.cache.rows_MZW[layer]
        reads, write_T = self.read_and_write
        (H, N, C), R, U = k_up_HNC.shape, q_rope_THR.shape[-1], v_up_HUC.shape[1]
        rows_ZW[write_T] = pack(torch.cat([c_TC, k_rope_TR], dim=-1), C, rows_ZW.dtype)
        o_THU, first = q_nope_THN.new_empty(q_nope_THN.shape[0], H, U), 0
        for span, read in zip(self.spans, reads, strict=True):
            rows_SL, T = unpack(rows_ZW[read], C), span.count
            if self.alone:
                form, step = attend.absorbed, 1
            else:
                cheaper = attend.absorbed_is_cheaper(T, span.end, H, N, R, U, C)
                form, step = (attend.absorbed if cheaper else attend.expanded), T
            for t in range(0, T, step):
                tokens = slice(first + t, first + t + step)
                seen_SL = rows_SL[: span.start + t + step]
                q = (q_nope_THN[None, tokens], q_rope_THR[None, tokens])
                o_THU[tokens] = form(*q, seen_SL[None], k_up_HNC, v_up_HUC, scale)[0]
            first += T
        return o_THU


def _whole(slots_S: Tensor) -> Tensor | slice:
    """The slots as a slice where they follow one another: then rows are read as they lie, without a copy."""
    first, last = int(slots_S[0]), int(slots_S[-1])
    follow = last - first == len(slots_S) - 1 and bool((slots_S.diff() == 1).all())
    return slice(first, last + 1) if follow else slots_S
