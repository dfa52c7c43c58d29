"""A layer for a few tokens at the speed of memory, in C++: `step.cpp`, built for this machine when first asked for.

Letters: T tokens, O outputs, I inputs, S stacked matrices, W int32 words of a row, G groups of columns.

Why not torch: for one token in bfloat16 its products read memory at 55 to 60 % of what the machine can, and some forty
calls a layer come on top (docs/results/running.md). Everything here has a plain twin in torch that computes the same,
and runs wherever there is no compiler.
"""

import ctypes
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

LANES = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 8, 4
ROW_KINDS = KINDS | {torch.int8: INT8}  # of a cache's rows; int8 as run/rows.py packs them
MOST_GROUPS = 4096  # of a row
# Bytes of a layer's weights, times tokens, below which one thread does it: threads that wait for one another at every
# turn gain little there, and lose ten times as much when something else wants a core.
WORTH_SHARING = 1 << 20
FLOATS = ctypes.c_void_p


MATRICES = (
    *("query_down", "query_up", "latent_down", "key_up", "value_up", "output"),
    *("router", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"),
)


class Matrix(ctypes.Structure):
    """See product.h. `tensors` is what it points into."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("stack_bytes", ctypes.c_int64),
        ("scale_row", ctypes.c_int64),
        ("scale_stack", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]
    tensors: tuple[Tensor, ...] = ()


class Layer(ctypes.Structure):
    """See step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("D", "H", "N", "R", "C", "U", "E", "K", "G")),
        *((name, ctypes.c_int64) for name in ("kept_groups", "best_of_group")),
        *((name, ctypes.c_int32) for name in ("low_rank_query", "sigmoid", "normalise", "shared")),
        *((name, ctypes.c_float) for name in ("eps", "latent_eps", "softmax_scale", "routed_scale")),
        ("bias", FLOATS),
        *((name, Matrix) for name in ("attention_norm", "query_norm", "latent_norm", "ffn_norm")),
        *((name, Matrix) for name in MATRICES),
    ]
    kept: tuple[Any, ...] = ()  # what it points into


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "spans_count", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "spans")),
        *((name, ctypes.c_void_p) for name in ("rows", "pages")),
        *((name, ctypes.c_int64) for name in ("page", "width", "latent_width", "row_kind", "row_bytes")),
        *((name, ctypes.c_void_p) for name in ("y", "ids", "weights", "scores")),
    ]


@runtime_checkable
class KeepsMatrix(Protocol):
    """A module with a matrix, or a stack of them by name, in a form of its own."""

    def matrix_as_stored(self, name: str = "") -> Matrix | None:
        """For `step.cpp`; None if that does not read it."""
        ...


class Places:
    """Where a step's tokens have their rows: for each sequence (first token, count, first position, first page).

    pages: the number of each sequence's pages, one sequence after the other, of `page` rows each.
    """

    def __init__(self, spans: list[tuple[int, int, int, int]], pages: list[int], page: int) -> None:
        self.spans = torch.tensor(spans, dtype=torch.int64, device="cpu")
        self.pages = torch.tensor(pages, dtype=torch.int64, device="cpu")
        self.page = page

    def part(self, start: int, end: int) -> "Places":
        """Of the step's tokens from `start` up to `end` alone."""
        made = copy(self)
        first_S, count_S, position_S, page_S = self.spans.unbind(dim=1)
        from_S, to_S = first_S.clamp(min=start), (first_S + count_S).clamp(max=end)
        spans = torch.stack([from_S - start, to_S - from_S, position_S + from_S - first_S, page_S], dim=1)
        made.spans = spans[to_S > from_S].contiguous()
        return made


def matrix(weight: Tensor) -> Matrix | None:
    """Of a plain [O, I] or [S, O, I] in float32 or bfloat16; None for what `step.cpp` does not read."""
    foreign = type(weight.data) is not Tensor  # a subclass may keep its numbers elsewhere
    if foreign or weight.dtype not in KINDS or not weight.is_contiguous() or weight.device.type != "cpu":
        return None
    outputs, inputs = weight.shape[-2:]
    size = weight.element_size()
    return _matrix(
        (weight.detach(),),
        kind=KINDS[weight.dtype],
        rows=outputs,
        columns=inputs,
        data=weight.data_ptr(),
        row_bytes=inputs * size,
        stack_bytes=outputs * inputs * size,
    )


