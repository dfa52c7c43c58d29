"""A command of `cavelight` in a process of its own, which says on stderr how much memory it had at most.

python -m bench.peak train demo --out runs/x: the last line on stderr is the peak of resident bytes. It is the kernel's
high-water mark of this process alone; ru_maxrss would be that of the parent, where the parent was larger.
With --slow-saves before the command, every save of a run is under way until the next one wants to begin, as on the
slowest of disks: what it holds is then there at each step, whatever this machine's disk does.
"""

import re
import resource
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from cavelight.data.tokenizer import Tokenizer
    from cavelight.model.transformer import Transformer
    from cavelight.train.checkpoints import Saver


def peak_bytes(process: int | str = "self") -> int:
    """The most resident memory that this process has had, or another one that is running."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    if found or process != "self":
        return int(found[1]) * 1024 if found else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def slow_saves() -> ExitStack:
    """Until it is closed, the last act of a save waits until somebody waits for the save."""
    from cavelight.train import saves
    from cavelight.train.checkpoints import Saver
    from cavelight.weights.snapshot import write_checkpoint

    wanted, collect, begin = threading.Event(), Saver.collect, Saver.begin

    def collected(saver: "Saver", wait: bool) -> bool:
        if wait and saver._thread is not None:
            wanted.set()
        return collect(saver, wait)

    def begun(saver: "Saver", write: "Callable[[], None]") -> None:
        wanted.clear()
        begin(saver, write)

    def exported(model: "Transformer", path: Path, tokenizer: "Tokenizer") -> None:
        wanted.wait()
        write_checkpoint(model, path, tokenizer)

    stack = ExitStack()
    stack.enter_context(patch.multiple(Saver, collect=collected, begin=begun))
    stack.enter_context(patch.object(saves, "write_checkpoint", exported))
    return stack


def main() -> None:
    from cavelight.cli.main import app

    words = sys.argv[1:]
    slow = words[:1] == ["--slow-saves"]
    try:
        with slow_saves() if slow else ExitStack():
            app(words[slow:], standalone_mode=False)
    finally:
        print(peak_bytes(), file=sys.stderr)


if __name__ == "__main__":
    main()
