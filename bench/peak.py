"""A command of `cavelight` in a process of its own, which says on stderr how much memory it had at most.

python -m bench.peak train demo --out runs/x: the last line on stderr is the peak of resident bytes. It is the kernel's
high-water mark of this process alone; ru_maxrss would be that of the parent, where the parent was larger.
"""

import re
import resource
import sys
from pathlib import Path


def peak_bytes(process: int | str = "self") -> int:
    """The most resident memory that this process has had, or another one that is running."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    if found or process != "self":
        return int(found[1]) * 1024 if found else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    from cavelight.cli.main import app

    try:
        app(sys.argv[1:], standalone_mode=False)
    finally:
        print(peak_bytes(), file=sys.stderr)


if __name__ == "__main__":
    main()
