"""Computing every row as if it were alone, so that company changes not even its last bits.

Letters: T tokens, D inputs, O outputs.

A matrix product picks its way by the number of rows, and other ways round differently. Vectorised sigmoids and complex
products do their last few numbers by another formula than the rest. Here matrix products always see the same number of
rows, those two one row, experts one token, and attention one query (`paged.PagedCache.at`).
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cavelight.model.ports import RoutedExperts

ROWS = 16  # of every product: decoding reads the weights once for as many


SIGMOIDS = {F.silu, torch.sigmoid, Tensor.sigmoid}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__}


class RowBlocks(TorchFunctionMode):
    """While entered, `F.linear` takes `ROWS` rows at a time, the last filled up with zeros; the others take one."""

    entered: ClassVar[ContextVar[bool]] = ContextVar("entered", default=False)  # for products that torch does not see

    def __enter__(self) -> Self:
        self.token = self.entered.set(True)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # as above
        self.entered.reset(self.token)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SIGMOIDS and args[0].shape[0] > 1:
            return torch.cat([func(row) for row in args[0].split(1)])
        if func in PRODUCTS and isinstance(args[0], Tensor) and args[0].is_complex():  # RoPE, [T, H, R / 2]
            return torch.cat([func(x, turns) for x, turns in zip(args[0].split(1), args[1].split(1), strict=True)])
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x_TD, weight_OD = args[:2]
        T = x_TD.shape[0]
        padded_TD = F.pad(x_TD, (0, 0, 0, -T % ROWS))
        y_TO = torch.cat([F.linear(x_RD, weight_OD) for x_RD in padded_TD.split(ROWS)])
        return y_TO[:T]


class DispatchAlone:
    """`Dispatch` of one token at a time."""

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: RoutedExperts) -> Tensor:
        rows = (slice(t, t + 1) for t in range(x_TD.shape[0]))
        return torch.cat([experts(x_TD[row], ids_TK[row], weights_TK[row]) for row in rows])
