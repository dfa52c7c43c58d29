"""Packing matrices into fewer bytes and back: DeepSeek-V3's block-fp8, and integers of 4 or 8 bits.

Both ways work on a block of rows, so that no matrix has to be in memory whole; for fp8 it has to begin at a multiple of
the format's block rows. What is stored under which name is spec/formats.py's business, here only suffixes are known.

Letters: O outputs (rows), I inputs (columns) of a matrix, G groups of columns that share a scale in each row,
W int32 words of a row.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.spec.formats import Format

E4M3_MAX = 448.0
LEAST_AMAX = 1e-4  # of an fp8 block: one of zeros has a scale too
# Scales tried for a group of few-bit integers, in units of the one at which its largest value just fits: clipping that
# one often pays. With 7/8 in it, packing what was unpacked gives the same again (4 bits reach from -8 to 7).
CLIPS = (1.0, 0.94, 7 / 8, 0.82, 0.76)
TILE = 1 << 18  # elements worked on at a time, so that they stay in the processor's cache


def pack(rows_OI: Tensor, format: Format, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Rows of a matrix, finite ones, as their format stores them: a tensor for each suffix of the matrix's name.

    dtype: of the integers' scales, the rows' own unless given. The suffix "weight_shape" tells the shape of the given
    rows. Returns "weight" alone for a plain format.
    """
    if format.kind == "plain":
        return {"weight": rows_OI}
    rows, columns = rows_OI.shape
    packed = [
        _pack_tile(rows_OI[tile].float(), format, dtype or rows_OI.dtype) for tile in tiles_of(rows, columns, format)
    ]
    parts = {suffix: torch.cat([tile[suffix] for tile in packed]) for suffix in packed[0]}
    return parts | ({"weight_shape": torch.tensor([rows, columns])} if format.kind == "int" else {})


def unpack(parts: Mapping[str, Tensor], format: Format, dtype: torch.dtype, columns: int | None = None) -> Tensor:
    """The plain rows [O, I] of what `pack` gives. Multiplied in float32, then cast to `dtype`.

    columns: I, where `parts` come without the "weight_shape" of integers.
    """
    if format.kind == "plain":
        return parts["weight"].to(dtype)
    values = parts["weight" if format.kind == "fp8" else "weight_packed"]
    rows = values.shape[0]
    if columns is None:
        columns = values.shape[1] if format.kind == "fp8" else int(parts["weight_shape"][1])
    rows_OI = torch.empty(rows, columns, dtype=dtype, device=values.device)
    for tile in tiles_of(rows, columns, format):
        rows_OI[tile] = unpack_tile(parts, format, tile, columns)
    return rows_OI


def tiles_of(rows: int, columns: int, format: Format, elements: int = TILE) -> Iterator[slice]:
    """Rows to be worked on at a time: about so many elements, beginning at a multiple of the format's block rows."""
    multiple = format.block[0] if format.kind == "fp8" else 1
    step = max(1, elements // max(1, columns * multiple)) * multiple
    return (slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step))


