"""lm-evaluation-harness' tasks on a model of ours, by way of its Python API.

lm-eval is an extra that this file alone needs (`pip install 'cavelight[eval]'`): without it, its import fails. It
counts as untyped. Texts are cut into tokens as lm-eval has it, so that scores can be set beside those of others; each
begins with the model's begin token, where it has one.

Letters: T tokens of many texts in one row, P predicted tokens, V vocabulary, B a branch's tokens, S rows it looks at,
H heads, N width without position, R rotary width, U value width, C latent width.
"""

import difflib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from cavelight.data.tokenizer import StreamDecoder, Tokenizer
from cavelight.errors import UserError
from cavelight.kernels import attend
from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run.generate import begin
from cavelight.run.sample import Sampling
from cavelight.run.text import generate_text
from cavelight.spec.events import Event, Note, Phase
from cavelight.train.workers import ALONE, Workers

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 512  # tokens, since each has a whole vocabulary of them
MAX_NEW_TOKENS = 256  # lm-eval's, for tasks that do not say
BOOTSTRAPS = 1000  # resamplings for the error of what is no mean
SEED = 1234  # lm-eval's, of the choice of worked examples
# What lm-eval and datasets raise about a task's file or its data; their own text says more than the kind.
_BUILT_IN = (OSError, ValueError, RuntimeError, ImportError, TypeError)
REFUSALS = (*_BUILT_IN, datasets.exceptions.DatasetsError, jinja2.TemplateError)

Answer = tuple[float, bool]  # sum of log p in nats; whether greedy decoding would have said the same


@dataclass(frozen=True)
class Fork:
    """A context and the continuations that it is asked about, as token ids; `numbers` say which requests they are."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that the model has to read: of the context, and of each branch all but the last."""
        return len(self.context), *(len(continuation) - 1 for continuation in self.continuations)


@dataclass(frozen=True)
class ForkedAttend:
    """`Attend` for contexts with branches, laid end to end: a context sees itself, a branch its context and itself.

    forks: of each fork, the context's length and its branches'. What branches share is computed once.
    """

    forks: Sequence[tuple[int, ...]]

    def __call__(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        k_up_HNC: Tensor,
        v_up_HUC: Tensor,
        scale: float,
    ) -> Tensor:
        rows_TL = torch.cat([c_TC, k_rope_TR], dim=-1)
        (H, N, C), R, U = k_up_HNC.shape, q_rope_THR.shape[-1], v_up_HUC.shape[1]
        outputs, start = [], 0
        for lengths in self.forks:
            context_SL = rows_TL[start : start + lengths[0]]
            for branch, length in enumerate(lengths):
                part = slice(start, start + length)
                start += length
                if length == 0:
                    continue
                rows_SL = torch.cat([context_SL, rows_TL[part]]) if branch else context_SL
                cheaper = attend.absorbed_is_cheaper(length, rows_SL.shape[0], H, N, R, U, C)
                form = attend.absorbed if cheaper else attend.expanded
                q_nope_BHN, q_rope_BHR = q_nope_THN[part], q_rope_THR[part]
                o_BHU = form(q_nope_BHN[None], q_rope_BHR[None], rows_SL[None], k_up_HNC, v_up_HUC, scale)[0]
                outputs.append(o_BHU)
        return torch.cat(outputs)


