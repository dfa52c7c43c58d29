"""A conversion that kills itself, as a power cut would: for processes of their own."""

import os
import signal
from pathlib import Path
from threading import Timer

from cavelight.spec.events import Event
from cavelight.spec.formats import Format
from cavelight.weights import journal
from cavelight.weights.convert import convert


def convert_and_die(source: Path, target: Path, format: Format, shard_bytes: int, event: int, delay: float) -> None:
    """SIGKILL `delay` seconds after so many events; what is finished is made safe every 50 kB instead of 256 MB."""
    journal.SYNC_BYTES = 50_000
    seen = 0

    def listen(told: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    convert(source, target, format, shard_bytes=shard_bytes, on_event=listen)
