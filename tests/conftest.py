"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch

from cavelight.run.quick import BUILD, without_native

# The models of tests are so small that a second thread only waits, above all on a busy machine.
torch.set_num_threads(1)

# A shell ignores Ctrl-C for what it starts in the background, and so would the commands that tests start and stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("CAVELIGHT_CACHE", str(cache))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With kernels.native in it from the start, where there is a compiler: no test is half computed without."""
    folder = Path(os.environ.get("CAVELIGHT_CACHE") or tmp_path_factory.getbasetemp() / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAVELIGHT_CACHE", str(folder))
        without_native()
    return folder


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(BUILD, "loaded", None)
    monkeypatch.setattr(BUILD, "reason", "a test is without")