def packed_matrix(words: Tensor, scale: Tensor, bits: int, group: int | None, columns: int) -> Matrix | None:
    """Of integers in int32 words [O, W] or [S, O, W] with scales [..., O, G], as weights.quant packs them."""
    group = min(group or columns, columns)
    fits = group == columns or (
        group % 16 == 0 if bits == 8 else group % 8 == 0 and (128 % group == 0 or group % 128 == 0)
    )
    if not fits or bits not in (INT8, INT4) or columns > MOST_GROUPS * group or words.device.type != "cpu":
        return None
    words, scale = words.contiguous(), scale.contiguous()
    scale = scale if scale.dtype in KINDS else scale.float()
    outputs, width = words.shape[-2:]
    return _matrix(
        (words, scale),
        kind=bits,
        scale_kind=KINDS[scale.dtype],
        rows=outputs,
        columns=columns,
        data=words.data_ptr(),
        scale=scale.data_ptr(),
        row_bytes=4 * width,
        stack_bytes=4 * width * outputs,
        scale_row=scale.shape[-1],
        scale_stack=scale.shape[-1] * outputs,
        group=group,
    )


def _matrix(tensors: tuple[Tensor, ...], **fields: Any) -> Matrix:
    made = Matrix(**fields)
    made.tensors = tensors
    return made


def product(library: ctypes.CDLL, m: Matrix, x_TI: Tensor) -> Tensor:
    """x Wᵀ [T, O], float32."""
    x_TI = x_TI.float().contiguous()
    assert x_TI.shape[1:] == (m.columns,), f"{tuple(x_TI.shape)} with {m.columns} columns"
    y_TO = x_TI.new_empty(x_TI.shape[0], m.rows)
    library.cavelight_product(
        ctypes.byref(m),
        _at(x_TI),
        ctypes.c_int64(len(x_TI)),
        _at(y_TO),
        ctypes.c_int64(_threads(m.rows * m.row_bytes * len(x_TI))),
    )
    return y_TO


def layers(
    library: ctypes.CDLL,
    chain: "Chain",
    x_TD: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    rows_MZW: Tensor,
    places: Places,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The output of layers in turn [T, D]; and of each router its ids [T, K], weights [T, K] and scores [T, E].

    Puts the tokens' rows into `rows_MZW`, these layers' part of a cache, in one of ROW_KINDS. All else is float32.
    """
    T, routers, first = x_TD.shape[0], chain.routers, chain.layers[0]
    x_TD, cos, sin = (t.float().contiguous() for t in (x_TD, *cos_sin))
    y_TD, scores_OTE = torch.empty_like(x_TD), x_TD.new_empty(routers, T, chain.E)
    weights_OTK = x_TD.new_empty(routers, T, chain.K)
    ids_OTK = torch.empty_like(weights_OTK, dtype=torch.int64)
    step = _Step(
        T,
        len(places.spans),
        _threads(chain.bytes * T),
        *(t.data_ptr() for t in (x_TD, cos, sin, places.spans, rows_MZW, places.pages)),
        places.page,
        first.C + first.R,
        first.C,
        ROW_KINDS[rows_MZW.dtype],
        rows_MZW.stride(1) * rows_MZW.element_size(),
        *(t.data_ptr() for t in (y_TD, ids_OTK, weights_OTK, scores_OTE)),
    )
    stride = rows_MZW.stride(0) * rows_MZW.element_size()
    library.cavelight_layers(chain.pointers, ctypes.c_int64(chain.count), ctypes.byref(step), ctypes.c_int64(stride))
    return y_TD, list(zip(ids_OTK, weights_OTK, scores_OTE, strict=True))


class Chain:
    """Layers to be computed one after the other, from number `first` on."""

    def __init__(self, layers: Sequence[Layer], first: int = 0) -> None:
        self.layers, self.first, self.count = layers, first, len(layers)
        self.pointers = (ctypes.POINTER(Layer) * self.count)(*map(ctypes.pointer, layers))
        routers = [layer for layer in layers if layer.E]
        self.routers = len(routers)
        self.E: int = routers[0].E if routers else 0
        self.K: int = routers[0].K if routers else 0
        self.bytes = max(map(_bytes, layers))  # that a token meets in a layer


def _bytes(layer: Layer) -> int:
    """Of the matrices that one token meets."""
    stacks = {"key_up": layer.H, "value_up": layer.H, "gate": layer.K, "up": layer.K, "down": layer.K}
    matrices = ((name, getattr(layer, name)) for name in MATRICES)
    return sum(stacks.get(name, 1) * m.rows * m.row_bytes for name, m in matrices)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= WORTH_SHARING else 1


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
