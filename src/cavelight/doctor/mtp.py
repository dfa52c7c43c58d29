"""What an MTP module was trained to be fed, settled by how many of its drafts the trunk accepts.

A module reads [embedding ; hidden]. The report leaves open whether hidden is taken after the norm before the head or
before it, and writes the two in the other order than released checkpoints have them. A wrong choice raises no error:
drafts are merely refused more often. So all four readings are run on the same text. Where acceptance does not tell the
hidden states apart, what the module was trained for does: the nats that it takes for the text's own tokens.

Letters: T tokens of all rows, B rows of W tokens each, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.variants import (
    LOGITS_AT_ONCE,
    hidden_states,
    layout,
    mean_and_z,
    nats,
    repeats_itself,
    variant,
    windows,
)
from cavelight.model.mtp import MTPModule
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Event, Phase

MtpHidden = Literal["post_norm", "pre_norm"]
Verdict = Literal["post_norm", "pre_norm", "undecided", "swapped order", "untrained", "not tested"]

MOST_TOKENS, WINDOW = 8192, 512
FEWEST_TOKENS = 256
NO_LABEL = -100
CLEAR = 4.0  # standard deviations of a paired sign test, one chance in 16,000
NOTICEABLE = 0.005  # in acceptance: less is no reason to change anything
TINY = 1e-5  # nats a token: less comes from rounding and from the norms' epsilon, and may do so every time
LEARNT = 0.5  # nats a token below ln V: with less the trunk has learnt nothing that drafts could meet


@dataclass(frozen=True)
class Reading:
    """One way to feed a module: the state after or before its norm; halves of eh_proj as released, or swapped."""

    hidden: MtpHidden
    swapped: bool = False

    def __str__(self) -> str:
        return f"{self.hidden}, swapped" if self.swapped else self.hidden


READINGS = tuple(Reading(hidden, swapped) for swapped in (False, True) for hidden in ("post_norm", "pre_norm"))


@dataclass(frozen=True)
class Acceptance:
    """One module's drafts under each reading.

    `hits` says of each of the `drafts` whether it is the trunk's own greedy choice, which is what speculation accepts;
    `right` counts those that are the text's own token, `nats` holds -log p of that token where the window has it.
    `guessed` is what the better of two guesses without a module reaches: always the trunk's most frequent choice, or
    the last token once more.
    """

    drafts: int
    hits: dict[Reading, Tensor]
    right: dict[Reading, int]
    nats: dict[Reading, Tensor]
    guessed: int

    def accepted(self, reading: Reading) -> int:
        return int(self.hits[reading].sum())

    def share(self, reading: Reading) -> float:
        return self.accepted(reading) / self.drafts

    def best(self, swapped: bool | None = None) -> Reading:
        """The reading with the most drafts accepted, of one order or of both; of equal ones the first."""
        return max((r for r in READINGS if swapped in (None, r.swapped)), key=self.accepted)

    def beats_guessing(self, reading: Reading) -> bool:
        chance = self.guessed / self.drafts
        deviation = math.sqrt(max(self.drafts * chance * (1 - chance), 1.0))
        return self.accepted(reading) - self.guessed > CLEAR * deviation


@dataclass(frozen=True)
class Settlement:
    """The verdict on a checkpoint's MTP modules; `mtp_hidden` is what config.json should say, None if undecided."""

    verdict: Verdict
    mtp_hidden: MtpHidden | None
    modules: tuple[Acceptance, ...]
    findings: tuple[Finding, ...]


