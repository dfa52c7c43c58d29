"""Where a figure comes from: the commit and the machine that it was measured with."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cavelight.errors import UserError

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The commit that stands checked out, and whether files differ from it."""

    def git(*arguments: str) -> Any:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return "none"
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return f"{head.stdout.strip()}{' with changes' if changed else ''}"


def machine(dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {kind}"


def processor() -> str:
    """The CPU's name as the system has it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def leave_with(main: Callable[[], int]) -> None:
    """Run a script's `main` and leave with its exit code; with 2 after a mistake of the user's."""
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