class CavelightLM(TemplateLM):
    """A model of ours as lm-eval wants one: `lm_eval.simple_evaluate(CavelightLM(model, tokenizer), tasks=[...])`.

    Requests about the same context, as the choices of one question, share its computation. Batches run side by side
    on `workers`. Texts longer than the model's context lose their beginning.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        on_event: Callable[[Event], None] = lambda event: None,
        workers: Workers = ALONE,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self.on_event, self.workers = model, tokenizer, on_event, workers
        self.max_length = model.config.max_position_embeddings
        self._begin = begin(model.config)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._begin[0] if self._begin else self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The begin token goes first, unless `add_special_tokens` is False."""
        return [*(self._begin if add_special_tokens is not False else []), *self._tokenizer.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's way; but where context and continuation melt into one token, that token is what counts."""
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if pair[1]:
            return pair
        whole = self.tok_encode(context + continuation)
        return whole[:-1] or [self.prefix_token_id], whole[-1:]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Answer]:
        """log p of each request's (context, continuation) pair, and whether it is the greedy one."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of each request's whole text, in windows of the model's context, every token once."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                pairs.append((("", ""), *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each request's context, up to any of its stop texts; MTP modules draft."""
        texts = []
        for request in requests:
            context, settings = request.args
            stop, limit, sampling = generation_of(settings)
            if limit >= self.max_length:
                raise _too_long("A text that a task asks for is", limit, self.max_length)
            ids = self.tok_encode(context)[limit - self.max_length :]
            decoder = StreamDecoder(self._tokenizer)
            stream = generate_text(
                self.model, self._tokenizer, decoder, ids, max_new_tokens=limit, sampling=sampling, stop=stop
            )
            texts.append("".join(stream))
            self.on_event(Phase("generating", len(texts), len(requests), "texts"))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[Answer]:
        forks = forks_of([(context, continuation) for _, context, continuation in requests], self.max_length)
        answers: list[Answer] = [(0.0, True)] * len(requests)
        done = 0
        for scored in self.workers.map(self._score, batches_of(forks)):
            for number, answer in scored:
                answers[number] = answer
            done += len(scored)
            self.on_event(Phase("scoring", done, len(requests), "requests"))
        return answers

    @torch.inference_mode()
    def _score(self, forks: Sequence[Fork]) -> list[tuple[int, Answer]]:
        """The answers to all requests of these forks, with the requests' numbers, from one pass of the model."""
        device = self.model.lm_head.weight.device
        tokens: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        rows, counts, numbers = [], [], []
        for fork in forks:
            last = len(tokens) + len(fork.context) - 1  # from there on every continuation is predicted
            tokens += fork.context
            positions += range(len(fork.context))
            for number, continuation in zip(fork.numbers, fork.continuations, strict=True):
                rows += [last, *range(len(tokens), len(tokens) + len(continuation) - 1)]
                labels += continuation
                tokens += continuation[:-1]
                positions += range(len(fork.context), len(fork.context) + len(continuation) - 1)
                counts.append(len(continuation))
                numbers.append(number)
        port = ForkedAttend([fork.lengths for fork in forks])
        tokens_T, positions_T = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        hidden_TD, _ = self.model(tokens_T, positions_T, port, GroupedDispatch())
        predictions = hidden_TD[torch.tensor(rows, device=device)].split(LOGITS_AT_ONCE)
        labels_P = torch.tensor(labels, device=device)
        parts = [self._judge(*part) for part in zip(predictions, labels_P.split(LOGITS_AT_ONCE), strict=True)]
        log_p_P, greedy_P = (torch.cat(part) for part in zip(*parts, strict=True))
        sums = [float(log_p.sum()) for log_p in log_p_P.double().split(counts)]
        greedy = [bool(same.all()) for same in greedy_P.split(counts)]
        return list(zip(numbers, zip(sums, greedy, strict=True), strict=True))

    def _judge(self, hidden_PD: Tensor, labels_P: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's log p, and whether it is the likeliest token."""
        logits_PV = self.model.head(hidden_PD)
        log_p_P = logits_PV.log_softmax(dim=-1).gather(1, labels_P[:, None])[:, 0]
        return log_p_P, logits_PV.argmax(dim=-1) == labels_P


def forks_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Fork]:
    """Pairs of context and continuation by context; contexts lose their beginning where both are too long together.

    Raises UserError for a continuation that leaves no room for a context.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        room = max_length + 1 - len(continuation)  # its last token is predicted, not read
        if room < 1:
            raise _too_long("A continuation is", len(continuation), max_length)
        by_context.setdefault(tuple(context[-room:]), []).append(number)
    return [
        Fork(context, tuple(tuple(pairs[number][1]) for number in numbers), tuple(numbers))
        for context, numbers in by_context.items()
    ]


def _too_long(what: str, tokens: int, max_length: int) -> UserError:
    return UserError(
        f"{what} longer than the model's context",
        got=f"{tokens} tokens, of {max_length}",
        do="leave the task out, or use a model with a longer context",
    )


def batches_of(forks: Iterable[Fork]) -> Iterator[list[Fork]]:
    """In order, about TOKENS_AT_ONCE tokens each; one with more beside its context is parted and reads it again."""
    batch: list[Fork] = []
    size = 0
    for fork in chain.from_iterable(map(_parts, forks)):
        length = sum(fork.lengths)
        if batch and size + length > TOKENS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(fork)
        size += length
    if batch:
        yield batch


def _parts(fork: Fork) -> Iterator[Fork]:
    first = size = 0
    for number, length in enumerate(fork.lengths[1:]):
        if number > first and size + length > TOKENS_AT_ONCE:
            yield Fork(fork.context, fork.continuations[first:number], fork.numbers[first:number])
            first, size = number, 0
        size += length
    yield Fork(fork.context, fork.continuations[first:], fork.numbers[first:])


def generation_of(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, most new tokens and sampling from a task's `generation_kwargs`; greedy unless it asks for chance."""
    left = {name: value for name, value in settings.items() if value is not None}
    until = left.pop("until", [])
    limits = [left.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in left]
    temperature = left.pop("temperature", None)
    by_chance = left.pop("do_sample", bool(temperature))
    temperature = (1.0 if temperature is None else float(temperature)) if by_chance else 0.0
    chance = {
        name: left.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed") if name in left
    }
    if left.keys() - {"num_beams"} or left.get("num_beams", 1) != 1:
        raise UserError(
            "A task asks for a way of generating that Cavelight does not have",
            got=", ".join(f"{name}={value!r}" for name, value in left.items()),
            do="leave the task out",
        )
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    return stop, int(limits[0]) if limits else MAX_NEW_TOKENS, Sampling(temperature, **chance)


