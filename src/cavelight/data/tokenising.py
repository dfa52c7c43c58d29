"""From a part of a corpus to its token store: streaming, on all cores, and taken up again after a kill.

The calling process reads blocks and writes tokens, both in order; processes of their own (`data/worker.py`) make the
one of the other. A block of a huge file is work like any other, so one file keeps all cores busy as well.
"""

import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

from cavelight.data.corpus import Documents, warn_once
from cavelight.data.encode import Encoded, Encoder, Manner, token_dtype
from cavelight.data.read import BLOCK_BYTES, Block, Place
from cavelight.data.store import StoreWriter, TokenStore, join, unfinished
from cavelight.data.tokenizer import Tokenizer
from cavelight.errors import UserError

FORMAT = 2  # of a store, and of how text becomes tokens: what was made by another one is made again
ALONE_BYTES = 2 << 20  # a smaller corpus is done before a process would have started
AS_WRITTEN = Manner()

log = logging.getLogger(__name__)


def tokenize(
    part: Documents,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    manner: Manner = AS_WRITTEN,
    workers: int | None = None,
) -> TokenStore:
    """The tokens of `part`, from `cache_dir` if they were kept there for the same files, tokenizer and manner.

    `progress` hears the bytes done and their (estimated) total. `workers` processes, by default one for each core; the
    result does not depend on their number. A call that is killed loses seconds of work: the next one goes on from what
    was safe on the disk. Raises UserError when the part holds no text or a file is broken.
    """
    made_of = (FORMAT, part.fingerprint, part.part, tokenizer.fingerprint, manner)
    key = sha256(repr(made_of).encode()).hexdigest()

    def fill(writer: StoreWriter) -> None:
        size = part.size
        progress(min(writer.text_bytes, size), size)
        for encoded, after in _encoded(part, tokenizer, manner, writer.place, workers):
            writer.append(encoded, after)
            progress(min(writer.text_bytes, size), size)
        if not writer.documents:
            raise UserError(f"The {part.part} part of the corpus is empty", got="no document with text", do="add text")
        progress(size, size)

    return _kept(Path(cache_dir) / f"tokens-{part.part}-{key[:16]}", key, tokenizer, fill)


def joined(stores: dict[str, TokenStore], tokenizer: Tokenizer, cache_dir: str | Path, made_of: str) -> TokenStore:
    """The documents of all `stores` as one store. `made_of` tells these stores from any others."""
    if len(stores) == 1:
        return next(iter(stores.values()))
    key = sha256(repr((FORMAT, tokenizer.fingerprint, made_of)).encode()).hexdigest()
    folder = Path(cache_dir) / f"tokens-joined-{key[:16]}"
    return _kept(folder, key, tokenizer, lambda writer: join(list(stores.values()), writer))


def _kept(folder: Path, key: str, tokenizer: Tokenizer, fill: Callable[[StoreWriter], None]) -> TokenStore:
    """The store in `folder`; where there is none, or a damaged one, it is made."""
    with suppress(ValueError):
        if (store := TokenStore.read(folder, key)) is not None:
            return store
    with unfinished(folder) as beside:
        try:
            if (store := TokenStore.read(folder, key)) is not None:  # another process was at it, and is done
                shutil.rmtree(beside)
                return store
        except ValueError as error:
            log.warning("The tokens in %s are damaged (%s) and are made again.", folder, error)
        writer = StoreWriter(beside, token_dtype(tokenizer.vocab_size))
        try:
            fill(writer)
            writer.finish(folder, key)
        except UserError:
            if not writer.pieces:  # of a corpus that has to be mended nothing is worth keeping
                shutil.rmtree(beside)
            raise
        finally:
            writer.close()
    store = TokenStore.read(folder, key, checked_bytes=0)
    assert store is not None, "what was just written can be read"
    return store


def _encoded(
    part: Documents, tokenizer: Tokenizer, manner: Manner, place: Place, workers: int | None
) -> Iterator[tuple[Encoded, Place]]:
    """What the blocks from `place` on hold, in order, and the place after each of them."""
    tasks = _tasks(part.blocks(place))
    if workers is None:
        workers = (os.cpu_count() or 1) if part.size >= ALONE_BYTES else 0
    if workers == 0:
        encoder = Encoder(tokenizer, manner)
        for blocks in tasks:
            yield encoder.encode(document for block in blocks for document in part.documents(block)), blocks[-1].after
        return
    with _pool(Setup(tokenizer, replace(part, sources=()), manner), workers) as encode:
        ahead: deque[tuple[Future[Encoded], Place]] = deque()
        for blocks in tasks:
            ahead.append((encode(blocks), blocks[-1].after))
            if len(ahead) > 2 * workers:
                future, after = ahead.popleft()
                yield future.result(), after
        for future, after in ahead:
            yield future.result(), after


def _tasks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks, so many together as are worth a message."""
    task: list[Block] = []
    size = 0
    for block in blocks:
        task.append(block)
        size += block.size
        if size >= BLOCK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know once."""

    tokenizer: Tokenizer
    part: Documents
    manner: Manner


@dataclass(frozen=True)
class Answer:
    """What a worker sends back for a task, with what it would have logged; or the mistake that it met."""

    result: Encoded | UserError
    warnings: tuple[str, ...] = ()


# A process of its own rather than multiprocessing's: that imports the caller's main module again, which not every
# script survives. It gets sys.path first, since the caller's may be its own doing.
_START = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from cavelight.data.worker import main
main()
"""


class _Worker:
    def __init__(self, setup: Setup) -> None:
        # One thread each: there are as many of them as cores.
        alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | alone
        )
        assert self.process.stdin and self.process.stdout
        self._tasks, self._answers = self.process.stdin, self.process.stdout
        self._send(sys.path)
        self._send(setup)

    def encode(self, blocks: list[Block]) -> Encoded:
        self._send(blocks)
        try:
            answer: Answer = pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        for message in answer.warnings:
            warn_once(message)
        if isinstance(answer.result, UserError):
            raise answer.result
        return answer.result

    def close(self) -> None:
        self._answers.close()
        with suppress(BrokenPipeError):
            self._tasks.close()

    def _send(self, message: object) -> None:
        try:
            pickle.dump(message, self._tasks, pickle.HIGHEST_PROTOCOL)
            self._tasks.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> Exception:
        code = self.process.wait()
        if code > 0:
            return RuntimeError("a process that tokenises failed; its traceback is above")
        return UserError(
            "A process that tokenises was killed",
            got=f"signal {-code}",
            why="perhaps for want of memory",
            do="run the same command again: it goes on from there",
        )


@contextmanager
def _pool(setup: Setup, workers: int) -> Iterator[Callable[[list[Block]], "Future[Encoded]"]]:
    """A function that has blocks encoded by whichever worker is free."""
    started = [_Worker(setup) for _ in range(workers)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in started:
        free.put(worker)

    def encode(blocks: list[Block]) -> Encoded:
        worker = free.get()
        try:
            return worker.encode(blocks)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(workers, "tokenising")
    try:
        yield lambda blocks: threads.submit(encode, blocks)
    finally:
        for worker in started:
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in started:
            worker.process.wait()
            worker.close()
