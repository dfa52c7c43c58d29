"""Fixtures for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    if "CAVELIGHT_CACHE" not in os.environ:
        shared: Path = tmp_path_factory.getbasetemp() / "cache"
        monkeypatch.setenv("CAVELIGHT_CACHE", str(shared))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are taken in one order, whatever the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
