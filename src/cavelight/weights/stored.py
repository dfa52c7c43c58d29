"""A checkpoint folder seen as the plain tensors that it stands for, whatever its format, a block of rows at a time.

Which matrices are packed is read from what is stored, name by name, never from their role: prediction modules may be
plain inside an fp8 checkpoint, and a checkpoint of integers may have packed its routed experts alone.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import Format
from cavelight.weights.files import Entry, Safetensors, abbreviated, empty
from cavelight.weights.quant import unpack

ROWS = 128  # blocks of rows begin at its multiples, so that fp8 can be packed from them
LIMIT_BYTES = 64 * 2**20
PLAIN = {torch.float32, torch.bfloat16, torch.float16}
FP8, POWER_OF_TWO = torch.float8_e4m3fn, torch.float8_e8m0fnu
DOWNLOAD = "download the checkpoint again, config.json and weights from the same place"


class Checkpoint:
    """A folder with config.json and safetensors, in any format that spec/formats.py knows.

    `shapes` maps plain names to plain shapes, in the order of the files: what belongs to one packed matrix is folded
    into one name, and whatever belongs to none stands for itself (weights.names.check_fit finds what is left over).
    `raw` is config.json as it stands. Raises UserError for a broken configuration, for files that are broken, and for
    packed matrices whose scales are missing, misshapen or left over; what scales hold is checked when they are read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}",
                why="a checkpoint is a folder with config.json and *.safetensors",
                do="give the path of one; a model on the Hugging Face hub has to be downloaded first",
            )
        self.folder = folder
        self.config = ModelConfig.read(folder)
        self.raw: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        self.format = Format.of(self.raw.get("quantization_config"))
        self.files = Safetensors(folder)
        self._check_announced()
        self._parts = self._packed_parts()
        folded = {part: name for name, parts in self._parts.items() for part in parts.values()}
        names = dict.fromkeys(folded.get(name, name) for name in self.files.entries)
        self.shapes = {name: self._plain_shape(name) for name in names}
        for name in names:
            if name in self._parts:
                self._check_parts(name)
            else:
                self._check_plain(name)

    def is_packed(self, name: str) -> bool:
        """Whether the matrix is stored in the checkpoint's format rather than plain."""
        return name in self._parts

    def parts(self, name: str) -> dict[str, str]:
        """Of a packed matrix: the stored name of each of its parts, by suffix (see weights.quant.pack)."""
        return dict(self._parts[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of the plain values: as stored; of packed integers that of their scales, of fp8 bfloat16."""
        parts = self._parts.get(name)
        if parts is None:
            return self._entry(name).dtype
        return self._entry(parts["weight_scale"]).dtype if self.format.kind == "int" else torch.bfloat16

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor, as `dtype` (its own unless given)."""
        dtype = dtype or self.dtype(name)
        if not self.is_packed(name):
            return self.files.tensor(name).to(dtype)
        tensor = empty(self.shapes[name], dtype, name)
        for start, rows in self.blocks(name, dtype=dtype):
            tensor[start : start + len(rows)] = rows
        return tensor

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start..stop of the plain tensor; no others are read, but for those that share an fp8 scale."""
        dtype = dtype or self.dtype(name)
        if not self.is_packed(name):
            return self.files.rows(name, start, stop).to(dtype)
        block = self.format.block[0] if self.format.kind == "fp8" else 1
        first = start // block * block
        return unpack(self.packed_rows(name, first, stop), self.format, dtype)[start - first :]

    def packed_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Rows start..stop of a packed matrix as they are stored, by suffix; fp8 from a multiple of its block's rows.

        Raises UserError for scales that are not finite and positive.
        """
        parts = self._parts[name]
        if self.format.kind == "int":
            stored = {
                suffix: self.files.rows(parts[suffix], start, stop) for suffix in ("weight_packed", "weight_scale")
            }
            stored["weight_shape"] = torch.tensor([stop - start, self.shapes[name][1]])
            scale = parts["weight_scale"]
        else:
            block, scale = self.format.block[0], parts["weight_scale_inv"]
            stored = {
                "weight": self.files.rows(parts["weight"], start, stop),
                "weight_scale_inv": self.files.rows(scale, start // block, math.ceil(stop / block)),
            }
        _check_scale(scale, next(stored[suffix] for suffix in stored if parts[suffix] == scale))
        return stored

    def packed_stack(self, names: Sequence[str], mapped: bool) -> dict[str, Tensor]:
        """Packed matrices of one shape and the same dtypes as one, [number of names, O, ...], by suffix but the shape.

        mapped: as they lie in their file, where they do (see weights.files.Safetensors.mapped). Raises UserError for
        scales that are not finite and positive.
        """
        stacks = {}
        for suffix in (
            ("weight_packed", "weight_scale") if self.format.kind == "int" else ("weight", "weight_scale_inv")
        ):
            stored = [self._parts[name][suffix] for name in names]
            view = self.files.mapped(stored) if mapped else None
            if view is None:
                entry = self._entry(stored[0])
                view = empty((len(stored), *entry.shape), entry.dtype, entry.name)
                for number, name in enumerate(stored):
                    view[number] = self.files.tensor(name)
            if suffix.startswith("weight_scale"):
                for name, scale in zip(stored, view, strict=True):
                    _check_scale(name, scale)
            stacks[suffix] = view
        return stacks

    def blocks(
        self, name: str, limit_bytes: int = LIMIT_BYTES, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The plain tensor in blocks of whole rows: each one's first row, a multiple of 128, and the rows.

        As few rows are read as keep a block below `limit_bytes` in float32, but 128 at least.
        """
        shape = self.shapes[name]
        if not shape:
            yield 0, self.tensor(name, dtype)
            return
        step = math.lcm(ROWS, self.format.block[0])
        step *= max(1, limit_bytes // (4 * step * math.prod(shape[1:]) or 1))
        for start in range(0, shape[0], step):
            yield start, self.rows(name, start, min(start + step, shape[0]), dtype)

    def _entry(self, name: str) -> Entry:
        return self.files.entries[name]

    def _check_announced(self) -> None:
        """What config.json says of the format has to fit what is stored."""
        fp8 = [name for name, entry in self.files.entries.items() if entry.dtype == FP8]
        integers = [name for name in self.files.entries if name.endswith(".weight_packed")]
        for kind, found in (("fp8", fp8), ("int", integers)):
            if found and self.format.kind != kind:
                announced = self.raw.get("quantization_config")
                raise UserError(
                    f"{self.folder} holds packed weights that its config.json does not describe",
                    got=f"{len(found):,} such as {found[0]}, and quantization_config {announced!r:.200}",
                    why="how to unpack them (block or group sizes) is said there",
                    do="put back the config.json that came with the weights",
                )

    def _packed_parts(self) -> dict[str, dict[str, str]]:
        """For each packed matrix X.weight the stored names of its parts, by suffix."""
        if self.format.kind == "plain":
            return {}
        marks = (
            ("weight", "weight_scale_inv")
            if self.format.kind == "fp8"
            else ("weight_packed", "weight_scale", "weight_shape")
        )
        entries, wrong, packed = self.files.entries, [], {}
        for name, entry in entries.items():
            stem, _, suffix = name.rpartition(".")
            if suffix not in marks or (suffix == "weight" and entry.dtype != FP8):
                continue
            parts = {mark: f"{stem}.{mark}" for mark in marks}
            missing = [part for part in parts.values() if part not in entries]
            if suffix == "weight_scale_inv" and not missing and entries[parts["weight"]].dtype != FP8:
                missing = [f"the fp8 values of {parts['weight']}"]
            if missing:
                wrong.append(f"{name} without {' and '.join(missing)}")
            if suffix == "weight_packed" and f"{stem}.weight" in entries:
                wrong.append(f"{name} and {stem}.weight, one matrix twice")
            packed[f"{stem}.weight"] = parts
        if wrong:
            raise UserError(
                f"{self.folder} holds packed matrices whose parts do not add up",
                got=abbreviated(wrong, most=5),
                why="values and scales mean nothing without each other",
                do=DOWNLOAD,
            )
        return packed

    def _plain_shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts.get(name)
        if parts is None:
            return self._entry(name).shape
        if self.format.kind == "fp8":
            return self._entry(parts["weight"]).shape
        shape = self._entry(parts["weight_shape"])
        if shape.shape == (2,) and shape.dtype in (torch.int64, torch.int32):
            o, i = self.files.tensor(shape.name).tolist()
            return o, i
        raise UserError(
            f"{shape.name} does not tell the two sizes of a matrix",
            got=f"{list(shape.shape)} {shape.dtype}",
            do=DOWNLOAD,
        )

    def _check_parts(self, name: str) -> None:
        """Hold the parts' shapes and dtypes against what the format makes of a matrix of this shape."""
        shape, wrong = self.shapes[name], []
        if len(shape) != 2 or min(shape) <= 0:
            wrong.append(f"{name} is {list(shape)}")
        else:
            for stored in self.format.companions(name, (shape[0], shape[1])):
                entry = self._entry(stored.name)
                if entry.shape != stored.shape:
                    wrong.append(f"{stored.name} is {list(entry.shape)}, not {list(stored.shape)}")
                known = {"F8_E4M3": {FP8}, "F32": PLAIN | {POWER_OF_TWO}, "I32": {torch.int32}, "BF16": PLAIN}
                if entry.dtype not in known.get(stored.code, {entry.dtype}):
                    wrong.append(f"{stored.name} is {entry.dtype}")
        if wrong:
            raise UserError(
                f"The parts of {name} do not fit together",
                got="; ".join(wrong),
                why=self._described(),
                do=DOWNLOAD,
            )

    def _check_plain(self, name: str) -> None:
        dtype = self._entry(name).dtype
        if dtype not in PLAIN:
            raise UserError(
                f"{name} in {self.folder} is {str(dtype).removeprefix('torch.')}",
                why="weights are bfloat16, float16 or float32 unless config.json says how they are packed",
                do="take the checkpoint in bfloat16, in block-fp8 or in compressed-tensors' pack-quantized format",
            )

    def _described(self) -> str:
        if self.format.kind == "fp8":
            rows, columns = self.format.block
            return f"one scale belongs to each block of {rows} x {columns} values, the last ones perhaps smaller"
        group = f"group of {self.format.group} columns of each row" if self.format.group else "row"
        return f"integers of {self.format.bits} bits lie in int32 words, and one scale belongs to each {group}"


def _check_scale(name: str, scale: Tensor) -> None:
    values = scale.float()
    wrong = values[~(values.isfinite() & (values > 0))]
    if len(wrong):
        raise UserError(
            f"{name} holds scales that are not finite and positive",
            got=f"{len(wrong):,} of {values.numel():,}, such as {float(wrong[0])}",
            why="every value of their blocks would be lost",
            do=DOWNLOAD,
        )
