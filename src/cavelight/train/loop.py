"""The training loop: data, model, steps, looks at held-out text, saves; and a clean stop on Ctrl-C."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cavelight.data.batches import Batches
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Evaluated, Event, Note, Saved, Step
from cavelight.spec.recipe import Recipe
from cavelight.train.balance import max_violation
from cavelight.train.evaluate import held_out_bits_per_byte
from cavelight.train.optim import Optimizer, initialise, learning_rate, pick_dtype
from cavelight.train.prepare import Prepared, prepare
from cavelight.train.state import MetricsLog, Progress, RunFolder, check_resumable, load_state, save_state
from cavelight.train.step import StepResult, train_step
from cavelight.train.workers import Workers
from cavelight.weights.snapshot import write_checkpoint

MOST_LEFT_OUT = 20  # steps without a finite gradient, one after another
SPEED_WINDOW = 20  # steps over which speed is averaged


@dataclass(frozen=True)
class Result:
    """Where a run stands when `train` returns."""

    out: Path
    model: Path  # a Hugging Face directory
    steps: int
    tokens: int
    seconds: float
    bits_per_byte: float | None  # over all held-out text; None when interrupted
    interrupted: bool


def train(
    recipe: Recipe, out: Path, on_event: Callable[[Event], None] = lambda event: None, resume: bool = False
) -> Result:
    """Train as the recipe says and leave a run's folder at `out`; `resume` goes on from what it holds."""
    folder = RunFolder(Path(out))
    if not resume and folder.state.exists():
        raise UserError(
            f"{out} already holds a run",
            why="training anew would overwrite it",
            do=f"go on with it (cavelight train --resume {out}), or choose another folder",
        )
    if resume:
        check_resumable(folder.read_recipe(), recipe)
    return _Run(recipe, folder, on_event, resume).run()


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder, on_event: Callable[[Event], None], resume: bool) -> None:
        self.recipe, self.folder, self.on_event = recipe, folder, on_event
        self.data: Prepared = prepare(recipe, on_event)
        dtype = pick_dtype(recipe.train.dtype)
        self.model = Transformer(self.data.config, dtype)
        initialise(self.model, recipe.train.init_std, recipe.train.seed)
        self.optimizer = Optimizer(self.model, recipe.train)
        self.progress = load_state(folder, self.model, self.optimizer) if resume else Progress()
        self.micro_rows = recipe.train.rows_per_microbatch or recipe.train.rows_per_step
        self.batches = Batches(
            self.data.train,
            row_length=recipe.data.row_length,
            rows_per_batch=self.micro_rows,
            depths=self.data.config.num_nextn_predict_layers,
            seed=recipe.train.seed,
            mask_documents=recipe.data.mask_documents,
        )
        micro_batches = recipe.train.rows_per_step // self.micro_rows
        self.workers = Workers(min(torch.get_num_threads(), micro_batches))
        self.evaluators = Workers(torch.get_num_threads())
        self.durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self.left_out = 0
        folder.write_recipe(recipe)
        kind = str(dtype).removeprefix("torch.")
        total = sum(parameter.numel() for parameter in self.model.parameters())
        on_event(Note(f"{total:,} parameters in {kind}; {len(self.data.train):,} training tokens"))

    def run(self) -> Result:
        log = MetricsLog(self.folder.metrics, self.progress.step)
        with _stop_on_interrupt() as stopping:
            while self._share() < 1 and not stopping.is_set():
                self._one_step(log)
        if stopping.is_set():
            self._save("interrupted")
            self.on_event(Note(f"Stopped. Go on with: cavelight train --resume {self.folder.path}"))
            return self._result(None)
        self._save("finished")
        return self._result(self._evaluate(log, whole=True))

    def _one_step(self, log: MetricsLog) -> None:
        train, progress = self.recipe.train, self.progress
        started = time.monotonic()
        rate = learning_rate(train, progress.step, self._share())
        per_step = train.rows_per_step // self.micro_rows
        micro_batches = [self.batches.batch(progress.step * per_step + i) for i in range(per_step)]
        result = train_step(self.model, self.optimizer, micro_batches, train, rate, self.workers)
        progress.step += 1
        progress.tokens += sum(len(batch.tokens_T) for batch in micro_batches)
        seconds = time.monotonic() - started
        self.durations.append(seconds)
        progress.seconds += seconds
        self._report(log, result, rate)
        started = time.monotonic()
        if train.evaluate_every and progress.step % train.evaluate_every == 0:
            self._evaluate(log, whole=False)
        if train.save_every and progress.step % train.save_every == 0:
            self._save("regular save")
        progress.seconds += time.monotonic() - started

    def _report(self, log: MetricsLog, result: StepResult, rate: float) -> None:
        progress, mean = self.progress, sum(self.durations) / len(self.durations)
        steps, left = self._estimate(mean)
        event = Step(
            step=progress.step,
            steps=steps,
            tokens=progress.tokens,
            loss=result.loss,
            mtp_loss=result.mtp_loss,
            balance_loss=result.balance_loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens_per_second=self.recipe.train.rows_per_step * self.recipe.data.row_length / mean,
            seconds_left=left,
            max_vio=tuple(max_violation(counts_E) for counts_E in result.counts),
        )
        log.write(event, counts=[counts_E.tolist() for counts_E in result.counts], seconds=progress.seconds)
        self.on_event(event)
        self.left_out = 0 if math.isfinite(result.grad_norm) else self.left_out + 1
        if self.left_out:
            self.on_event(Note(f"step {progress.step}: the gradient is not finite; its update was left out"))
        if self.left_out == MOST_LEFT_OUT:
            raise UserError(
                f"The gradient has not been finite for {MOST_LEFT_OUT} steps",
                why="the run has diverged, and more steps will not mend it",
                do=f"lower train.learning_rate; {self.folder.path} holds what was saved before",
            )

    def _share(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further."""
        train, progress = self.recipe.train, self.progress
        by_steps = progress.step / train.steps if train.steps else 0.0
        by_time = progress.seconds / (60 * train.minutes) if train.minutes else 0.0
        return max(by_steps, by_time)

    def _estimate(self, seconds_per_step: float) -> tuple[int, float]:
        """Steps in all, and seconds left."""
        train, progress = self.recipe.train, self.progress
        left = (train.steps - progress.step) * seconds_per_step if train.steps else float("inf")
        if train.minutes:
            left = min(left, max(60 * train.minutes - progress.seconds, 0.0))
        return progress.step + round(left / seconds_per_step), left

    def _evaluate(self, log: MetricsLog, whole: bool) -> float:
        limit = None if whole else self.recipe.train.evaluate_bytes
        context = self.recipe.data.row_length
        bits = held_out_bits_per_byte(self.model, self.data.held, context, limit, self.on_event, self.evaluators)
        event = Evaluated(self.progress.step, bits, whole)
        log.write(event)
        self.on_event(event)
        return bits

    def _save(self, why: str) -> None:
        save_state(self.folder, self.model, self.optimizer, self.progress)
        write_checkpoint(self.model, self.folder.model, self.data.tokenizer)
        self.on_event(Saved(self.folder.path, why))

    def _result(self, bits: float | None) -> Result:
        progress = self.progress
        return Result(
            self.folder.path, self.folder.model, progress.step, progress.tokens, progress.seconds, bits, bits is None
        )


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the current step; a second one ends at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handle(number: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
