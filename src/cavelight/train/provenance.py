"""Where a figure comes from: the commit and the machine that it was measured with."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """The commit that this source stands at, and whether files differ from it; "none" for an installed package."""

    def git(*arguments: str) -> Any:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )

    tracked = git("ls-files", "--error-unmatch", str(Path(__file__).parent.parent / "__init__.py"))
    head = git("rev-parse", "HEAD")
    if tracked.returncode or head.returncode:
        return "none"
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return f"{head.stdout.strip()}{' with changes' if changed else ''}"


def machine(dtype: torch.dtype) -> str:
    """Processor, cores, torch, and the numbers that were computed in."""
    kind = str(dtype).removeprefix("torch.")
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {kind}"


def processor() -> str:
    """The CPU's name as the system has it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
