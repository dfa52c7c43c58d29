"""The other end of `data/tokenising.py`: blocks come on stdin, what their documents become goes out on stdout."""

import logging
import os
import pickle
import signal
import sys
from typing import Any

from cavelight.data.encode import Encoder
from cavelight.data.tokenising import Answer, Setup
from cavelight.errors import UserError


class _Kept(logging.Handler):
    """Messages for the calling process, which has a screen."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _received() -> Any:
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the latter where the caller was killed in the middle of a message
        sys.exit()


def main() -> None:
    """Until stdin ends, be it that the caller closed it or died. Ctrl-C is the caller's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    setup: Setup = _received()
    encoder = Encoder(setup.tokenizer, setup.manner)
    while True:
        blocks = _received()
        kept.messages.clear()
        try:
            documents = (document for block in blocks for document in setup.part.documents(block))
            answer = Answer(encoder.encode(documents), tuple(kept.messages))
        except UserError as error:
            answer = Answer(error, tuple(kept.messages))
        try:
            pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(0)  # the caller was killed; an ordinary exit would try to flush once more
