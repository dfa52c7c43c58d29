"""Building the C++ beside this file with whatever compiler is here, once for each machine and source; loading it."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, Thread

SOURCES = Path(__file__).parent
COMPILERS = ("g++", "c++")  # of the vector types in lanes.h only GCC knows all operations
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-w")
SWITCH = "CAVELIGHT_NATIVE"  # 0: never use what is built here
PATIENCE = 300.0  # seconds
SUM_BYTES = 32
# What files, loading, compilers and (RuntimeError) the search for a home folder raise.
BROKEN = (OSError, RuntimeError, subprocess.SubprocessError)


class Build:
    """A shared library, ready at once if some earlier run built it, otherwise some seconds after it is asked for."""

    def __init__(self, source: str, folder: Callable[[], Path]) -> None:
        self.source, self.folder = SOURCES / source, folder
        self.lock = Lock()
        self.loaded: ctypes.CDLL | None = None
        self.reason: str | None = None
        self.thread: Thread | None = None

    def get(self, wait: bool = False) -> ctypes.CDLL | None:
        """The library. None while it is being built in the background, unless told to wait, and if it cannot be."""
        if self.loaded is not None or self.reason is not None:
            return self.loaded
        with self.lock:
            if self.thread is None:
                if os.environ.get(SWITCH) == "0":
                    self.reason = f"{SWITCH} is 0"
                    return None
                if self._is_here():
                    return self.loaded
                self.thread = Thread(target=self._run, daemon=True)
                self.thread.start()
        if wait:
            self.thread.join()
        return self.loaded

    def why_not(self) -> str | None:
        """Why there is no library; None if there is one, or may be one soon."""
        return self.reason

    def _run(self) -> None:
        try:
            file = self._file()
            # By a process of its own, so that it comes to its end even if this one is over before.
            command = [sys.executable, __file__, str(self.source), str(file)]
            child = subprocess.run(command, start_new_session=True, capture_output=True, text=True, errors="replace")
            if child.returncode:
                self.reason = child.stderr.strip() or f"building ended with {child.returncode}"
            else:
                self.loaded = ctypes.CDLL(str(file))
        except BROKEN as error:
            self.reason = str(error)

    def _is_here(self) -> bool:
        """Load it if it was built before. One that is damaged, or another machine's, is built anew."""
        try:
            file = self._file()
            content = file.read_bytes()
            if _sum(content[:-SUM_BYTES]) == content[-SUM_BYTES:]:  # loading half a library would kill the process
                self.loaded = ctypes.CDLL(str(file))
        except BROKEN:  # building it tells why, if that fails too
            self.loaded = None
        return self.loaded is not None

    def _file(self) -> Path:
        """Its name tells sources, flags and processor, so that a shared home folder serves different machines."""
        told = hashlib.sha256()
        for file in sorted(SOURCES.glob("*.[ch]*")):
            told.update(file.read_bytes())
        told.update(" ".join((*FLAGS, platform.machine(), _processor())).encode())
        return self.folder() / f"{self.source.stem}-{told.hexdigest()[:16]}.so"


def compile_to(file: Path, source: Path) -> None:
    """Build `file`, with its sum behind it: beside, then renamed. Raises whatever keeps it from that."""
    compilers = [compiler for compiler in map(shutil.which, COMPILERS) if compiler]
    if not compilers:
        raise OSError("there is no C++ compiler (one of " + ", ".join(COMPILERS) + ")")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        _run_one(compilers, [*FLAGS, "-o", str(made), str(source)])
        content = made.read_bytes()
        made.write_bytes(content + _sum(content))
        os.replace(made, file)


def _sum(content: bytes) -> bytes:
    """What is written behind a library to tell that it is whole."""
    return hashlib.sha256(content).digest()


def _run_one(compilers: Sequence[str], arguments: Sequence[str]) -> None:
    """Run the first that does it. Raises the first one's error if none does."""
    failed = None
    for compiler in compilers:
        try:
            subprocess.run(
                [compiler, *arguments], check=True, capture_output=True, text=True, errors="replace", timeout=PATIENCE
            )
            return
        except (OSError, subprocess.SubprocessError) as error:
            failed = failed or error
    if failed:
        raise failed


def _processor() -> str:
    """What tells one kind of processor from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _told(error: Exception) -> str:
    """In one line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (
            [line for line in error.stderr.splitlines() if "error" in line]
            or error.stderr.splitlines()
            or ["without a word"]
        )
        return f"the C++ compiler failed: {lines[0]}"
    return str(error)


if __name__ == "__main__":
    try:
        compile_to(source=Path(sys.argv[1]), file=Path(sys.argv[2]))
    except BROKEN as error:
        print(_told(error), file=sys.stderr)
        sys.exit(1)
