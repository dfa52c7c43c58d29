"""Thousands of hostile checkpoints: each is refused with a sentence, or read exactly as another reader reads it.

The other reader is the safetensors library's own. Whatever happens, it happens within seconds and half a gigabyte.
"""

import random
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cavelight.errors import UserError
from cavelight.spec.formats import FP8, INT4, INT8, Format
from cavelight.weights.files import SINGLE, bytes_of
from cavelight.weights.snapshot import read_checkpoint

from . import hostile
from .packing import packable, stored_as, write_folder
from .reference.random_weights import random_weights
from .reference.tiny import tiny
from .shards import TENSORS, read_all, same_bits, shard, write

CASES = 110  # of each damage
SECONDS = 10  # for one of them, on a busy machine
MEMORY = 2**29  # bytes beyond what the process has at the start
# What is refused here though the library reads it, and why.
STRICTER = {
    "a key occurs twice": "which of the two is meant cannot be known; the library takes the last",
    "a name that no tensor bears": "empty, endless or unprintable names spoil tables, screens and terminals",
    "makes no sense. Got: __metadata__": "the format wants a map of strings; the library takes null for an empty one",
    "makes no sense": "keys beyond the format's three may change what is meant; lists in place of maps, nine axes and "
    "more, and empty tensors whose strides overflow are in no checkpoint",
    "of a dtype that Cavelight cannot read": "no weights are complex or unsigned integers of several bytes",
    "bytes that begin with": "the format wants { as the header's first byte; the library skips white space",
}
Reader = Callable[[Path], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """A limit on memory for the process, and on time for each case (see `within`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class TooLong(BaseException):
    """Not an OSError, as TimeoutError is, which the code under test would take for one of its own."""


def too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {SECONDS} s")


def refused(folder: Path, read: Reader, kind: str) -> tuple[str, dict[str, Tensor]]:
    """The sentence by which the folder is refused, or "" and its tensors. Anything but a UserError escapes."""
    signal.alarm(SECONDS)
    try:
        return "", read(folder)
    except UserError as error:
        message = str(error)
        assert len(message) < 5_000 and message.replace("\n", "").isprintable(), message[:500]
        assert re.search(hostile.NEVER_SOUND.get(kind, ""), message), message
        return message, {}
    finally:
        signal.alarm(0)


def by_the_library(file: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError):
        return None


def verdict(folder: Path, read: Reader = read_all, kind: str = "") -> str:
    """Whether a folder with one file is "refused" or "read"; AssertionError where that is wrong."""
    message, tensors = refused(folder, read, kind)
    theirs = by_the_library(folder / SINGLE)
    if message:
        assert theirs is None or any(reason in message for reason in STRICTER), f"without reason: {message}"
        return "refused"
    assert theirs is not None, "the library refuses it"
    assert tensors.keys() == theirs.keys()
    assert all(same_bits(tensors[name], theirs[name]) for name in theirs)
    return "read"


class Verdicts(Counter[str]):
    """How many cases of a damage were refused and read."""

    def check(self, kind: str) -> None:
        assert self.total() == CASES
        assert self["refused"] > CASES / 4
        assert kind not in hostile.NEVER_SOUND or self["read"] == 0


def test_there_are_enough() -> None:
    assert CASES * len([*hostile.FILES, *hostile.FOLDERS, *hostile.PACKED]) >= 2_000


@pytest.mark.parametrize("damage", hostile.FILES, ids=lambda damage: damage.__name__)
def test_damaged_files(tmp_path: Path, damage: Callable[[random.Random, hostile.Header, bytes], bytes]) -> None:
    verdicts = Verdicts()
    for case in range(CASES):
        rng = random.Random(f"{damage.__name__} {case}")
        content = damage(rng, *hostile.sound(rng))
        (tmp_path / SINGLE).write_bytes(content)
        verdicts[verdict(tmp_path, kind=damage.__name__)] += 1
    verdicts.check(damage.__name__)


@pytest.mark.parametrize("damage", hostile.FOLDERS, ids=lambda damage: damage.__name__)
def test_damaged_folders(tmp_path: Path, damage: Callable[[random.Random, Path], None]) -> None:
    """What is read of a damaged folder is what it held before."""
    verdicts = Verdicts()
    for case in range(CASES):
        rng = random.Random(f"{damage.__name__} {case}")
        folder = tmp_path / str(case)
        folder.mkdir()
        write(folder, TENSORS, shard_bytes=rng.choice((1, 20, 30)))
        damage(rng, folder)
        message, tensors = refused(folder, read_all, damage.__name__)
        verdicts["refused" if message else "read"] += 1
        if not message:
            assert tensors.keys() == TENSORS.keys()
            assert all(same_bits(tensors[name], TENSORS[name]) for name in TENSORS)
    verdicts.check(damage.__name__)


@pytest.mark.parametrize("damage", hostile.PACKED, ids=lambda damage: damage.__name__)
def test_damaged_packed_checkpoints(
    tmp_path: Path, damage: Callable[[random.Random, Path, dict[str, Tensor]], None]
) -> None:
    """What is read of them is what was packed, whatever else config.json then says."""
    config = tiny(num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2)
    weights = random_weights(config)
    formats = [FP8, Format("fp8", (16, 16)), INT8, INT4]
    stored = [stored_as(weights, format, packable(config).__contains__) for format in formats]
    before = [in_full(write_folder(tmp_path / str(i), config, stored[i], formats[i])) for i in range(len(formats))]
    verdicts = Verdicts()
    for case in range(CASES):
        rng = random.Random(f"{damage.__name__} {case}")
        i = case % len(formats)
        folder = write_folder(tmp_path / str(i), config, stored[i], formats[i])
        damage(rng, folder, stored[i])
        message, tensors = refused(folder, in_full, damage.__name__)
        verdicts["refused" if message else "read"] += 1
        assert message or all(same_bits(tensors[name], before[i][name]) for name in before[i])
    verdicts.check(damage.__name__)


def in_full(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder, packed=False).state_dict()


def test_sound_files_are_read(tmp_path: Path) -> None:
    for case in range(CASES):
        (tmp_path / SINGLE).write_bytes(shard(*hostile.sound(random.Random(case))))
        assert verdict(tmp_path) == "read"


@pytest.mark.parametrize("reason", STRICTER)
def test_where_the_library_is_more_lenient(tmp_path: Path, reason: str) -> None:
    """Every entry of STRICTER is needed: there is a file that the library reads and that is refused for it."""
    tensor = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    texts = {
        "a key occurs twice": f'{{"a": {tensor}, "a": {tensor}}}',
        "a name that no tensor bears": f'{{"": {tensor}}}',
        "makes no sense. Got: __metadata__": f'{{"__metadata__": null, "a": {tensor}}}',
        "makes no sense": f'{{"a": {tensor[:-1]}, "strides": [1]}}}}',
        "of a dtype that Cavelight cannot read": f'{{"a": {tensor.replace("F32", "U32")}}}',
        "bytes that begin with": f' {{"a": {tensor}}}',
    }
    (tmp_path / SINGLE).write_bytes(shard(texts[reason].encode(), bytes(4)))
    assert by_the_library(tmp_path / SINGLE) is not None
    with pytest.raises(UserError, match=re.escape(reason)):
        read_all(tmp_path)


def refuses(folder: Path) -> dict[str, Tensor]:
    raise UserError("I do not like it")


def changes_a_bit(folder: Path) -> dict[str, Tensor]:
    tensors = read_all(folder)
    bytes_of(tensors["a"])[0] ^= 1
    return tensors


@pytest.mark.parametrize("reader", [refuses, changes_a_bit, lambda folder: {}], ids=["refuses", "changes", "skips"])
def test_bad_readers_are_found_out(tmp_path: Path, reader: Reader) -> None:
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(2)})
    assert verdict(tmp_path) == "read"
    with pytest.raises(AssertionError):
        verdict(tmp_path, reader)


def test_a_reader_that_believes_anything_is_found_out(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"{}")
    with pytest.raises(AssertionError, match="the library refuses it"):
        verdict(tmp_path, lambda folder: {})
