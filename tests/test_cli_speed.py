"""Help and plan answer in a blink: without torch, in under half a second."""

import resource
import subprocess
import sys

import pytest

LIMIT = 0.5  # seconds on the processor, which do not grow when the machine is busy with other things as well
TRIES = 5  # the best of these counts
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
        before = children_seconds()
        subprocess.run([sys.executable, "-m", "cavelight", *arguments], check=True, capture_output=True)
        best = min(best, children_seconds() - before)
        if best < LIMIT:
            return
    pytest.fail(f"cavelight {' '.join(arguments)} took {best:.2f} s at best")


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
