"""Tokens out of a model: prefill, then plain steps or rounds of speculation, until something ends it.

Letters: T tokens of a step, D hidden size, V vocabulary. Throughout, n is the position of the last known token, which
the trunk has not seen yet; a step runs it through the trunk with the drafts that follow it.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from operator import index
from typing import Literal

import torch
from torch import Tensor

from cavelight.errors import UserError, check_options
from cavelight.model.ports import Dispatch, GroupedDispatch
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.run.choose import Allowed, Chooser
from cavelight.run.quick import quick, why_plain
from cavelight.run.rows import CacheDtype, cache_dtype
from cavelight.run.sample import Sampling
from cavelight.run.settle import Settler, is_close
from cavelight.run.speculate import Chain, Drafter, Wish, cost_of_round
from cavelight.run.stats import CANCELLED, WINDOW, Stats
from cavelight.spec.config import ModelConfig

Drafts = int | Literal["auto"]
GREEDY = Sampling()
CHUNK = 512  # prompt tokens that go through at once
TIMED_STEPS = (2, 4, 6)  # of a speculating run, the steps made plain to measure them; later one in PERIOD
PERIOD = 64
TRIED = 3  # rounds, and as many plain steps, after which drafts that can never give what they cost are given up
ROOM = 256  # new tokens that the cache has room for from the start


class TokenStream(Iterator[int]):
    """New tokens, one by one; `stats` tells how it went. The end token, where one comes, is the last.

    drafts: how many tokens to guess ahead with the MTP modules; 0 for none; "auto" for as many as there are modules,
    until it shows that they do not pay. Whatever it is, the output is the same token for token: natively in any type,
    plainly in float32, exactly if greedy and up to a rare near-tie if sampled.
    cache: "auto" to keep latents as the weights are, "int8" in less memory (see rows.py).
    stop_ids: the configuration's end tokens unless given. allowed: which tokens may follow; see `choose.Allowed`.
    Raises UserError for a prompt that does not fit or is no list of token ids, and if the model produces NaN.
    """

    def __init__(
        self,
        model: Transformer,
        prompt_tokens: Sequence[int],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] | None = None,
        drafts: Drafts = "auto",
        cache: CacheDtype = "auto",
        allowed: Allowed | None = None,
        dispatch: Dispatch | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.sampling, self.clock = quick(model), sampling, clock
        self.tokens = checked_prompt(config, prompt_tokens)
        self.stop_ids: AbstractSet[int] = frozenset(end_tokens(config) if stop_ids is None else stop_ids)
        self.chooser = Chooser(sampling, allowed, self.stop_ids)
        self.max_new_tokens = max_new_tokens
        check_options("So many tokens cannot be made", self, [limit_rule(max_new_tokens)])
        self.limit = config.max_position_embeddings
        self.dispatch = dispatch or GroupedDispatch()
        capacity = len(self.tokens) + min(max_new_tokens, ROOM)
        rows = cache_dtype(config, weight.dtype, cache)
        self.cache = LatentCache(config, capacity, rows, weight.device)
        # Either a row's bits are the same in any step, or what they decide is settled; if neither, the clock may not.
        without_native = why_plain(self.model, self.dispatch)
        self.steady = without_native is None
        self.exact = self.steady or (sampling.greedy and rows in (torch.float32, torch.float64))
        self.settler: Settler | None = None
        self.stats = Stats(prompt_tokens=len(self.tokens), without_native=without_native)
        self.may_turn_off = drafts == "auto"
        self.chain = Chain()
        self.drafter = self._drafter(drafts)
        self.drafts: list[int] = []  # those that the next step verifies
        self._drafting_seconds = 0.0  # what it took to make them
        self._steps = 0
        self._tokens: Iterator[int] = self._stream()

    def __next__(self) -> int:
        return next(self._tokens)

    def cancel(self, why: str = CANCELLED) -> None:
        """End it; no more tokens come."""
        self.stats.finish = self.stats.finish or why
        self._tokens = iter(())

    def _drafter(self, drafts: Drafts) -> Drafter | None:
        modules = self.model.config.num_nextn_predict_layers
        checked_drafts(self.model.config, drafts)
        self.stats.drafts = modules if drafts == "auto" else drafts
        if self.stats.drafts == 0:
            self.stats.off = "the model has no MTP module" if modules == 0 else None
            return None
        depth = min(self.stats.drafts, modules)
        return Drafter(self.model, lambda pieces: self.cache.at(pieces[0][1]), self.dispatch, depth)

    def _stream(self) -> Iterator[int]:
        if self.max_new_tokens == 0:
            self.stats.finish = "limit of new tokens"
            return
        ready = self._prefill()
        while True:
            yield from ready
            if self.stats.finish:
                return
            ready = self._step()

    @torch.inference_mode()
    def _prefill(self) -> list[int]:
        """The prompt through the trunk, in chunks; the first new token."""
        started, prompt = self.clock(), len(self.tokens)
        for start in range(0, prompt, CHUNK):
            hidden_TD, routings = self._trunk(self.tokens[start : start + CHUNK], start)
            if self.drafter:
                self.chain.unseen.append(hidden_TD)
                if start + CHUNK < prompt:  # the modules take the prompt in chunks too
                    self._propose(self.drafter, 0)
        self._decide(self.model.head(hidden_TD[-1:]), hidden_TD[-1:], routings)
        if self.exact and not self.steady and self.model.config.num_nextn_predict_layers:  # else nothing need agree
            self.settler = Settler(self.model, self.cache, self.dispatch, prompt)
        ready = self._finish(prompt)
        self._draft()
        self.stats.prefill_seconds = self.clock() - started
        return ready

    @torch.inference_mode()
    def _step(self) -> list[int]:
        """One pass of the trunk over the last token and its drafts, what it makes certain, and the next drafts."""
        started, n = self.clock(), len(self.tokens) - 1
        drafts, drafting_seconds = self.drafts, self._drafting_seconds
        hidden_TD, routings = self._trunk([self.tokens[n], *drafts], n)
        hidden_TD = self._decide(self.model.head(hidden_TD), hidden_TD, routings)
        verified = self.clock()
        if self.drafter:
            self.chain.unseen.append(hidden_TD)
        if drafts:
            self.stats.add_round(drafts, self.tokens[n + 1 :], verified - started + drafting_seconds)
        else:
            self.stats.plain_seconds.append(verified - started)
        ready = self._finish(n + 1)
        self._draft()
        self.stats.decode_seconds += self.clock() - started
        return ready

    def _trunk(self, tokens: Sequence[int], start: int) -> tuple[Tensor, list[Routing]]:
        device = self.model.lm_head.weight.device
        positions_T = torch.arange(start, start + len(tokens), device=device)
        result: tuple[Tensor, list[Routing]] = self.model(
            torch.tensor(tokens, device=device), positions_T, self.cache.at(start), self.dispatch
        )
        return result

    def _decide(self, logits_TV: Tensor, hidden_TD: Tensor, routings: list[Routing]) -> Tensor:
        """Append the tokens that this step makes certain; the hidden states at the positions they follow."""
        settler = self.settler
        close_T = settler.close_routes(routings, len(logits_TV)) if settler else []

        def doubt(row: int, scores_V: Tensor) -> bool:
            return close_T[row] or is_close(scores_V)

        new, doubted = self.chooser.tokens(logits_TV, self.tokens, self.drafts, doubt if settler else None)
        self.tokens += new
        if not (settler and doubted):
            return hidden_TD[: len(new)]
        settled_1D = settler.settle(self.tokens, len(self.tokens) - 1)
        self.tokens += self.chooser.tokens(self.model.head(settled_1D), self.tokens, [])[0]
        self.stats.settled += 1
        return torch.cat([hidden_TD[: len(new)], settled_1D])  # what came after it was computed with another row

    def _propose(self, drafter: Drafter, drafts: int) -> list[int]:
        return drafter.propose([Wish(self.chain, self.tokens, drafts, self.chooser.guess, self.stop_ids)])[0]

    def _finish(self, start: int) -> list[int]:
        """The tokens from `start` on, up to an end; notes what the end is."""
        stats = self.stats
        ready, stats.finish = cut(self.tokens[start:], self.stop_ids, self.max_new_tokens - stats.new_tokens)
        if stats.finish is None and len(self.tokens) > self.limit:
            stats.finish = f"context's limit of {self.limit} tokens"
        stats.new_tokens += len(ready)
        if stats.finish and not self.steady:  # the library may have come meanwhile
            stats.without_native = why_plain(self.model, self.dispatch)
        return ready

    def _draft(self) -> None:
        """Drafts for the next step: none at the end, in a step that is timed plain, or once they did not pay."""
        started, self.drafts = self.clock(), []
        self._steps += 1
        if self.drafter and self.may_turn_off and not self._pays():
            self.drafter = None
        timed = self._steps in TIMED_STEPS or self._steps % PERIOD == 0
        room = min(self.max_new_tokens - self.stats.new_tokens - 1, self.limit - len(self.tokens))
        drafts = min(self.stats.drafts, room)
        if self.drafter and drafts > 0 and not timed and not self.stats.finish:
            self.drafts = self._propose(self.drafter, drafts)
        self._drafting_seconds = self.clock() - started

    def _pays(self) -> bool:
        """Judged once in every window of rounds. By the clock where the output cannot depend on the verdict.

        Elsewhere it can, by rounding, and has to be the same on every run: there the sizes of the model decide.
        By the clock it may be clear early that not even drafts which are always right would pay.
        """
        stats, rounds = self.stats, len(self.stats.round_tokens)
        judged = rounds > 0 and rounds % WINDOW == 0
        if not self.exact:
            return not judged or stats.judge(cost_of_round(self.model.config, stats.drafts))
        early = rounds == TRIED and len(stats.plain_seconds) >= TRIED
        if not (judged or early):
            return True
        cost = stats.measured_cost()
        return (early and cost <= stats.drafts + 1) or stats.judge(cost)


def generate_tokens(
    model: Transformer,
    prompt_tokens: Sequence[int],
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    mtp: bool = True,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    drafts: Drafts = "auto",
    cache: CacheDtype = "auto",
    stop_ids: Collection[int] | None = None,
) -> list[int]:
    """The tokens that follow a prompt, the end token included where one comes. See Sampling and TokenStream."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    return list(
        TokenStream(
            model,
            prompt_tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            drafts=drafts if mtp else 0,
            cache=cache,
        )
    )