def settle_mtp(
    model: Transformer,
    tokens_T: Sequence[int] | Tensor,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Settlement:
    """Draft along a text in every reading of the modules' input, and say which one they were trained for.

    tokens_T: of real text, some thousands if there are so many (8,192 are used at most). Module k is fed by what
    module k - 1 made in its own best reading. A difference counts if a paired sign test is sure of it.
    """
    if not model.config.num_nextn_predict_layers:
        return Settlement("not tested", None, (), ())
    V, config = model.config.vocab_size, model.config
    rows = windows(tokens_T, min(WINDOW, config.max_position_embeddings), MOST_TOKENS)
    if sum(map(torch.numel, rows)) < FEWEST_TOKENS or min(row.shape[1] for row in rows) < len(model.mtp) + 2:
        return _not_tested(f"the text has only {len(tokens_T)} tokens")
    if repeats_itself(torch.as_tensor(tokens_T)[:MOST_TOKENS]):
        return _not_tested("the text repeats itself; give a longer one")
    loss = float(nats(model, rows).mean())
    if not loss <= math.log(V) - LEARNT:  # NaN too
        why = f"the model predicts the text no better than chance ({loss:.2f} nats a token, ln V is {math.log(V):.2f})"
        return _not_tested(why)
    modules = _accept_along(model, rows, on_event)
    return _judge(modules, config.mtp_hidden)


def sign_test(one: Tensor, other: Tensor) -> float:
    """Of paired hits: how many standard deviations `one` has more of those that only one of the two has."""
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return (only_one - only_other) / math.sqrt(max(only_one + only_other, 1))


@torch.inference_mode()
def _accept_along(
    model: Transformer, rows: Sequence[Tensor], on_event: Callable[[Event], None]
) -> tuple[Acceptance, ...]:
    copies = {reading: _reading_copy(model, reading) for reading in READINGS}
    hidden = [hidden_states(model, tokens_BW) for tokens_BW in rows]
    chosen = [
        _told(model.head, hidden_BWD.flatten(0, 1), tokens_BW.flatten())[0].view(tokens_BW.shape)
        for hidden_BWD, tokens_BW in zip(hidden, rows, strict=True)
    ]
    modules, total = [], len(model.mtp) * len(READINGS)
    for depth in range(len(model.mtp)):
        hits, right, losses, made = {}, {}, {}, {}
        sought_T, last_T = (torch.cat([ids_BW[:, depth + 1 :].flatten() for ids_BW in each]) for each in (chosen, rows))
        labels_T = torch.cat([F.pad(tokens_BW[:, depth + 2 :], (0, 1), value=NO_LABEL).flatten() for tokens_BW in rows])
        for done, (reading, copied) in enumerate(copies.items(), depth * len(READINGS)):
            on_event(Phase("drafting", done, total, "readings"))
            made[reading] = [_draft(copied, depth, *pair) for pair in zip(hidden, rows, strict=True)]
            made_TD = torch.cat([made_BWD.flatten(0, 1) for made_BWD in made[reading]])
            drafted_T, nats_T = _told(partial(copied.draft_head, depth), made_TD, labels_T)
            hits[reading], right[reading] = drafted_T == sought_T, int((drafted_T == labels_T).sum())
            losses[reading] = nats_T[labels_T != NO_LABEL]
        guessed = max(int(torch.bincount(sought_T).max()), int((sought_T == last_T).sum()))
        modules.append(Acceptance(len(sought_T), hits, right, losses, guessed))
        hidden = made[modules[-1].best()]
    on_event(Phase("drafting", total, total, "readings"))
    return tuple(modules)


def _reading_copy(model: Transformer, reading: Reading) -> Transformer:
    copied = variant(model, mtp_hidden=reading.hidden)
    if reading.swapped:
        half = model.config.hidden_size
        for module in copied.mtp:
            assert isinstance(module, MTPModule)
            # Exchanging the halves of the input is exchanging those of the matrix.
            module.eh_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].roll(half, dims=-1),))
    return copied


def _draft(model: Transformer, depth: int, hidden_BWD: Tensor, tokens_BW: Tensor) -> Tensor:
    """What module `depth` makes of the states of the step before, [B, W - depth - 1, D]."""
    next_BW = tokens_BW[:, depth + 1 :]
    hidden_TD = hidden_BWD[:, : next_BW.shape[1]].flatten(0, 1)
    made_TD: Tensor = model.draft(depth, hidden_TD, next_BW.flatten(), *layout(next_BW))[0]
    return made_TD.view(*next_BW.shape, -1)


