"""Building the library: without a compiler, with one that fails, over damaged files, twice at once, in the middle."""

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cavelight.kernels import native
from cavelight.kernels.native import build
from cavelight.kernels.native.build import Build
from cavelight.run import quick as quick_module
from cavelight.run.engine import Engine
from cavelight.run.generate import TokenStream

from .run_models import random_model, small_config

SMALL = """#include <cstdint>
extern "C" int64_t answer() { return 42; }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that is compiled in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def small(folder: Path) -> Build:
    return Build("small.cpp", lambda: folder)


def answer(made: Build) -> int | None:
    library = made.get(wait=True)
    return library.answer() if library else None


def fake_compiler(
    folder: Path, script: str, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...] = ("c++",)
) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n" + script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))


def test_it_is_built_once_and_found_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = small(cache)
    assert answer(first) == 42 and first.why_not() is None
    (file,) = cache.iterdir()
    monkeypatch.setenv("PATH", "")
    again = small(cache)
    assert again.get() is not None and again.thread is None
    (sources / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert small(cache)._file() != file
    (sources / "small.cpp").write_text(SMALL)
    (sources / "more.h").write_text("// every source counts")
    assert small(cache)._file() != file


def test_without_a_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    made = small(tmp_path / "cache")
    assert answer(made) is None
    assert made.why_not() == "there is no C++ compiler (one of g++, c++)"


def test_a_compiler_that_fails_is_quoted(sources: Path, tmp_path: Path) -> None:
    (sources / "small.cpp").write_text("int x = ;\n")
    made = small(tmp_path / "cache")
    assert answer(made) is None
    why = made.why_not()
    assert why is not None and "the C++ compiler failed" in why and "small.cpp:1:9: error" in why and "\n" not in why
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 3", "the C++ compiler failed: "),
        (
            "printf 'warning\\nerror: \\377\\376 no\\nerror: two\\n' >&2; exit 1",
            "the C++ compiler failed: error: \ufffd",
        ),
        ("exit 0", "No such file"),  # and writes nothing
        ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', ".so: "),
    ],
)
def test_compilers_of_many_kinds(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    fake_compiler(tmp_path / "bin", script, monkeypatch)
    made = small(tmp_path / "cache")
    assert answer(made) is None
    assert told in (made.why_not() or "")


def test_the_next_compiler_is_tried(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems' c++ knows no OpenMP, and there is a g++ beside it."""
    whole = os.environ["PATH"]
    fake_compiler(tmp_path / "bin", "exit 1", monkeypatch)
    (tmp_path / "bin/g++").write_text(f'#!/bin/sh\nPATH={whole} exec g++ "$@"')
    (tmp_path / "bin/g++").chmod(stat.S_IRWXU)
    assert answer(small(tmp_path / "cache")) == 42


@pytest.mark.parametrize("left", [0, 1, 100, 5000, -1, -32, -33])
def test_a_damaged_library_is_built_anew(sources: Path, tmp_path: Path, left: int) -> None:
    """A file cut short would not fail to load: it would kill the process."""
    cache = tmp_path / "cache"
    assert answer(small(cache)) == 42
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()  # it is mapped
    file.write_bytes(whole[:left])
    again = small(cache)
    assert answer(again) == 42 and again.thread is not None
    assert small(cache).get() is not None


def test_one_changed_byte_is_damage(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert answer(small(cache)) == 42
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    again = small(cache)
    assert answer(again) == 42 and again.thread is not None


def test_a_cache_that_cannot_be_written(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    made = small(tmp_path / "file")
    assert answer(made) is None and "file" in (made.why_not() or "")


def test_a_run_that_is_over_before_leaves_it_for_the_next(sources: Path, tmp_path: Path) -> None:
    """The shortest runs are those that most need it to be there."""
    cache = tmp_path / "cache"
    lines = (
        "import os, pathlib, time",
        "from cavelight.kernels.native import build",
        f"build.SOURCES = pathlib.Path({str(sources)!r})",
        f"made = build.Build('small.cpp', lambda: pathlib.Path({str(cache)!r}))",
        "assert made.get() is None",
        "time.sleep(0.2)",  # until the child is there
        "os._exit(0)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    ends = time.monotonic() + 60
    while not (cache.is_dir() and any(file.is_file() for file in cache.iterdir())):
        assert time.monotonic() < ends
        time.sleep(0.05)
    again = small(cache)
    assert answer(again) == 42 and again.thread is None


def test_a_cache_that_cannot_be_told(sources: Path) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    made = Build("small.cpp", nowhere)
    assert answer(made) is None and made.why_not() == "Could not determine home directory."


def test_the_switch(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAVELIGHT_NATIVE", "0")
    made = small(tmp_path / "cache")
    assert answer(made) is None and made.why_not() == "CAVELIGHT_NATIVE is 0" and made.thread is None
    assert not (tmp_path / "cache").exists()


def _build(sources: str, cache: str, start: "multiprocessing.synchronize.Event") -> None:
    build.SOURCES = Path(sources)
    start.wait()
    made = Build("small.cpp", lambda: Path(cache))
    assert answer(made) == 42


def test_two_processes_build_at_once(sources: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    cache = tmp_path / "cache"
    both = [context.Process(target=_build, args=(str(sources), str(cache), start)) for _ in range(2)]
    for process in both:
        process.start()
    start.set()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(cache.iterdir())) == 1
    assert small(cache).get() is not None


@pytest.fixture
def slow(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The real library, from the cache, but only when a test says so."""
    real, ready = quick_module.BUILD.get(wait=True), threading.Event()
    made = small(tmp_path / "cache")

    def run() -> None:
        ready.wait(60)
        made.loaded = real

    monkeypatch.setattr(made, "_run", run)
    monkeypatch.setattr(quick_module, "BUILD", made)
    yield ready
    ready.set()


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_cold_start_answers_and_switches_on_the_way(slow: threading.Event, drafts: int) -> None:
    model, prompt = random_model(small_config()), [3, 1, 4]
    build_of = quick_module.BUILD
    stream = TokenStream(model, prompt, max_new_tokens=60, drafts=drafts)
    before = [next(stream) for _ in range(20)]
    assert build_of.loaded is None and build_of.thread is not None and build_of.why_not() is None
    assert stream.stats.without_native == "they are still being built, for the next run"
    slow.set()
    build_of.get(wait=True)
    assert build_of.loaded is not None
    tokens = before + list(stream)
    assert stream.stats.without_native is None
    assert tokens == list(TokenStream(model, prompt, max_new_tokens=60, drafts=drafts))
    build_of.loaded, build_of.reason = None, "a test is without"
    assert tokens == list(TokenStream(model, prompt, max_new_tokens=60, drafts=drafts))


def test_an_invariant_engine_waits_for_it(slow: threading.Event) -> None:
    """Half by one way and half by another would not be the same to the bit."""
    threading.Timer(0.2, slow.set).start()
    Engine(random_model(small_config()), memory=1 << 20, invariant=True)
    assert quick_module.BUILD.loaded is not None


def test_the_library_that_tests_run_with_is_built() -> None:
    """Else all comparisons would be of the plain twin with itself."""
    library = quick_module.BUILD.get(wait=True)
    assert library is not None, quick_module.BUILD.why_not()
    matrix = native.matrix(torch.eye(3))
    assert matrix is not None
    assert torch.equal(native.product(library, matrix, torch.ones(2, 3)), torch.ones(2, 3))
