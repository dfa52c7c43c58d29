"""The import fence: imports point down the layers, never sideways, never up; some folders never meet torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "cavelight"
LAYERS = {
    "errors": 0,
    "kernels": 0,
    "disk": 1,
    "memory": 1,
    "spec": 2,
    "model": 3,
    "plan": 3,
    "data": 4,
    "run": 4,
    "weights": 4,
    "doctor": 5,
    "see": 5,
    "train": 5,
    "api": 6,
    "bench": 6,
    "experiment": 6,
    "harness": 7,
    "__init__": 7,
    "cli": 8,
    "__main__": 9,
}
WITHOUT_TORCH = {"errors", "disk", "memory", "spec", "plan"}
LIGHT_AT_IMPORT = {"cli", "__init__", "__main__"}  # may use torch, but inside functions only
HEAVY = {"torch", "numpy", "matplotlib", "safetensors", "tokenizers", "transformers", "jinja2"}
LONGEST = 450  # lines of a file

FILES = sorted(SOURCE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The folder, or the module right under the package, that a file belongs to."""
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST, at_import: bool = False) -> Iterator[str]:
    """Dotted names of what is imported, anywhere or only when the module is; `from a import b` gives a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from (f"{dots}{node.module or ''}.{alias.name}" for alias in node.names)
        elif not (at_import and waits(node)):
            yield from imports(node, at_import)


def waits(node: ast.AST) -> bool:
    """Whether a module's import leaves this part of it alone."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def target_of(name: str) -> str:
    """The room that an import of ours leads to: of `cavelight.model.mla.MLA`, model."""
    room = name.split(".")[1] if "." in name else ""
    return room if room in LAYERS else "__init__"


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "cavelight"


def violations(room: str, source: str) -> list[str]:
    tree, found = ast.parse(source), []
    for name in imports(tree):
        if name.startswith("."):
            found.append(f"{name}: write imports in full")
        elif is_ours(name):
            target = target_of(name)
            if target != room and LAYERS[target] >= LAYERS[room]:
                found.append(f"{name}: {room} lies in layer {LAYERS[room]}, {target} in {LAYERS[target]}")
            if room in WITHOUT_TORCH and target not in WITHOUT_TORCH:
                found.append(f"{name}: {room} is free of torch, {target} is not")
        elif room in WITHOUT_TORCH and name.split(".")[0] in HEAVY:
            found.append(f"{name}: {room} is to import quickly and everywhere")
    for name in imports(tree, at_import=True) if room in LIGHT_AT_IMPORT else ():
        leads_to_torch = is_ours(name) and target_of(name) not in WITHOUT_TORCH | LIGHT_AT_IMPORT
        if name.split(".")[0] in HEAVY or leads_to_torch:
            found.append(f"{name}: {room} imports this inside functions only")
    return found


def test_every_folder_has_a_layer() -> None:
    assert {room_of(file) for file in FILES} <= LAYERS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    assert violations(room_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("model", "from cavelight.run import cache"),
        ("model", "def f():\n    import cavelight.train.loss"),
        ("run", "from cavelight.weights.snapshot import read_checkpoint"),
        ("kernels", "from cavelight.errors import UserError"),
        ("spec", "import torch.nn"),
        ("plan", "from cavelight.kernels import attend"),
        ("train", "from .loss import x"),
        ("train", "from cavelight import load"),
        ("train", "import cavelight"),
        ("cli", "from cavelight.api import load"),
        ("cli", "if True:\n    import numpy as np"),
    ],
)
def test_the_fence_stops(room: str, source: str) -> None:
    assert violations(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("model", "from cavelight.model.mla import MLA\nfrom cavelight.kernels import attend\nimport torch"),
        ("plan", "from cavelight.spec.config import ModelConfig"),
        ("cli", "from cavelight import __version__\ndef f():\n    from cavelight.api import load"),
    ],
)
def test_the_fence_lets_through(room: str, source: str) -> None:
    assert violations(room, source) == []


@pytest.mark.parametrize("name", ["pages", "scheduler"])
def test_what_is_computed_when_is_decided_without_torch(name: str) -> None:
    names = set(imports(ast.parse((SOURCE / "run" / f"{name}.py").read_text(encoding="utf-8"))))
    assert {found for found in names if is_ours(found)} <= {
        f"cavelight.run.pages.{part}" for part in ("Copy", "OutOfPages", "Pages", "Table")
    }
    assert not {found.split(".")[0] for found in names} & HEAVY


def test_files_stay_readable() -> None:
    sources = [file for folder in ("src", "tests", "bench") for file in (ROOT / folder).rglob("*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in sources}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
