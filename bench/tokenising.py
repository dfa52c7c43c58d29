"""Two gigabytes of text to tokens: rate, memory and cores, beside the tokenizers library alone on the same text.

python -m bench.tokenising --gigabytes 2 writes one JSONL file of that size from the source and the documentation that
are installed here, over and over; one document in twenty with its letters exchanged by a code of its own, so that its
words are met nowhere else and no table of words makes the task trivial. Then a process of its own tokenises it with all
that training adds (line ends split, fill-in-the-middle), while its memory and that of its workers are watched. The
library alone encodes the first megabytes of the same documents on all cores, and what the store holds is compared with
it. Writes docs/results/tokenising.md.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import string
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from bench.peak import peak_bytes
from bench.provenance import commit, leave_with, processor, some
from cavelight.data.corpus import read_corpus
from cavelight.data.encode import Manner
from cavelight.data.tokenising import tokenize
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.disk import file_beside
from cavelight.errors import UserError

VOCABULARY = 32768
TRAINED_ON = 24 << 20  # bytes for the tokenizer
CODED = 20  # one document in so many
GLANCE = 0.2  # seconds between two looks at memory
BATCH = 256  # documents that the library gets at once
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h")
DO = "import sys; from bench.tokenising import work; work(*sys.argv[1:])"


@dataclass(frozen=True)
class Run:
    """Tokenising of the whole: seconds, seconds of processor time, most resident bytes of all its processes."""

    seconds: float
    processor: float
    peak: int
    tokens: int
    text_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", do="choose another folder with --folder; this script deletes its own")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        documents = make(folder / "text.jsonl", options.gigabytes * 1e9)
        size = (folder / "text.jsonl").stat().st_size
        train_tokenizer(first_texts(folder / "text.jsonl", TRAINED_ON), VOCABULARY).save(folder / "tokenizer")
        run, alone = watched(folder), library_alone(folder, options.alone)
        text = report(documents, size, run, alone, list(sys.argv[1:] if arguments is None else arguments))
    finally:
        shutil.rmtree(folder)
    with file_beside(options.out) as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenise much text, and watch memory and cores.")
    parser.add_argument("--gigabytes", type=float, default=2, help="of text (default: 2)")
    parser.add_argument("--alone", type=some, default=64, help="megabytes that the library encodes alone (default: 64)")
    parser.add_argument("--folder", type=Path, default=Path("runs/tokenising"), help="needs twice the text's size")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tokenising.md"), help="the page to write")
    return parser.parse_args(arguments)


def make(path: Path, size: float) -> int:
    """Write a JSONL file of `size` bytes; returns its number of documents."""
    written = documents = 0
    with open(path, "wb") as handle:
        while written < size:
            for text in installed_texts():
                coded = text.translate(code(documents)) if documents % CODED == 0 else text
                line = json.dumps({"id": documents, "text": coded}, ensure_ascii=False).encode() + b"\n"
                handle.write(line)
                written += len(line)
                documents += 1
                if written >= size:
                    break
    return documents


def installed_texts() -> Iterator[str]:
    for root in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and 0 < path.stat().st_size < 1 << 20:
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def code(number: int) -> dict[int, int]:
    """Each letter's stand-in in the document with this number."""
    letters = list(string.ascii_lowercase)
    random.Random(number).shuffle(letters)
    return str.maketrans(string.ascii_letters, "".join(letters) + "".join(letters).upper())


def first_texts(path: Path, size: int) -> Iterator[str]:
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            yield (text := json.loads(line)["text"])
            size -= len(text)
            if size < 0:
                return


def work(corpus: str, tokenizer: str, cache: str) -> None:
    """What the watched process does: as training prepares its text."""
    part = read_corpus(corpus).train
    store = tokenize(part, Tokenizer.load(tokenizer), cache, manner=Manner(split_line_ends=0.1, fim_rate=0.1))
    print(json.dumps({"tokens": len(store), "text_bytes": int(store.bytes_M.sum())}))


def watched(folder: Path) -> Run:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    told = [sys.executable, "-c", DO, str(folder / "text.jsonl"), str(folder / "tokenizer"), str(folder / "cache")]
    process = subprocess.Popen(told, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for number in (process.pid, *children(process.pid)):
            peaks[number] = max(peaks.get(number, 0), peak_bytes(number))
        time.sleep(GLANCE)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or process.stdout is None:
        raise RuntimeError("tokenising failed")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, used, sum(peaks.values()), **json.loads(process.communicate()[0]))


def children(process: int) -> list[int]:
    try:
        listed = [path.read_text(encoding="utf-8") for path in Path(f"/proc/{process}/task").glob("*/children")]
    except FileNotFoundError:  # it has just ended
        return []
    return [int(number) for line in listed for number in line.split()]


@dataclass(frozen=True)
class Alone:
    """The first megabytes by the library alone, on all cores."""

    text_bytes: int
    rate: float  # MB/s


def library_alone(folder: Path, megabytes: int) -> Alone:
    """`encode_batch_fast`; neither reading the file nor making arrays of the ids is counted."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    library.encode_special_tokens = True
    texts = list(first_texts(folder / "text.jsonl", megabytes * 10**6))
    spent = 0.0
    for start in range(0, len(texts), BATCH):
        began = time.monotonic()
        library.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        spent += time.monotonic() - began
    size = sum(len(text.encode()) for text in texts)
    return Alone(size, size / 1e6 / spent)


def report(documents: int, size: int, run: Run, alone: Alone, called: Sequence[str]) -> str:
    """The page for docs/results."""
    rate, cores = run.text_bytes / 1e6 / run.seconds, os.cpu_count() or 1
    lines = [
        "# Tokenising",
        f"One JSONL file of {size / 1e9:.2f} GB with {documents:,} documents: source and documentation of what is "
        f"installed on this machine, over and over; in one document of {CODED} the letters are exchanged by a code of "
        f"its own, so that its words are met nowhere else. The tokenizer is a byte-level BPE of {VOCABULARY:,} tokens "
        f"trained on the first {TRAINED_ON >> 20} MiB. All that training adds is on: line ends split, "
        "fill-in-the-middle, one document of twenty held out.",
        "| | MB of text | seconds | MB/s | cores | peak memory, MB |\n|---|--:|--:|--:|--:|--:|\n"
        f"| file to token store | {run.text_bytes / 1e6:,.0f} | {run.seconds:,.0f} | {rate:.2f} "
        f"| {run.processor / run.seconds:.2f} | {run.peak / 1e6:,.0f} |\n"
        f"| `tokenizers` alone, text in memory | {alone.text_bytes / 1e6:,.0f} "
        f"| {alone.text_bytes / 1e6 / alone.rate:,.0f} | {alone.rate:.2f} | | |",
        f"The whole goes at {rate / alone.rate:.2f} times the rate of `tokenizers` {tokenizers.__version__} alone, all "
        f"cores its own, of which reading, JSON and arrays are no part. It made {run.tokens:,} tokens. Cores are "
        "seconds of processor time per second. Memory is the sum, over all processes, of the largest resident set of "
        "each.",
        f"Command: `{shlex.join(['python', '-m', 'bench.tokenising', *called])}`  \nCommit: {commit()}  \n"
        f"Machine: {processor()}, {cores} cores",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    leave_with(main)
