"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

# The models of tests are so small that a second thread only waits, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    if "CAVELIGHT_CACHE" not in os.environ:
        shared: Path = tmp_path_factory.getbasetemp() / "cache"
        monkeypatch.setenv("CAVELIGHT_CACHE", str(shared))
