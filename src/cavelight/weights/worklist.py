"""What becomes of every tensor of a checkpoint in another format: settled from headers, before a weight is read."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import lcm, prod
from typing import Any, Literal

import torch

from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import PACKED_ROLES, Format
from cavelight.weights.bias import for_export
from cavelight.weights.files import SHARD_BYTES, Shard, layout
from cavelight.weights.headers import CODES, DTYPES, Entry
from cavelight.weights.names import DERIVED, HFTensor, check_fit, hf_tensors, is_mtp
from cavelight.weights.stored import ROWS, Checkpoint

WRITER = 3  # another number where the same task would give other bytes
BLOCK_BYTES = 16 * 2**20  # of a block of rows in float32; packing one takes several times that

Rule = Literal["copied", "cast", "quantised", "requantised", "unquantised", "bias shifted", "MTP copy added"]
Dropped = Literal["derived, dropped", "MTP, dropped"]
LOSSY: tuple[Rule, ...] = ("quantised", "requantised")


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to write: by which rule, from which plain tensor of the source, and as what it is stored.

    `dtype` is that of the plain values, or of packed integers' scales.
    """

    tensor: HFTensor
    source: str
    rule: Rule
    dtype: torch.dtype
    packed: bool
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def role(self) -> str:
        return self.tensor.parts[0].role

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(entry.nbytes for entry in self.entries)

    def blocks(self, source: Format) -> Iterator[tuple[int, int]]:
        """Ranges of rows small enough to work on, which part no fp8 block, of this format or of the source's."""
        rows, *others = self.tensor.shape
        step = lcm(ROWS, source.block[0])
        step *= max(1, BLOCK_BYTES // (4 * step * prod(others)))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class Options:
    """What a conversion is asked for; see weights.convert.convert."""

    format: Format
    dtype: torch.dtype | None = None
    shift_biases: bool | None = None
    without_mtp: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Worklist:
    """A conversion before it is begun: all jobs in the order of the output, its files, and what is not taken over."""

    config: ModelConfig
    options: Options
    jobs: tuple[Job, ...]
    dropped: dict[str, Dropped]  # stored tensors of the source
    shards: tuple[Shard, ...]
    task: dict[str, Any]  # everything that decides the output's bytes

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor of the output as it is stored."""
        return tuple(entry for job in self.jobs for entry in job.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def fingerprint(self) -> str:
        """Two conversions with the same one write the same bytes."""
        return hashlib.sha256(json.dumps(self.task, sort_keys=True).encode()).hexdigest()

    def jobs_to_begin_with(self) -> list[Job]:
        """All jobs; MTP's copies and what they are copies of come first, as a copy that is none ends it all."""
        originals = {job.tensor.parts[0].name for job in self.jobs if job.tensor.is_copy}
        return sorted(self.jobs, key=lambda job: job.tensor.parts[0].name not in originals)


def work_list(source: Checkpoint, options: Options) -> Worklist:
    """Settle what becomes of every tensor.

    Raises UserError where config.json and weights do not belong together.
    """
    config = source.config.replace(num_nextn_predict_layers=0) if options.without_mtp else source.config
    found = {name: shape for name, shape in source.shapes.items() if not (options.without_mtp and is_mtp(name, config))}
    wanted = hf_tensors(config)
    check_fit(wanted, found, config)
    if source.format.kind == options.format.kind == "fp8" and source.format.ue8m0:
        options = replace(options, format=replace(options.format, ue8m0=True))  # as the values are copied
    jobs = [_job(source, options, tensor, tensor.name in found) for tensor in wanted]
    dropped: dict[str, Dropped] = {name: "derived, dropped" for name in found if DERIVED.fullmatch(name)}
    for name in source.shapes.keys() - found.keys():
        dropped |= dict.fromkeys(stored_names(source, name), "MTP, dropped")
    entries = [entry for job in jobs for entry in job.entries]
    shards = layout(entries, options.shard_bytes)
    config = config.replace(torch_dtype=_torch_dtype(jobs))
    return Worklist(config, options, tuple(jobs), dropped, shards, _task(source, options))


def stored_names(source: Checkpoint, name: str) -> tuple[str, ...]:
    """The stored tensors that a plain one stands for."""
    return tuple(source.parts(name).values()) if source.is_packed(name) else (name,)


def _job(source: Checkpoint, options: Options, tensor: HFTensor, found: bool) -> Job:
    """`found` says whether the source has the tensor; if not, it is a copy, which gets its original's dtype anyway."""
    original = tensor.parts[0].name if tensor.is_copy else tensor.name
    name = tensor.name if found else original
    plain = torch.float32 if tensor.dtype == "float32" else options.dtype or source.dtype(original)
    packed = options.format.kind != "plain" and tensor.parts[0].role in PACKED_ROLES
    if packed:
        rows, columns = tensor.shape
        stored = options.format.companions(tensor.name, (rows, columns), CODES[plain])
        entries = tuple(Entry(part.name, part.shape, DTYPES[part.code]) for part in stored)
    else:
        entries = (Entry(tensor.name, tensor.shape, plain),)
    rule = _rule(source, options.format, tensor, entries, packed) if found else "MTP copy added"
    if tensor.parts[0].role == "routing_bias":
        bias_E = source.tensor(name, torch.float32)
        rule = rule if torch.equal(for_export(bias_E, options.shift_biases), bias_E) else "bias shifted"
    return Job(tensor, name, rule, plain, packed, entries)


def _rule(source: Checkpoint, format: Format, tensor: HFTensor, entries: tuple[Entry, ...], packed: bool) -> Rule:
    if not source.is_packed(tensor.name):
        if packed:
            return "quantised"
        return "copied" if source.files.entries[tensor.name].dtype == entries[0].dtype else "cast"
    if not packed:
        return "unquantised"
    there = [source.files.entries.get(entry.name) for entry in entries]
    kept = [old is not None and _is_kept(old.dtype, new.dtype) for old, new in zip(there, entries, strict=True)]
    return "copied" if source.format == format and all(kept) else "requantised"


def _is_kept(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether every number of one dtype is the same number in the other: scales in fewer bytes, sizes in 32 bits."""
    scales = (torch.float8_e8m0fnu, torch.bfloat16, torch.float16)
    return old == new or (old in scales and new == torch.float32) or (old, new) == (torch.int32, torch.int64)


def _torch_dtype(jobs: Iterable[Job]) -> str:
    """What config.json calls the model's dtype: that of most plain bytes, or of most integers' scales."""
    sizes = Counter[torch.dtype]()
    for job in jobs:
        if job.tensor.dtype == "model":
            sizes[job.dtype] += prod(job.tensor.shape) * job.dtype.itemsize
    return name_of(sizes.most_common(1)[0][0])


def _task(source: Checkpoint, options: Options) -> dict[str, Any]:
    """The source by its headers, and its files by size and time of change; the rest in words."""
    files = {}
    for file in {entry.file for entry in source.files.entries.values()}:
        stat = file.stat()
        files[file.name] = (stat.st_size, stat.st_mtime_ns)
    headers = [(entry.name, entry.shape, CODES[entry.dtype]) for entry in source.files.entries.values()]
    described = json.dumps([files, headers, source.raw], sort_keys=True)
    return {
        "source": hashlib.sha256(described.encode()).hexdigest()[:16],
        **asdict(options),
        "dtype": name_of(options.dtype) if options.dtype else "auto",
        "writer": WRITER,
    }


def name_of(dtype: torch.dtype) -> str:
    """bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
