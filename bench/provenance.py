"""Where a figure comes from, and how a script of this folder leaves."""

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from cavelight.cli.screen import INTERRUPTED
from cavelight.errors import UserError
from cavelight.train.provenance import commit, machine, processor

__all__ = ["ROOT", "commit", "leave_with", "machine", "processor", "some"]

ROOT = Path(__file__).parent.parent


def leave_with(main: Callable[[], int]) -> None:
    """Run a script's `main` and leave with its exit code; with 2 after a mistake of the user's, 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def some(text: str) -> int:
    """For options that count something: none of it would write a page about nothing over one that says something."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text[:100]} is no whole number from 1 on")
    return int(text)
