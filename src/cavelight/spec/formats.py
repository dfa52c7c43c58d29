"""How a checkpoint stores its matrices: plain, DeepSeek-V3's block-fp8, or packed integers. No torch.

Block-fp8: a byte an element (E4M3) and, beside `X.weight`, a float32 `X.weight_scale_inv` for each block of 128 x 128,
which despite its name multiplies (V3 report, section 3.3; README_WEIGHTS). Packed integers are compressed-tensors'
`pack-quantized` layout: symmetric integers of 4 or 8 bits, made unsigned by an offset and laid little end first into
int32 words, with one scale a row (per channel) or a row's group of columns.

Letters: o outputs (rows), i inputs (columns) of a matrix [o, i].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal, NamedTuple

from cavelight.errors import UserError

# What DeepSeek-V3's checkpoints hold in fp8; embedding, head, norms, gates and the MTP projection stay plain.
PACKED_ROLES = frozenset({"attention", "dense", "expert", "shared_expert"})
Kind = Literal["plain", "fp8", "int"]

_WORD = 32  # bits of an int32
_CODE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I32": 4, "I64": 8}
MOST_BLOCK = 2**16  # rows or columns that may share an fp8 scale
_UNPACK_FIRST = "take the checkpoint in bfloat16, in block-fp8 or in compressed-tensors' pack-quantized format"


class Stored(NamedTuple):
    """One tensor of a packed matrix as the file has it; `code` is safetensors' name of its dtype."""

    name: str
    shape: tuple[int, ...]
    code: str


@dataclass(frozen=True, slots=True)
class Format:
    """How the matrices of PACKED_ROLES are stored. What a given file packs is read from what it holds.

    block: rows and columns that share an fp8 scale. ue8m0: fp8 scales are powers of two. bits, group: of integers;
    without a group a whole row shares its scale.
    """

    kind: Kind
    block: tuple[int, int] = (128, 128)
    ue8m0: bool = False
    bits: int = 0
    group: int | None = None

    @classmethod
    def of(cls, quantization_config: Mapping[str, Any] | None) -> "Format":
        """The format that a config.json's `quantization_config` announces; PLAIN where there is none.

        Raises UserError for methods and settings that are not known to be read right.
        """
        if not quantization_config:
            return PLAIN
        if not isinstance(quantization_config, Mapping):
            raise _unknown("value", quantization_config, "it has to be an object")
        match quantization_config.get("quant_method"):
            case "fp8":
                return _fp8(quantization_config)
            case "compressed-tensors":
                return _packed_integers(quantization_config)
            case method:
                raise _unknown("quant_method", method, "fp8 and compressed-tensors are read")

    def quantization_config(self, ignore: Sequence[str] = ()) -> dict[str, Any] | None:
        """What config.json says of this format, in the field's standard way; None for PLAIN.

        ignore: modules whose matrix is plain all the same (`lm_head`, not `lm_head.weight`).
        """
        if self.kind == "plain":
            return None
        if self.kind == "fp8":
            config: dict[str, Any] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(self.block),
            }
            config |= {"scale_fmt": "ue8m0"} if self.ue8m0 else {}
            return config | ({"modules_to_not_convert": list(ignore)} if ignore else {})
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group,
            "dynamic": False,
            "actorder": None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a packed matrix [o, i]; a ragged last block or group has one too."""
        o, i = shape
        if self.kind == "fp8":
            return ceil(o / self.block[0]), ceil(i / self.block[1])
        return o, ceil(i / self.group) if self.group else 1

    def companions(self, name: str, shape: tuple[int, int], plain: str = "BF16") -> tuple[Stored, ...]:
        """What is stored in place of the matrix `name` (X.weight) of `shape` [o, i], the values first.

        plain: safetensors' code of the plain values' dtype, in which integers have their scales.
        """
        if self.kind == "plain":
            return (Stored(name, shape, plain),)
        if self.kind == "fp8":
            return Stored(name, shape, "F8_E4M3"), Stored(f"{name}_scale_inv", self.scale_shape(shape), "F32")
        return (
            Stored(f"{name}_packed", (shape[0], ceil(shape[1] * self.bits / _WORD)), "I32"),
            Stored(f"{name}_scale", self.scale_shape(shape), plain),
            Stored(f"{name}_shape", (2,), "I64"),
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix, or of a stack of them, over their last two axes: values and scales; plain is bfloat16."""
        matrix = self.companions("", (shape[-2], shape[-1]))
        stored = sum(prod(part.shape) * _CODE_BYTES[part.code] for part in matrix if part.code != "I64")
        return prod(shape[:-2]) * stored


PLAIN = Format("plain")
FP8 = Format("fp8")
INT8 = Format("int", bits=8)
INT4 = Format("int", bits=4, group=32)
_NAMED = {"hf": PLAIN, "fp8": FP8, "int8": INT8, "int4": INT4}


def named(to: str) -> Format:
    """The format that `--to` names: hf, fp8, int8 or int4."""
    if to not in _NAMED:
        raise UserError(f"{to!r} is no format", got=to, do=f"choose one of {', '.join(_NAMED)}")
    return _NAMED[to]


def _fp8(config: Mapping[str, Any]) -> Format:
    block = config.get("weight_block_size", [128, 128])
    match block:
        case [int(rows), int(columns)] if 0 < rows <= MOST_BLOCK and 0 < columns <= MOST_BLOCK:
            pass
        case _:
            raise _unknown("weight_block_size", block, "it has to be two sizes, as in [128, 128]")
    for key, known in (("fmt", ("e4m3",)), ("scale_fmt", ("ue8m0", "float")), ("expert_dtype", ("fp8",))):
        if config.get(key) not in (None, *known):
            raise _unknown(key, config[key], f"only {' and '.join(known)} are read")
    return Format("fp8", (rows, columns), config.get("scale_fmt") == "ue8m0")


def _packed_integers(config: Mapping[str, Any]) -> Format:
    if config.get("format") != "pack-quantized":
        raise _unknown("format", config.get("format"), "of compressed-tensors' formats pack-quantized is read")
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise _unknown(key, config[key], "the weights would not be those of the model")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unknown("config_groups", groups, "it has to say how weights are packed")
    formats = {_weights(group) for group in groups.values()}
    if len(formats) > 1:
        raise _unknown("config_groups", list(groups), "all groups have to pack their weights in the same way")
    return formats.pop()


def _weights(group: Any) -> Format:
    """One entry of compressed-tensors' config_groups."""
    match group:
        case {"input_activations": dict() as activations}:
            raise _unknown("input_activations", activations, "activations are never quantised here")
        case {
            "weights": {"type": "int", "symmetric": True, "num_bits": (4 | 8) as bits, "strategy": strategy} as weights
        } if weights.get("actorder") in (None, "static", "weight"):
            size = weights.get("group_size")
            if strategy == "channel" and size in (None, -1):
                return Format("int", bits=bits)
            if strategy == "group" and isinstance(size, int) and size > 0:
                return Format("int", bits=bits, group=size)
    raise _unknown("config_groups", group, "symmetric integers of 4 or 8 bits are read, scaled by channel or by group")


def _unknown(key: str, value: Any, why: str) -> UserError:
    return UserError(
        f"quantization_config has a {key} that Cavelight cannot read", got=f"{value!r:.300}", why=why, do=_UNPACK_FIRST
    )