def cut(new: Sequence[int], stop_ids: AbstractSet[int], room: int) -> tuple[list[int], str | None]:
    """Of new tokens those up to an end token or to the limit, and which of the two ended them, if one did."""
    for i, token in enumerate(new[:room]):
        if token in stop_ids:
            return list(new[: i + 1]), "end token"
    return list(new[:room]), "limit of new tokens" if len(new) >= room else None


def begin(config: ModelConfig) -> list[int]:
    """The begin token, in a list, if the model has one."""
    return [] if config.bos_token_id is None else [config.bos_token_id]


def end_tokens(config: ModelConfig) -> list[int]:
    """The configuration's end tokens: none, one or several."""
    eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else eos


def limit_rule(max_new_tokens: int) -> tuple[str, bool, str]:
    """For `check_options`."""
    return "max_new_tokens", isinstance(max_new_tokens, int) and max_new_tokens >= 0, "a whole number from 0 on"


def checked_drafts(config: ModelConfig, drafts: Drafts) -> None:
    """Raises UserError if the model cannot make so many drafts."""
    if drafts == "auto" or drafts == 0:
        return
    if not isinstance(drafts, int) or drafts < 0:
        raise UserError("Drafts are auto or a number that is not negative", got=repr(drafts))
    if config.num_nextn_predict_layers == 0:
        raise UserError(
            "This model cannot draft", got=f"{drafts} drafts", why="it has no MTP module", do="leave drafts at auto"
        )