def unpack_tile(parts: Mapping[str, Tensor], format: Format, tile: slice, columns: int) -> Tensor:
    """Some rows of what `unpack` gives, in float32."""
    if format.kind == "int":
        values_OI = integers(parts["weight_packed"][tile], format.bits, columns).float()
        return _scale(values_OI, parts["weight_scale"][tile].float(), (1, format.group or columns))
    values_OI = e4m3_values(parts["weight"][tile])
    scale = parts["weight_scale_inv"][tile.start // format.block[0] : -(-tile.stop // format.block[0])]
    return _scale(values_OI, scale.float(), format.block)


def e4m3_values(codes_OI: Tensor) -> Tensor:
    """`codes_OI.float()`, on a CPU by looking up two at a time, which is six times as fast there."""
    if codes_OI.device.type != "cpu" or codes_OI.numel() % 2:
        return codes_OI.float()
    pairs = codes_OI.contiguous().view(torch.uint8).flatten().view(torch.uint16)
    return _e4m3_pairs().index_select(0, pairs.int()).view(torch.float32).view(codes_OI.shape)


@cache
def _e4m3_pairs() -> Tensor:
    """The values of every two codes side by side, as the 64 bits that they fill: the first code is the lower byte."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    low, high = values.repeat(256), values.repeat_interleave(256)
    return torch.stack([low, high], dim=1).view(torch.float64).flatten()


def integers(packed_OW: Tensor, bits: int, columns: int) -> Tensor:
    """The signed integers in packed words, int8 [O, I]; the first lies in a word's lowest bits."""
    bytes_OX = packed_OW.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_OX[:, :columns].view(torch.int8) ^ -128  # two's complement and offset differ in the top bit
    nibbles_OX2 = torch.stack([bytes_OX & 15, bytes_OX >> 4], dim=-1)
    return nibbles_OX2.flatten(1)[:, :columns].view(torch.int8) - 8


def words(values_OI: Tensor, bits: int) -> Tensor:
    """The reverse of `integers`: int32 [O, W]. Bits past the last column are zero."""
    unsigned_OI = (values_OI + (1 << (bits - 1))).to(torch.uint8)
    unsigned_OI = F.pad(unsigned_OI, (0, -values_OI.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned_OI = unsigned_OI[:, ::2] | (unsigned_OI[:, 1::2] << 4)
    return unsigned_OI.view(torch.int32)


def _pack_tile(x_OI: Tensor, format: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    return _pack_fp8(x_OI, format) if format.kind == "fp8" else _pack_int(x_OI, format, dtype)


def _pack_fp8(x_OI: Tensor, format: Format) -> dict[str, Tensor]:
    """DeepSeek's reference quantiser: s = amax / 448 of each block, values x / s; s a power of two where ue8m0."""
    scale = _amax(x_OI, format.block).clamp_(min=LEAST_AMAX) / E4M3_MAX
    if format.ue8m0:
        fraction, exponent = torch.frexp(scale)  # scale = fraction * 2^exponent, 0.5 <= fraction < 1
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())  # 2^ceil(log2 scale)
    values_OI = (x_OI / _spread(scale, x_OI.shape, format.block)).clamp_(-E4M3_MAX, E4M3_MAX)
    return {"weight": values_OI.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _pack_int(x_OI: Tensor, format: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    block = (1, format.group or x_OI.shape[1])
    most = 2 ** (format.bits - 1) - 1
    amax_OG = _amax(x_OI, block)
    best_OG = _storable(amax_OG / most, dtype)
    if format.bits < 8:  # with 8 bits there is nothing to gain
        least_OG = torch.full_like(amax_OG, torch.inf)
        for clip in CLIPS:
            scale_OG = _storable(amax_OG * clip / most, dtype)
            error_OG = _squared_error(x_OI, scale_OG, block, most)
            best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
            least_OG = torch.minimum(error_OG, least_OG)
    values_OI = _rounded(x_OI, _spread(best_OG, x_OI.shape, block), most)
    return {"weight_packed": words(values_OI, format.bits), "weight_scale": best_OG.to(dtype)}


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be read back: rounded to `dtype`, and never to zero.

    Up where they are subnormal there, and steps so wide that the next one below would cut large values off.
    """
    normal = torch.finfo(dtype).smallest_normal
    step = normal * torch.finfo(dtype).eps
    scale = torch.where(scale < normal, (scale / step).ceil() * step, scale)
    return scale.clamp(min=step).to(dtype).float()


def _rounded(x_OI: Tensor, scale_OI: Tensor, most: int) -> Tensor:
    return (x_OI / scale_OI).round_().clamp_(-most - 1, most)


def _squared_error(x_OI: Tensor, scale_OG: Tensor, block: tuple[int, int], most: int) -> Tensor:
    """Of each group, after rounding with this scale."""
    scale_OI = _spread(scale_OG, x_OI.shape, block)
    error_OI = _rounded(x_OI, scale_OI, most).mul_(scale_OI).sub_(x_OI).square_()
    return _blocks(error_OI, block).sum(dim=(1, 3))


def _amax(x_OI: Tensor, block: tuple[int, int]) -> Tensor:
    return _blocks(x_OI.abs(), block).amax(dim=(1, 3))


def _blocks(x_OI: Tensor, block: tuple[int, int]) -> Tensor:
    """Blocks on axes of their own, [blocks down, rows, blocks across, columns]; ragged ones are filled with zeros."""
    rows, columns = block
    ragged = (0, -x_OI.shape[1] % columns, 0, -x_OI.shape[0] % rows)
    padded = F.pad(x_OI, ragged) if any(ragged) else x_OI
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """A block's scale for each of its elements."""
    by_row = scale.repeat_interleave(block[0], dim=0)[: shape[0]] if block[0] > 1 else scale
    return by_row.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def _scale(values_OI: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    return values_OI.mul_(_spread(scale, values_OI.shape, block))
