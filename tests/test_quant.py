"""Packing and unpacking: against their definitions, for ragged shapes, and against other people's code.

Letters: O outputs (rows), I inputs (columns) of a matrix.
"""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from cavelight.spec.formats import FP8, INT4, INT8, PLAIN, Format
from cavelight.weights import quant
from cavelight.weights.quant import E4M3_MAX, e4m3_values, integers, pack, unpack, words

UE8M0 = Format("fp8", ue8m0=True)
SMALL = Format("fp8", (4, 3))
FORMATS = [FP8, UE8M0, SMALL, INT8, INT4, Format("int", bits=4), Format("int", bits=8, group=5)]
RAGGED = [(1, 1), (1, 7), (576, 64), (130, 129), (5, 33), (128, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Gaussian, with rows of different sizes and a few values far out."""
    generator = torch.Generator().manual_seed(seed)
    x_OI = 0.02 * torch.randn(shape, generator=generator) * (1 + torch.arange(shape[0])[:, None] % 7)
    x_OI.view(-1)[:: shape[0] * shape[1] // 3 + 1] *= 10
    return x_OI


def plainly_unpacked(parts: dict[str, Tensor], format: Format) -> Tensor:
    """The definition, a value at a time: stored value times the scale of its block."""
    if format.kind == "fp8":
        values, scale, block = parts["weight"].float(), parts["weight_scale_inv"], format.block
    else:
        rows, columns = parts["weight_shape"].tolist()
        values, scale, block = torch.empty(rows, columns), parts["weight_scale"].float(), (1, format.group or columns)
        for o in range(rows):
            bits = sum((word % 2**32) << (32 * at) for at, word in enumerate(parts["weight_packed"][o].tolist()))
            for i in range(columns):
                values[o, i] = (bits >> (i * format.bits)) % 2**format.bits - 2 ** (format.bits - 1)
    plain = torch.empty_like(values)
    for o in range(values.shape[0]):
        for i in range(values.shape[1]):
            plain[o, i] = values[o, i] * scale[o // block[0], i // block[1]]
    return plain


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (9, 10), (1, 70)], ids=str)
def test_unpacking_is_as_defined(format: Format, shape: tuple[int, int]) -> None:
    parts = pack(matrix(shape), format)
    plain = plainly_unpacked(parts, format)
    assert torch.equal(unpack(parts, format, torch.float32), plain)
    assert torch.equal(unpack(parts, format, torch.bfloat16), plain.bfloat16())


def test_plain_stays_plain() -> None:
    x_OI = matrix((3, 4))
    assert torch.equal(unpack(pack(x_OI, PLAIN), PLAIN, torch.bfloat16), x_OI.bfloat16())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_moves_further_than_its_format_allows(
    format: Format, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x_OI = matrix(shape).to(dtype)
    parts = pack(x_OI, format)
    x_OI, error_OI = x_OI.float(), (unpack(parts, format, torch.float32) - x_OI.float()).abs()
    if format.kind == "fp8":
        scale = parts["weight_scale_inv"].repeat_interleave(format.block[0], 0).repeat_interleave(format.block[1], 1)
        # Three bits of mantissa: half of 2^-3 of the value, or of 2^-9 scales where values are subnormal.
        allowed = torch.maximum(x_OI.abs() * 2**-4, scale[: shape[0], : shape[1]] * 2**-10)
    else:
        assert parts["weight_scale"].dtype == dtype
        columns = format.group or shape[1]
        scale = parts["weight_scale"].float().repeat_interleave(columns, 1)[:, : shape[1]]
        clipped = (x_OI.abs() - scale * (2 ** (format.bits - 1) - 0.5)).clamp(min=0)
        assert format.bits < 8 or not (clipped > scale * 0.26).any()  # 127 times the scale's own rounding
        allowed = scale / 2 + clipped
    assert (error_OI <= allowed * 1.00001).all()


@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**31), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_integers_survive_their_words(rows: int, columns: int, bits: int, seed: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    values_OI = torch.randint(-half, half, (rows, columns), generator=generator)
    packed_OW = words(values_OI, bits)
    assert packed_OW.shape == (rows, -(-columns * bits // 32)) and packed_OW.dtype == torch.int32
    assert torch.equal(integers(packed_OW, bits, columns).long(), values_OI)
    padded_OW = torch.cat([packed_OW, packed_OW.new_full((rows, extra), -1)], dim=1)
    assert torch.equal(integers(padded_OW[:, : packed_OW.shape[1]], bits, columns).long(), values_OI)  # not contiguous


@given(st.sampled_from(FORMATS), st.integers(1, 300), st.integers(1, 140), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_again_changes_nothing(format: Format, rows: int, columns: int, seed: int) -> None:
    """Converted there and back any number of times, a checkpoint does not drift."""
    first = pack(matrix((rows, columns), seed), format, torch.bfloat16)
    unpacked = unpack(first, format, torch.float32)
    again = pack(unpacked, format, torch.bfloat16)
    if format.kind == "int":
        assert all(torch.equal(first[suffix], again[suffix]) for suffix in first)
    torch.testing.assert_close(unpack(again, format, torch.float32), unpacked, rtol=5e-7, atol=0)


def test_fp8_codes_survive_bfloat16() -> None:
    first = pack(matrix((576, 300)), FP8)
    again = pack(unpack(first, FP8, torch.bfloat16), FP8)
    assert torch.equal(first["weight"].view(torch.uint8), again["weight"].view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_can_be_packed_and_unpacked_in_blocks(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    x_OI = matrix((300, 70))
    whole = pack(x_OI, format)
    monkeypatch.setattr(quant, "TILE", 100)
    blocks = [pack(block, format) for block in x_OI.split(128 if format.block == (128, 128) else 12)]
    for suffix in whole.keys() - {"weight_shape"}:
        assert torch.equal(torch.cat([block[suffix] for block in blocks]).float(), whole[suffix].float())
    unpacked = torch.cat([unpack(block, format, torch.float32) for block in blocks])
    monkeypatch.undo()
    assert torch.equal(unpacked, unpack(whole, format, torch.float32))


# fp8


def test_every_code_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    unpacked = unpack({"weight": codes, "weight_scale_inv": torch.tensor([[0.5]])}, FP8, torch.float32)
    torch.testing.assert_close(unpacked, codes.float() / 2, rtol=0, atol=0, equal_nan=True)
    assert int(unpacked.isnan().sum()) == 2


def test_scales_multiply_and_cover_their_blocks() -> None:
    x_OI = matrix((130, 129))
    parts = pack(x_OI, FP8)
    assert parts["weight_scale_inv"].shape == (2, 2)
    for down, across in ((0, 0), (0, 1), (1, 0), (1, 1)):
        block = x_OI[128 * down : 128 * down + 128, 128 * across : 128 * across + 128]
        assert parts["weight_scale_inv"][down, across] == block.abs().max() / E4M3_MAX
    assert float(parts["weight"].float().abs().max()) == E4M3_MAX


@given(st.floats(1e-4, 1e4))
@settings(max_examples=200, deadline=None)
def test_power_of_two_scales_are_the_next_ones_up(amax: float) -> None:
    x_OI = torch.tensor([[amax, -amax / 3]])
    scale = pack(x_OI, UE8M0)["weight_scale_inv"]
    wanted = float(x_OI.max() / E4M3_MAX)
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)  # a power of two
    assert wanted <= float(scale) < 2 * wanted


def test_exact_powers_of_two_stay() -> None:
    scales = [float(pack(torch.tensor([[448.0 * 2**n]]), UE8M0)["weight_scale_inv"]) for n in range(-10, 10)]
    assert scales == [2.0**n for n in range(-10, 10)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_the_smallest_numbers(format: Format, dtype: torch.dtype) -> None:
    x_OI = torch.zeros(6, 40, dtype=dtype)
    x_OI[3, 5] = torch.finfo(dtype).smallest_normal
    parts = pack(x_OI, format)
    scale = parts["weight_scale_inv" if format.kind == "fp8" else "weight_scale"].float()
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(unpack(parts, format, torch.float32)[:3], torch.zeros(3, 40))


# Integers


def test_searched_scales_beat_the_largest_value() -> None:
    """Never worse in a group, and by a good deal on the whole."""
    x_OI = matrix((64, 256))
    errors = []
    for clips in ((1.0,), quant.CLIPS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quant, "CLIPS", clips)
            error_OI = unpack(pack(x_OI, INT4), INT4, torch.float32) - x_OI
        errors.append(error_OI.view(64, 8, 32).square().sum(dim=-1))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.85 * errors[0].sum()


# Other people's code

WHOLE_GROUPS = [
    (INT8, (5, 37)),
    (INT4, (5, 64)),
    (Format("int", bits=8, group=32), (4, 96)),
    (Format("int", bits=4), (3, 50)),
]


@pytest.mark.parametrize(("format", "shape"), WHOLE_GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compressed_tensors_reads_ours_and_we_read_theirs(
    format: Format, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    said = QuantizationConfig.model_validate(format.quantization_config(["lm_head"]))
    scheme = said.config_groups["group_0"]
    x_OI = matrix(shape).to(dtype)
    ours = pack(x_OI, format)
    assert torch.equal(
        PackedQuantizationCompressor.decompress(dict(ours), scheme)["weight"], unpack(ours, format, dtype)
    )
    theirs = PackedQuantizationCompressor.compress({"weight": x_OI, "weight_scale": ours["weight_scale"]}, scheme)
    decompressed = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(unpack(theirs, format, dtype), decompressed)
    if dtype == torch.float32:  # in bfloat16 it divides more coarsely
        assert torch.equal(theirs["weight_packed"], ours["weight_packed"])


@pytest.mark.parametrize("format", [FP8, UE8M0], ids=str)
def test_transformers_reads_ours_and_we_read_theirs(format: Format) -> None:
    """Whole blocks: transformers refuses ragged ones, or takes them for smaller blocks."""
    said = SimpleNamespace(scale_fmt="ue8m0" if format.ue8m0 else "float", weight_block_size=[128, 128])
    quantizer = SimpleNamespace(quantization_config=said)
    x_OI = matrix((384, 256))
    ours = pack(x_OI, format)
    read = Fp8Dequantize(quantizer).convert({key: [part] for key, part in ours.items()})["weight"]
    assert torch.equal(read, unpack(ours, format, torch.float32))
    theirs = Fp8Quantize(quantizer).convert({"weight": x_OI})
    reread = Fp8Dequantize(quantizer)._dequantize_one(theirs["weight"], theirs["weight_scale_inv"], torch.float32)
    assert torch.equal(unpack(theirs, format, torch.float32), reread)
    torch.testing.assert_close(theirs["weight_scale_inv"].float(), ours["weight_scale_inv"], rtol=3e-7, atol=0)


def test_codes_are_looked_up_in_pairs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    every_pair = torch.stack([codes.repeat(256), codes.repeat_interleave(256)], dim=1).view(torch.float8_e4m3fn)
    for codes_OI in (every_pair, every_pair.mT, every_pair[:1, :1], every_pair[:0]):
        assert torch.equal(e4m3_values(codes_OI).nan_to_num(nan=1e9), codes_OI.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("format", [INT8, INT4], ids=str)
def test_scales_too_small_for_float16_cut_nothing_off(format: Format) -> None:
    most = 2 ** (format.bits - 1) - 1
    for steps in (0.3, 1.2, 1.43, 2.4, 9.45):  # of 2^-24, the least that float16 has
        x_OI = torch.linspace(-1, 1, 64).repeat(3, 1) * most * steps * 2.0**-24
        parts = pack(x_OI, format, torch.float16)
        scale_OI = parts["weight_scale"].float().repeat_interleave(format.group or 64, dim=1)
        clipped = 1 if format.bits == 8 else min(quant.CLIPS)
        assert bool((scale_OI * most >= x_OI.abs() * clipped).all())