def checked_prompt(config: ModelConfig, tokens: Sequence[int]) -> list[int]:
    """The prompt as a list; an empty one becomes the begin token. Raises UserError if it cannot be used."""
    try:
        prompt = [index(token) for token in tokens] or begin(config)  # a tensor will do too
    except TypeError as error:
        got, do = " ".join(repr(tokens).split())[:100], "encode text with the model's tokenizer"
        raise UserError("The prompt is no list of token ids", got=got, why=str(error), do=do) from None
    if not prompt:
        raise UserError("The prompt is empty", why="this model has no begin token to start from", do="give some text")
    unknown = [token for token in prompt if not 0 <= token < config.vocab_size]
    if unknown:
        raise UserError(
            "The prompt holds unknown token ids",
            got=", ".join(map(str, unknown[:5])),
            why=f"the vocabulary has ids 0 to {config.vocab_size - 1}",
            do="use the tokenizer that belongs to this model",
        )
    if len(prompt) > config.max_position_embeddings:
        raise UserError(
            "The prompt is longer than the context",
            got=f"{len(prompt)} tokens",
            why=f"this model takes at most {config.max_position_embeddings} (max_position_embeddings)",
            do=f"shorten it by at least {len(prompt) - config.max_position_embeddings} tokens",
        )
    return prompt