@dataclass(frozen=True)
class Score:
    """One number of one task. `error` is its standard error, None where lm-eval has none; `shots` worked examples."""

    task: str
    metric: str
    value: float
    error: float | None
    documents: int
    shots: int


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    limit: int | None = None,
    include: Path | None = None,
    shots: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    workers: Workers = ALONE,
) -> list[Score]:
    """Run lm-eval's tasks, groups and tags of these names (`*` stands for anything), or those in the folder `include`.

    limit: documents of each task at most. shots: worked examples before each question, the task's own number unless
    given; a task that insists on none has none. Raises UserError for names that nobody knows, data that cannot be read
    and tasks that need more than text.
    """
    loaded, stdout = _load(names, include, on_event), sys.stdout

    def tell(event: Event) -> None:
        with redirect_stdout(stdout):
            on_event(event)

    for task in loaded["tasks"].values():
        _check(task)
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=shots if shots is not None and own != 0 else own or 0)
        task.set_fewshot_seed(seed=SEED)
    lm = CavelightLM(model, tokenizer, tell, workers)
    try:
        with redirect_stdout(sys.stderr):  # lm-eval prints what it is doing
            results = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    except REFUSALS as error:
        raise _refused(names, error) from error
    return [score for name, values in results["results"].items() for score in _scores(name, values, results)]


def _check(task: Any) -> None:
    runs_code, shows_pictures = getattr(task, "UNSAFE_CODE", False), getattr(task, "MULTIMODAL", False)
    if runs_code or shows_pictures:
        why = "it runs code that the model wrote" if runs_code else "it shows pictures"
        raise UserError(f"The task {task.task_name} cannot be run here", why=why, do="leave it out")


def _scores(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Score]:
    """lm-eval's keys are "metric,filter" and "metric_stderr,filter"; the usual filter, "none", is left out of names."""
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        yield Score(
            values.get("alias", name).strip(" -"),
            metric if kind == "none" else f"{metric} ({kind})",
            float(value),
            float(error) if isinstance(error, int | float) else None,
            int(values.get("sample_len", 0)),
            int(results["n-shot"].get(name, 0)),
        )


def _load(names: Sequence[str], include: Path | None, on_event: Callable[[Event], None]) -> dict[str, Any]:
    """lm-eval's own tasks are looked through only where `include` does not have all: there are many thousand files."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if include is not None and not include.is_dir():
        raise UserError("There is no such folder of tasks", got=str(include), do="name a folder with task files (YAML)")
    for with_defaults in (False, True) if include else (True,):
        if with_defaults:
            on_event(Note("looking through lm-evaluation-harness' tasks"))
        manager = TaskManager(include_path=include, include_defaults=with_defaults)
        known = {name: manager.match_tasks([name]) for name in names}
        unknown = [name for name, matches in known.items() if not matches]
        if not unknown:
            break
    if unknown:
        near = [close for name in unknown for close in difflib.get_close_matches(name, manager.all_tasks, n=3)]
        raise UserError(
            "lm-evaluation-harness has no such task",
            got=", ".join(unknown),
            do=f"did you mean {', '.join(near)}" if near else "`lm-eval ls tasks` lists them",
        )
    try:
        loaded: dict[str, Any] = manager.load(sorted({match for matches in known.values() for match in matches}))
    except (*REFUSALS, LookupError) as error:
        raise _refused(names, error) from error
    return loaded


def _refused(names: Sequence[str], error: Exception) -> UserError:
    offline = isinstance(error, ConnectionError)
    return UserError(
        f"lm-evaluation-harness cannot run {', '.join(names)}",
        got=f"{type(error).__name__}: {error}",
        why="the task's data is on the Hugging Face hub, which cannot be reached" if offline else "",
        do="go online once, it is then kept; or bring tasks and data of your own with --include"
        if offline
        else "mend the task or its data, or leave it out",
    )
