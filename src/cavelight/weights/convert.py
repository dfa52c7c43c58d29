"""A checkpoint in another format, tensor by tensor and block of rows by block: in little memory, and to be continued.

The output grows in a folder beside the target, `.NAME.converting` (weights/journal.py), and takes its place when the
audit has found nothing that is unexplained. A call that was killed is continued by the same call.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from cavelight.disk import clear_disk_errors
from cavelight.errors import UserError
from cavelight.spec.events import Event
from cavelight.spec.formats import Format
from cavelight.weights.audit import Report, audit
from cavelight.weights.blocks import blocks
from cavelight.weights.files import SHARD_BYTES, bytes_of, index_of
from cavelight.weights.headers import INDEX
from cavelight.weights.journal import Done, Unfinished
from cavelight.weights.side_by_side import Progress, side_by_side
from cavelight.weights.snapshot import CONVERSION, OF_OTHER_FILES, check_replaceable, write_json
from cavelight.weights.stored import Checkpoint
from cavelight.weights.worklist import Job, Options, Worklist, work_list

# What is taken over as it is, a tokenizer's code too. Other code comes only where config.json's auto_map needs it.
TAKEN_OVER = (
    "*token*.json",
    "tokeniz*",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "README*",
)
WRITTEN_ANEW = ("config.json", "*.safetensors", INDEX, CONVERSION)
PLAIN_LINEARS = ("head", "gate", "mtp_projection")  # roles of Linears that no format packs


@torch.no_grad()
def convert(
    source: Path,
    target: Path,
    format: Format,
    *,
    dtype: torch.dtype | None = None,
    shift_biases: bool | None = None,
    without_mtp: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Write the checkpoint folder `source` to the folder `target` in `format`, and audit what was written.

    dtype: of all weights that are not packed; unless given, each keeps its own, and unpacked ones become bfloat16.
    Routing biases are float32. shift_biases: see weights.bias.for_export. without_mtp: leave the MTP modules out;
    else they are complete, with the copies of embedding and head that other engines want. A tensor that is stored
    as wanted already is copied byte for byte. Memory: below three times the largest tensor plus a constant.

    Raises UserError for a broken source, weights that are not finite or do not fit `dtype`, a full disk, a target that
    is no checkpoint, another conversion begun there, and whatever the audit cannot explain. After a full disk, Ctrl-C
    or a kill the same call continues.
    """
    checkpoint, target = Checkpoint(source), Path(os.path.realpath(target))  # unlike resolve(), it bears loops
    _check_apart(checkpoint, target)
    check_replaceable(target)
    work = work_list(checkpoint, Options(format, dtype, shift_biases, without_mtp, shard_bytes))
    with clear_disk_errors(target), Unfinished(target.with_name(f".{target.name}.converting"), work.task) as unfinished:
        if unfinished.emptied and (report := Report.read(target)) and report.fingerprint == work.fingerprint:
            unfinished.remove()  # an earlier call was killed after the last step but this one
            return report
        _check_room(work, unfinished)
        unfinished.prepare(work.shards)
        _fill(checkpoint, work, unfinished, on_event)
        taken, left = _write_rest(checkpoint, work, unfinished.model)
        report = audit(checkpoint, work, unfinished.model, unfinished.done, on_event)
        report = replace(report, files=taken, left_behind=left)
        write_json(unfinished.model / CONVERSION, asdict(report))
        unfinished.become(target)
    return report


def _check_apart(checkpoint: Checkpoint, target: Path) -> None:
    source = checkpoint.folder.resolve()
    files = {entry.file for entry in checkpoint.files.entries.values()}
    read = {source, *(file.resolve() for file in files)}  # a folder of symlinks reads elsewhere
    if source in target.parents or any(path.is_relative_to(target) for path in read):
        raise UserError(
            "Source and target of a conversion have to be different folders",
            got=f"{source} and {target}",
            why="the source is read until the end, and what stands at the target is replaced",
            do="choose a new folder outside the source",
        )


def _check_room(work: Worklist, unfinished: Unfinished) -> None:
    """Refuse at once what cannot end well."""
    there = sum(file.stat().st_blocks * 512 for file in unfinished.model.iterdir())
    needed, free = sum(shard.nbytes for shard in work.shards) - there, shutil.disk_usage(unfinished.path).free
    if needed > free:
        raise UserError(
            f"The disk has no room for {unfinished.path.parent}",
            got=f"{free / 1e9:,.2f} GB free, {needed / 1e9:,.2f} GB still to be written",
            do="free some space, or choose a folder on another disk",
        )


