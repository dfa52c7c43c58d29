"""What the commands share on the screen: consoles, errors as one sentence, JSON lines, numbers as people read them."""

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from cavelight.errors import UserError

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)
INTERRUPTED = 130  # what shells report of a command ended by Ctrl-C
_BARS = "▁▂▃▄▅▆▇█"


@contextmanager
def telling(as_json: bool, interrupted: str = "Stopped by Ctrl-C.") -> Iterator[None]:
    """Turn a UserError into one message and exit code 2, and Ctrl-C into `interrupted` and 130."""
    with _clear_full_output():
        try:
            yield
        except UserError as error:
            if as_json:
                say_json({"error": str(error)})
            else:
                ERR.print(Text(str(error), style="red"), soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            ERR.print(f"\n{interrupted}", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _clear_full_output() -> Iterator[None]:
    """Nor is it a bug of ours if stdout is a file on a full disk. (Files that we write tell that as UserErrors.)"""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        with suppress(OSError, ValueError, AttributeError):  # what it still holds would fail once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ERR.print("The disk is full: what this command says has no room. Do: free some space.", style="red")
        raise typer.Exit(2) from None


def say_json(value: Any) -> None:
    """One line of strict JSON on stdout; paths become text, infinities and NaN null."""
    line = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # another encoding, or a file name that is no text
        line = json.dumps(_plain(value), allow_nan=False)
    print(line, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """7 s, 4 min 05 s, 2 h 03 min."""
    if not math.isfinite(seconds):
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """The values as a row of at most `width` bars; each bar is the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    cells = min(width, len(finite))
    edges = [cell * len(finite) // cells for cell in range(cells + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means) if low is None else low, max(means) if high is None else high
    span = (high - low) or 1.0
    return "".join(_BARS[min(7, max(0, int(8 * (mean - low) / span)))] for mean in means)
