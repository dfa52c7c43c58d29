"""When a run is saved and what with, in the background; and what is said of it."""

import shutil
import time
from collections.abc import Callable
from functools import partial

from cavelight.data.tokenizer import Tokenizer
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Event, Note, Saved
from cavelight.spec.sections import TrainSection
from cavelight.train.checkpoints import Saver, Snapshot, prune, read_newest, write_save
from cavelight.train.state import RunFolder, plain_model
from cavelight.weights.snapshot import check_replaceable, write_checkpoint


class Saves:
    """A run's saves. Each one brings the exported model up to date, so that a run can be tried while it goes on.

    A save that fails for want of space is told and does not stop the run: the next one is another attempt.
    """

    def __init__(self, folder: RunFolder, recipe: TrainSection, on_event: Callable[[Event], None]) -> None:
        self.folder, self.recipe, self.on_event = folder, recipe, on_event
        self.exports = {"weights": folder.model} | ({"ema": folder.average} if recipe.ema_decay else {})
        # Of a run that kept an average before and does so no more, the export would grow old beside the model.
        self.stale = None if recipe.ema_decay else folder.average
        for path in (folder.model, folder.average):
            check_replaceable(path)  # better now than after hours of training
        self._saver, self._began = Saver(), time.monotonic()
        self._stands: int | None = None  # the step of the newest save that is whole
        self._under_way: tuple[int, str] = (0, "")  # another one's step and occasion

    def newest(self) -> Snapshot | None:
        """The newest save that is whole; None where there is none."""
        saved = read_newest(self.folder.saves, lambda text: self.on_event(Note(text)))
        self._stands = saved.step if saved else None
        return saved

    def due(self, step: int) -> bool:
        """Whether the recipe wants a save after this step."""
        self._tell(wait=False)
        every, minutes = self.recipe.save_every, self.recipe.save_minutes
        by_time = minutes is not None and time.monotonic() - self._began >= 60 * minutes
        return by_time or (every is not None and step % every == 0)

    def begin(self, take: Callable[[], Snapshot], model: Transformer, tokenizer: Tokenizer, why: str) -> None:
        """Start to write what `take` gives, of which the model gives the shape alone.

        It is taken when the save before it is written, so that there is never more than one copy of the run's state.
        """
        self._tell(wait=True)
        snapshot = take()
        self._began, self._under_way = time.monotonic(), (snapshot.step, why)
        exports = {path: partial(plain_model, snapshot, file, model) for file, path in self.exports.items()}
        stands, keep, keep_every = self._stands == snapshot.step, self.recipe.keep_saves, self.recipe.keep_every

        def write() -> None:
            if not stands:
                write_save(self.folder.saves, snapshot)
                prune(self.folder.saves, snapshot.step, keep, keep_every)
            for path, plain in exports.items():
                write_checkpoint(plain(), path, tokenizer)
            if self.stale:
                shutil.rmtree(self.stale, ignore_errors=True)

        self._saver.begin(write)

    def failed(self, error: UserError) -> None:
        """Say that a save came to nothing."""
        self.on_event(Note(f"The save failed and training goes on; the next save is another attempt. {error}"))

    def settle(self) -> None:
        """Wait for the save under way."""
        self._tell(wait=True)

    def finish(self) -> None:
        """The same, for the last one: UserError if it failed."""
        self._collect(wait=True)

    def _tell(self, wait: bool) -> None:
        try:
            self._collect(wait)
        except UserError as error:
            self.failed(error)

    def _collect(self, wait: bool) -> None:
        if self._saver.collect(wait):
            self._stands, why = self._under_way
            self.on_event(Saved(self.folder.path, why))
