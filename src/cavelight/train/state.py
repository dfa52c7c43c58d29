"""A run: its folder, how far it has come, and everything that it needs to go on as if it had never stopped."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavelight.disk import clear_disk_errors, file_beside, json_lines
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.recipe import Recipe
from cavelight.train.balance import routers
from cavelight.train.checkpoints import Snapshot, saved_steps, sweep
from cavelight.train.ema import Ema
from cavelight.train.optim import Optimizer
from cavelight.train.prepare import Prepared
from cavelight.train.spikes import SpikeWatch


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run's folder."""

    path: Path

    @classmethod
    def of(cls, path: Path) -> "RunFolder":
        """The run in `path`; or the one around it, where `path` is what a run exports."""
        run, outer = cls(path), cls(Path(os.path.abspath(path)).parent)
        exports = [str(outer.model), str(outer.average)]
        is_export = not run.recipe.is_file() and outer.recipe.is_file() and os.path.abspath(path) in exports
        return outer if is_export else run

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def sessions(self) -> Path:
        """A line for each time that the run began or went on: see train.sessions."""
        return self.path / "sessions.jsonl"

    @property
    def origin(self) -> Path:
        """What the run was made of when it began: see train.origin."""
        return self.path / "origin.json"

    @property
    def saves(self) -> Path:
        """Folders step-00000500: see train.checkpoints."""
        return self.path / "saves"

    @property
    def model(self) -> Path:
        """A Hugging Face directory: what `generate`, `eval` and other programs open."""
        return self.path / "model"

    @property
    def average(self) -> Path:
        """The same of the weights' moving average, where the recipe asks for one."""
        return self.path / "model-ema"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def holds_a_run(self) -> bool:
        """Whether training anew here would overwrite something: a save, or a model that came of one."""
        return bool(saved_steps(self.saves)) or self.model.exists()

    def write_recipe(self, recipe: Recipe) -> None:
        with file_beside(self.recipe) as scratch:
            scratch.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def read_recipe(self) -> Recipe:
        try:
            values = json.loads(self.recipe.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"a recipe.json that holds a {type(values).__name__}, not an object")
            return Recipe.build(values)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} is not a run that can go on", got=str(error), do="name the folder that train wrote"
            ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other process may train here meanwhile; what a killed one left half-written is removed."""
        with clear_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock, self.path)
            sweep(self.path)
            sweep(self.saves)
            yield
        finally:
            os.close(lock)


@dataclass
class Progress:
    """How far a run has come.

    `data` tells the training text and its tokenizer from any others (`fingerprint`). `rows` is the place in the data,
    the number of the next row; `tokens` counts those that were learnt from or left
    out as a spike. `seconds` is time spent in the loop, over all its sessions. `log` is the log's length in bytes.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: int = 0
    data: str = ""
    spikes: SpikeWatch = field(default_factory=SpikeWatch)

    def add(self, rows: int, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.step, self.rows = self.step + 1, self.rows + rows
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds


def take(model: Transformer, optimizer: Optimizer, ema: Ema | None, progress: Progress) -> Snapshot:
    """A copy of all that the run's future depends on, so that training may go on while it is written.

    Files: `weights` (float32 masters by the parameters' names, and the routing biases), `optimizer`, `ema`, `random`.
    """
    state: dict[str, Any] = optimizer.state()
    weights: dict[str, Tensor] = state.pop("masters")
    moments: dict[str, Tensor] = {}
    values = {"progress": asdict(progress), "optimizer": _take_apart(state, "optimizer", moments)}
    tensors = {"weights": _copies(weights | _biases(model)), "optimizer": moments}
    tensors["random"] = {"torch": torch.get_rng_state()}
    if ema is not None:
        tensors["ema"] = _copies(ema.state())
    return Snapshot(progress.step, tensors, values)


@torch.no_grad()
def put_back(snapshot: Snapshot, model: Transformer, optimizer: Optimizer, ema: Ema | None) -> Progress:
    """Make the run what it was when the snapshot was taken."""
    values, weights = snapshot.values, snapshot.tensors["weights"]
    for name, bias_E in _biases(model).items():
        bias_E.copy_(weights[name])
    state = _put_together(values["optimizer"], snapshot.tensors["optimizer"])
    optimizer.load_state({**state, "masters": dict(weights)})
    if ema is not None:  # where the run had none, it begins with these weights
        ema.load_state(snapshot.tensors.get("ema", weights))
    torch.set_rng_state(snapshot.tensors["random"]["torch"])
    progress = dict(values["progress"])
    return Progress(**progress | {"spikes": SpikeWatch(**progress["spikes"])})


def plain_model(snapshot: Snapshot, file: str, like: Transformer) -> Transformer:
    """The model of a snapshot's `weights`, or of its `ema`, in the dtype of `like` and with tensors of its own."""
    plain = Transformer(like.config, like.lm_head.weight.dtype, torch.device("meta"))
    dtypes = {name: tensor.dtype for name, tensor in plain.state_dict().items()}
    tensors = {**snapshot.tensors["weights"], **snapshot.tensors[file]}  # an average has no biases
    values = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    plain.load_state_dict(values, assign=True)
    return plain


def fingerprint(data: Prepared, with_checksums: bool = True) -> str:
    """Of the tokenizer, of the lengths of all documents to be learnt from, in bytes and in tokens, and of the tokens.

    Of these the stores know checksums, so that they need not be read. Early saves were without.
    """
    made_of = sha256(data.tokenizer.fingerprint.encode())
    for store in data.train.stores:
        made_of.update(store.bytes_M.data)
        made_of.update(store.starts_M1.data)
        if with_checksums:
            made_of.update(repr(store.checksums).encode())
    return made_of.hexdigest()


def check_same_data(before: Progress, data: Prepared) -> None:
    """Raise UserError if the text has changed since: row numbers, and perhaps token ids, would mean something else."""
    if before.data not in ("", fingerprint(data), fingerprint(data, with_checksums=False)):  # early saves say less
        raise UserError(
            "The text is not the one that the run began with",
            got="a corpus, or a tokenizer trained on it, that has changed since the last save",
            do="put it back as it was; or start a new run with these weights (model.weights) and their data.tokenizer",
        )


def check_resumable(before: Recipe, now: Recipe) -> None:
    """Raise UserError if `now` differs from the recipe of the saved run in what cannot change while it is under way."""
    fixed = {"seed", "init_std", "init_stds", "optimizer"}
    changed = [section for section in ("model", "data") if getattr(before, section) != getattr(now, section)]
    changed += [f"train.{key}" for key in sorted(fixed) if getattr(before.train, key) != getattr(now.train, key)]
    if changed:
        raise UserError(
            "A run goes on with the model and the data that it began with",
            got=f"another {', '.join(changed)}",
            do="change only other keys of train, or start a new run",
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; UserError for one that is damaged."""
    return json_lines(path)


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"Another process is training in {folder}",
            why="two at once would spoil each other's work",
            do="wait until it has finished, or stop it; its run can be continued",
        ) from error


def _biases(model: Transformer) -> dict[str, Tensor]:
    """The routing biases by their names in the table of shapes: buffers, since no gradient moves them."""
    ours = {id(router.e_score_correction_bias) for router in routers(model)}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in ours}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts and lists as JSON can hold it; copies of its tensors go into `tensors` by their dotted paths."""
    match value:
        case Tensor():
            tensors.update(_copies({name: value}))
            return {"tensor": name}
        case dict():  # as pairs: JSON's keys are strings, an optimizer's are numbers too
            inner = [[key, _take_apart(item, f"{name}.{key}", tensors)] for key, item in value.items()]
            return {"dict": inner}
        case list() | tuple():
            return {"list": [_take_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return value


def _put_together(value: Any, tensors: Any) -> Any:
    """The tree that `_take_apart` took apart; tuples have become lists."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: _put_together(item, tensors) for key, item in pairs}
        case {"list": items}:
            return [_put_together(item, tensors) for item in items]
    return value
