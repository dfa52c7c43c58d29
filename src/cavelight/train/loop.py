"""The training loop: data, model, steps, looks at held-out text, saves; and a clean stop on Ctrl-C."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cavelight.data.batches import Batches
from cavelight.disk import checkpoint_folder
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec import cost
from cavelight.spec.events import Evaluated, Event, Note, Step
from cavelight.spec.recipe import Recipe
from cavelight.train import schedule
from cavelight.train.balance import max_violation, routers
from cavelight.train.checkpoints import Snapshot
from cavelight.train.ema import Ema
from cavelight.train.evaluate import held_out_bits_per_byte
from cavelight.train.fp8 import emulate
from cavelight.train.metrics import Board, MetricsLog, Record, board_writer, matmul_peak
from cavelight.train.optim import Optimizer, initialise, pick_dtype
from cavelight.train.origin import Origin
from cavelight.train.prefetch import Prefetch
from cavelight.train.prepare import Prepared, prepare
from cavelight.train.provenance import machine
from cavelight.train.recompute import recompute
from cavelight.train.samples import Sampler
from cavelight.train.saves import Saves
from cavelight.train.sessions import note_session
from cavelight.train.state import Progress, RunFolder, check_resumable, check_same_data, fingerprint, put_back, take
from cavelight.train.step import StepResult, train_step
from cavelight.train.workers import Workers
from cavelight.weights.files import abbreviated
from cavelight.weights.snapshot import read_checkpoint

MOST_LEFT_OUT = 20  # steps that may be left out, or lead back, one after another
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
    """Train as the recipe says and leave a run's folder at `out`; `resume` goes on from its newest save.

    A run of `train.steps` that was killed and goes on equals one that was not, to the bit, on the same machine with the
    same number of threads. One of `train.minutes` does not repeat itself: its schedule follows the clock.
    """
    folder = RunFolder(Path(out))
    if recipe.train.tensorboard:
        board_writer()  # better missed now than after an hour of tokenising
    if resume:
        check_resumable(folder.read_recipe(), recipe)
    with folder.held(), torch.random.fork_rng(devices=[]):
        if not resume and folder.holds_a_run:
            raise UserError(
                f"{out} already holds a run",
                why="training anew would overwrite it",
                do=f"go on with it (cavelight train --resume {out}), or choose another folder",
            )
        torch.manual_seed(recipe.train.seed)
        run = _Run(recipe, folder, on_event, resume)
        try:
            return run.run()
        finally:
            run.close(at_once=isinstance(sys.exception(), KeyboardInterrupt))


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder, on_event: Callable[[Event], None], resume: bool) -> None:
        self.recipe, self.folder, self.on_event = recipe, folder, on_event
        self.saves = Saves(folder, recipe.train, on_event)
        self.data: Prepared = prepare(recipe, on_event)
        self.dtype = pick_dtype(recipe.train.dtype)
        self.model = Transformer(self.data.config, self.dtype)
        saved = self._saved() if resume else None
        if saved is None:
            _begin(self.model, recipe)
        if recipe.train.fp8:
            emulate(self.model)
        recompute(self.model, recipe.train.recompute)
        self.optimizer = Optimizer(self.model, recipe.train)
        self.ema = Ema(self.model, recipe.train.ema_decay) if recipe.train.ema_decay else None
        if saved:
            self.progress = put_back(saved, self.model, self.optimizer, self.ema)
            check_same_data(self.progress, self.data)
        else:
            self.progress = Progress(data=fingerprint(self.data))
            Origin.of(recipe, self.data.corpora).write(folder)
        folder.write_recipe(recipe)
        log = MetricsLog(folder.metrics, self.progress.log)
        board = partial(Board, folder.tensorboard) if recipe.train.tensorboard else None
        self.record = Record(log, board, on_event, self.progress.step)
        if not log.complete:
            on_event(Note(f"{folder.metrics} has been shortened: what it lacks of earlier steps is lost"))
        self.sampler = Sampler(self.model, self.data, recipe.train.sample_tokens)
        self.micro_rows = recipe.train.rows_per_microbatch or recipe.train.rows_per_step
        self.micro_batches = recipe.train.rows_per_step // self.micro_rows
        self.batches = Batches(
            self.data.train,
            row_length=recipe.data.row_length,
            depths=self.data.config.num_nextn_predict_layers,
            seed=recipe.train.seed,
            mask_documents=recipe.data.mask_documents,
        )
        self.ahead = self._prefetch()
        self.workers = Workers(min(torch.get_num_threads(), self.micro_batches))
        self.evaluators = Workers(torch.get_num_threads())
        self.durations: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW)  # tokens and seconds of the last steps
        self.returns = 0  # to the newest save, after one spike upon another
        self.peak = matmul_peak(self.dtype)
        note_session(folder.sessions, self.progress.step, machine(self.dtype), self.peak)
        self.flops_per_token = cost.flops_per_token(
            self.data.config, 0, queries=recipe.data.row_length, form="expanded", training=True, mtp=True
        )
        self._introduce()

    def _introduce(self) -> None:
        steps, kind = self.recipe.train.steps, str(self.dtype).removeprefix("torch.")
        if steps and steps <= self.recipe.train.warmup_steps:
            self.on_event(Note(f"All {steps:,} steps are warm-up: the learning rate never reaches its peak"))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        self.on_event(Note(f"{total:,} parameters in {kind}; {len(self.data.train):,} training tokens"))

    def run(self) -> Result:
        with _stop_on_interrupt() as stopping:
            while self._share() < 1 and not stopping.is_set():
                self._one_step()
            interrupted = stopping.is_set()
            self._save("interrupted" if interrupted else "finished", last=True)
            bits = None if interrupted else self._evaluate(whole=True)  # while the save is being written
            self.saves.finish()
            self.record.log.flush()
        if interrupted:
            self.on_event(Note(f"Stopped. Go on with: cavelight train --resume {self.folder.path}"))
        progress = self.progress
        return Result(
            self.folder.path, self.folder.model, progress.step, progress.tokens, progress.seconds, bits, interrupted
        )

    def _saved(self) -> Snapshot | None:
        """The newest save; None for a run that was killed before its first one and begins anew."""
        saved = self.saves.newest()
        if saved is None and self.folder.model.exists():
            raise UserError(f"{self.folder.path} holds no saved state", do="start the run anew in another folder")
        if saved is None:
            self.on_event(Note("The run ended before its first save: it begins anew"))
        return saved

    def close(self, at_once: bool) -> None:
        """Wait for the threads; `at_once`: not for a save, which is then left half-written."""
        if not at_once:
            self.saves.settle()
        self.ahead.close()
        self.record.close()

    def _prefetch(self) -> Prefetch:
        return Prefetch(self.batches.rows, self.progress.rows, self.micro_rows, ahead=self.micro_batches + 2)

    def _one_step(self) -> None:
        train, progress, started = self.recipe.train, self.progress, time.monotonic()
        share = self._share()
        batches = [self.ahead.take() for _ in range(schedule.rows(train, share) // self.micro_rows)]
        ceiling = math.inf if train.on_spike == "nothing" else progress.spikes.ceiling(train.spike_factor)
        result = train_step(
            self.model,
            self.optimizer,
            batches,
            train,
            progress.step,
            share,
            self.workers,
            self.ema,
            accept=lambda loss, grad_norm: loss <= ceiling,
        )
        tokens = sum(len(batch.tokens_T) for batch in batches)
        rows = sum(len(batch.rows) for batch in batches)
        seconds = time.monotonic() - started
        self.durations.append((tokens, seconds))
        progress.add(rows, tokens, seconds)
        progress.spikes.take(result.loss, train.spike_factor, result.skipped)
        self._report(result, rows)
        if result.skipped and self._leave_out(result, ceiling, rows):
            return
        started = time.monotonic()
        if train.evaluate_every and progress.step % train.evaluate_every == 0:
            self._evaluate(whole=False)
        if self.saves.due(progress.step):
            self._save("regular save")
        progress.seconds += time.monotonic() - started

    def _report(self, result: StepResult, rows: int) -> None:
        progress = self.progress
        tokens, seconds = (sum(column) for column in zip(*self.durations, strict=True))
        steps, left = self._estimate(seconds / len(self.durations))
        biases = [router.e_score_correction_bias for router in routers(self.model)]
        event = Step(
            step=progress.step,
            steps=steps,
            tokens=progress.tokens,
            rows=rows,
            loss=result.loss,
            mtp_loss=result.mtp_loss,
            mtp_losses=result.mtp_losses,
            balance_loss=result.balance_loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens_per_second=tokens / seconds,
            seconds_left=left,
            peak_share=self.flops_per_token * tokens / seconds / self.peak,
            max_vio=tuple(max_violation(counts_E) for counts_E in result.counts),
            bias_range=tuple(0.0 if bias_E is None else float(bias_E.max() - bias_E.min()) for bias_E in biases),
            skipped=result.skipped,
        )
        counts = [counts_E.tolist() for counts_E in result.counts]
        self.record.step(event, counts=counts, seconds=progress.seconds)

    def _leave_out(self, result: StepResult, ceiling: float, rows: int) -> bool:
        """Tell of a step whose update was left out, and go back where the recipe says so: whether it did."""
        progress, spike = self.progress, self.progress.step
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        reason = f"the loss is {result.loss:.3f}, above {ceiling:.3f}" if finite else "the gradient is not finite"
        line = {"step": spike, "loss": result.loss, "grad_norm": result.grad_norm, "ceiling": ceiling}
        line |= {"first_row": progress.rows - rows, "rows": rows}
        back = self._go_back() if self.recipe.train.on_spike == "back" else None
        self.record.spike(line | {"back_to": back})
        done = "its update was left out" if back is None else f"back to step {back}, past the rows since then"
        self.on_event(Note(f"step {spike}: {reason}; {done}"))
        if max(self.progress.spikes.left_out, self.returns) >= MOST_LEFT_OUT:
            raise UserError(
                f"{MOST_LEFT_OUT} steps in a row were left out, by their loss or by a gradient that is not finite",
                why="the run has diverged, and more steps will not mend it",
                do=f"lower train.learning_rate; {self.folder.path} holds what was saved before",
            )
        return back is not None

    def _go_back(self) -> int | None:
        """To the newest save, but past all rows that were read since: its step, or None where there is no save."""
        self.saves.settle()
        try:
            saved = self.saves.newest()
        except UserError as error:  # a run that is well otherwise
            self.on_event(Note(f"There is no way back. {error}"))
            saved = None
        if saved is None:
            return None
        rows, seconds = self.progress.rows, self.progress.seconds
        self.progress = put_back(saved, self.model, self.optimizer, self.ema)
        self.progress.rows, self.progress.seconds = rows, seconds
        self.record.go_back(self.progress.log, self.progress.step)
        self.returns += 1
        return self.progress.step

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

    def _evaluate(self, whole: bool) -> float:
        """Bits per byte of the model; a sample of what it writes, and bits per byte of the average, beside it."""
        limit = None if whole else self.recipe.train.evaluate_bytes

        def bits() -> float:
            context = self.recipe.data.row_length
            return held_out_bits_per_byte(self.model, self.data.held, context, limit, self.on_event, self.evaluators)

        own, average = bits(), None
        if self.ema is not None:
            with self.ema.swapped(self.model):
                average = bits()
        self.record.evaluated(Evaluated(self.progress.step, own, whole), average)
        step, every = self.progress.step, self.recipe.train.evaluate_every
        if self.recipe.train.sample_tokens and not (whole and every and step % every == 0):  # that look had one
            self.record.sampled(self.sampler.sample(step))
        return own

    def _save(self, why: str, last: bool = False) -> None:
        self.progress.log, self.returns = self.record.log.size, 0
        try:
            self.record.log.flush()
        except UserError as error:
            if last:
                raise
            return self.saves.failed(error)
        snapshot = partial(take, self.model, self.optimizer, self.ema, self.progress)
        self.saves.begin(snapshot, self.model, self.data.tokenizer, why)


def _begin(model: Transformer, recipe: Recipe) -> None:
    """A new run's weights: drawn, or those of the checkpoint that the recipe names."""
    if recipe.model.weights is None:
        return initialise(model, recipe.train.init_std, recipe.train.seed, recipe.train.init_stds)
    given = read_checkpoint(checkpoint_folder(recipe.model.weights), model.lm_head.weight.dtype).state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (model.state_dict(), given)]
    unlike = {name for name, _ in shapes[0].items() ^ shapes[1].items()}
    if unlike:
        raise UserError(
            f"The weights in {recipe.model.weights} do not fit the recipe's model",
            got=f"{abbreviated(sorted(unlike), 3)} of other shapes, or in one of them only",
            do="leave out those of model.overrides that change shapes",
        )
    model.load_state_dict(given)


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