def _told(head: Callable[[Tensor], Tensor], hidden_TD: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token after each state, and -log p of each label (0 where there is none), both [T]."""
    ids, losses = [], []
    for some_TD, some_T in zip(hidden_TD.split(LOGITS_AT_ONCE), labels_T.split(LOGITS_AT_ONCE), strict=True):
        logits_TV = head(some_TD)
        ids.append(logits_TV.argmax(dim=-1))
        losses.append(F.cross_entropy(logits_TV, some_T, reduction="none", ignore_index=NO_LABEL))
    return torch.cat(ids), torch.cat(losses)


def _judge(modules: tuple[Acceptance, ...], configured: MtpHidden) -> Settlement:
    """Order by module, hidden state by all of them together: the configuration has one flag for the chain."""
    untrained = [k for k, module in enumerate(modules) if not module.beats_guessing(module.best())]
    if untrained:
        return Settlement("untrained", None, modules, (_looks_untrained(modules, untrained[0]),))
    trained = passed("mtp-trained", f"MTP drafts are accepted {_shares(modules)}.", 8, **_numbers(modules))
    swapped = [k for k, module in enumerate(modules) if _is_swapped(module)]
    if swapped:
        return Settlement("swapped order", None, modules, (trained, _order_is_swapped(modules, swapped[0])))
    order = passed("mtp-order", "eh_proj reads [embedding ; hidden], as in released checkpoints.", 6)
    better, hidden = _settle_hidden(modules, configured)
    return Settlement(better or "undecided", better, modules, (trained, order, hidden))


def _settle_hidden(modules: Sequence[Acceptance], configured: MtpHidden) -> tuple[MtpHidden | None, Finding]:
    """By acceptance, which is what it is for; where that is too close, by the loss that the modules were trained on."""
    post, pre = READINGS[:2]
    drafts = sum(module.drafts for module in modules)
    shares = {r.hidden: sum(module.accepted(r) for module in modules) / drafts for r in (post, pre)}
    hits_z = sign_test(*(torch.cat([module.hits[reading] for module in modules]) for reading in (post, pre)))
    saved, nats_z = mean_and_z(torch.cat([module.nats[pre] - module.nats[post] for module in modules]))
    accepted_apart = abs(hits_z) > CLEAR and abs(shares["post_norm"] - shares["pre_norm"]) > NOTICEABLE
    z = hits_z if accepted_apart else nats_z if abs(saved) > TINY else 0.0
    better: MtpHidden | None = None if abs(z) <= CLEAR else post.hidden if z > 0 else pre.hidden
    told = (
        f"{shares['post_norm']:.1%} of {drafts:,} drafts are accepted after the norm, {shares['pre_norm']:.1%} before"
    )
    if not accepted_apart:
        told += f", and before it the text takes {saved:+.4f} nats a token"
    value = {"acceptance": shares, "drafts": drafts, "hits_z": hits_z, "nats": saved, "nats_z": nats_z}
    if better is None:
        said, say = "Whether MTP is fed after or before the norm makes too little difference to tell", passed
    elif better == configured:
        said, say = f"MTP is fed as it was trained, {better}", passed
    else:
        said, say = f"MTP was trained on {better}, but mtp_hidden is {configured}", failed if accepted_apart else warned
        told += "; doctor's --store sets it"
    return better, say("mtp-hidden", f"{said}: {told}.", 6, configured=configured, better=better, **value)


def _is_swapped(module: Acceptance) -> bool:
    theirs, ours = module.best(swapped=True), module.best(swapped=False)
    noticeable = module.share(theirs) - module.share(ours) > NOTICEABLE
    return noticeable and sign_test(module.hits[theirs], module.hits[ours]) > CLEAR


def _order_is_swapped(modules: Sequence[Acceptance], k: int) -> Finding:
    module = modules[k]
    theirs, ours = module.best(swapped=True), module.best(swapped=False)
    return failed(
        "mtp-order",
        f"MTP module {k + 1} reads [hidden ; embedding], the report's order and not that of released checkpoints: "
        f"with the halves of eh_proj swapped {module.share(theirs):.1%} of {module.drafts:,} drafts are accepted, "
        f"as it stands {module.share(ours):.1%}. Exchange the halves of its eh_proj.weight.",
        6,
        **_numbers(modules),
    )


def _looks_untrained(modules: Sequence[Acceptance], k: int) -> Finding:
    module = modules[k]
    return failed(
        "mtp-trained",
        f"MTP module {k + 1} looks untrained: at best {module.share(module.best()):.1%} of {module.drafts:,} drafts "
        f"are accepted, a guess without it reaches {module.guessed / module.drafts:.1%}. "
        "Take the module from the original checkpoint, or leave it out (--without-mtp).",
        8,
        **_numbers(modules),
    )


def _not_tested(why: str) -> Settlement:
    return Settlement("not tested", None, (), (passed("mtp-hidden", f"MTP's input was not tested: {why}.", 6),))


def _shares(modules: Sequence[Acceptance]) -> str:
    each = [f"{module.share(module.best()):.1%}" for module in modules]
    return f"to {each[0]}" if len(each) == 1 else f"to {', '.join(each)} by the modules in turn"


def _numbers(modules: Sequence[Acceptance]) -> dict[str, object]:
    return {
        "modules": [
            {
                "drafts": module.drafts,
                "accepted": {str(reading): module.accepted(reading) for reading in READINGS},
                "right": {str(reading): module.right[reading] for reading in READINGS},
                "guessed": module.guessed,
            }
            for module in modules
        ]
    }
