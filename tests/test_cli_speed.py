"""Help and plan answer in a blink: without torch, in under half a second."""

import subprocess
import sys
import time

import pytest

LIMIT = 0.5  # seconds
TRIES = 5  # the best of these counts, as the machine may be busy with other things
QUICK = [["--help"], ["--version"], ["plan", "deepseek-v3"], ["plan", "deepseek-v3", "--json"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_imports_no_torch(arguments: list[str]) -> None:
    watch = (
        "import sys\n"
        "from cavelight.cli.main import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'tokenizers', 'safetensors'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_answers_at_once(arguments: list[str]) -> None:
    best = float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cavelight", *arguments], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
        if best < LIMIT:
            return
    pytest.fail(f"cavelight {' '.join(arguments)} took {best:.2f} s at best")