def _fill(source: Checkpoint, work: Worklist, unfinished: Unfinished, on_event: Callable[[Event], None]) -> None:
    """Write every tensor that the journal does not hold yet."""
    places = {name: (shard.file, start) for shard in work.shards for name, start in shard.starts.items()}
    done = sum(job.nbytes for job in work.jobs if job.name in unfinished.done)
    progress, crcs = Progress("converting", work.nbytes, "B", on_event, done), dict[str, int]()

    def write(name: str, at: int, data: memoryview) -> None:
        file, start = places[name]
        unfinished.write(file, start + at, data)
        progress.add(len(data))

    def finished(job: Job) -> Done:
        return unfinished.done.get(job.name) or _convert_one(source, work, job, write)

    jobs = work.jobs_to_begin_with()
    with closing(side_by_side(finished, jobs, progress)) as results:
        for job, made in zip(jobs, results, strict=True):
            crcs |= made.written
            _check_copy(job, crcs)
            if job.name not in unfinished.done:
                unfinished.finish(made, job.nbytes)
            progress.tell()
    unfinished.sync()


def _convert_one(source: Checkpoint, work: Worklist, job: Job, write: Callable[[str, int, memoryview], None]) -> Done:
    """Write one tensor; the checksums are of what was read and of what was written."""
    read: dict[str, int] = {}
    written = {entry.name: 0 for entry in job.entries}
    ends = dict.fromkeys(written, 0)
    for stored, new in blocks(source, work.options, job):
        for name, tensor in stored.items():
            read[name] = zlib.crc32(bytes_of(tensor), read.get(name, 0))
        for name, tensor in new.items():
            data = bytes_of(tensor.contiguous())
            written[name] = read[name] if tensor is stored.get(name) else zlib.crc32(data, written[name])
            write(name, ends[name], data)
            ends[name] += len(data)
    assert ends == {entry.name: entry.nbytes for entry in job.entries}, job.name
    return Done(job.name, read, written)


def _check_copy(job: Job, crcs: Mapping[str, int]) -> None:
    """MTP's embedding and head are the trunk's; both are stored plain and in one dtype."""
    original = job.tensor.parts[0].name
    if job.tensor.is_copy and crcs[job.name] != crcs[original]:
        raise UserError(
            f"{job.name} is not a copy of {original}",
            why="prediction modules share embedding and head with the trunk, here as in the V3 report",
            do="convert the checkpoint without its MTP modules (without_mtp=True, or --without-mtp)",
        )


def _write_rest(source: Checkpoint, work: Worklist, folder: Path) -> tuple[list[str], list[str]]:
    """All files but the weights. Returns the names of those taken over, and of those left behind."""
    for file in folder.iterdir():
        if file.name not in {shard.file for shard in work.shards}:  # of a call that ended here
            file.unlink()
    files = {path.name: path for path in sorted(source.folder.iterdir()) if not path.name.startswith(".")}
    code = _code_of(source.raw.get("auto_map"))
    keeps_code = bool(code) and all(name in files for name in code)
    patterns = (*TAKEN_OVER, "*.py") if keeps_code else TAKEN_OVER
    others = [name for name in files if not _is_one_of(name, WRITTEN_ANEW)]
    taken = [name for name in others if _is_one_of(name, patterns) and files[name].is_file()]
    for name in taken:
        shutil.copyfile(files[name], folder / name)
    extra = {key: value for key, value in source.config.extra.items() if key not in OF_OTHER_FILES}
    extra |= {key: source.raw[key] for key in ("auto_map", "model_type")} if keeps_code else {}
    quantization = work.options.format.quantization_config(_plain_linears(work))
    extra |= {"quantization_config": quantization} if quantization else {}
    write_json(folder / "config.json", work.config.replace(extra=extra).to_hf())
    index = index_of(work.shards, work.entries)
    if index is not None:
        (folder / INDEX).write_bytes(index)
    return taken, [name for name in others if name not in taken]


def _code_of(auto_map: object) -> set[str]:
    """The Python files that config.json's auto_map names, as in {"AutoConfig": "configuration_x.XConfig"}."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    return {f"{value.rpartition('.')[0]}.py" for value in values if isinstance(value, str)}


def _plain_linears(work: Worklist) -> list[str]:
    """The Linears that are plain in a checkpoint of packed integers; fp8 readers know DeepSeek-V3's by themselves."""
    if work.options.format.kind != "int":
        return []
    return [job.name.removesuffix(".weight") for job in work.jobs if job.role in PLAIN_LINEARS]


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
