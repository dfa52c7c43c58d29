"""Which hidden state and order an MTP module was trained for, found by its drafts on a text.

One model is trained, after the norm and in the released order. The others are made from it by exchanges that are exact:
where a checkpoint says otherwise, its weights were moved so that they are right for what it should have said.

Letters: T tokens, D hidden size.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cavelight.doctor.mtp import READINGS, Settlement, settle_mtp, sign_test
from cavelight.doctor.variants import hidden_states, layout, variant, windows
from cavelight.model.transformer import Transformer
from cavelight.spec.events import Event, Phase
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

from .run_models import random_model
from .trained import ROW, learner, text, trained

TEXT = text(3000, seed=99)
POST, PRE, SWAPPED = READINGS[:3]


def learnt() -> Transformer:
    return trained(learner(num_nextn_predict_layers=1))


def for_pre_norm(model: Transformer) -> Transformer:
    """The same drafts from the state before the norm: its weight is moved into the norm that follows."""
    moved = copy.deepcopy(model)
    moved.mtp[0].hnorm.weight.mul_(model.model.norm.weight)
    return variant(moved, mtp_hidden="pre_norm")


def test_a_text_that_repeats_itself_settles_nothing() -> None:
    """Its few drafts would count often, and the sign test would be sure of them."""
    settled = settle_mtp(learnt(), TEXT[:300].repeat(8))
    assert (settled.verdict, settled.mtp_hidden) == ("not tested", None)
    assert "repeats itself" in settled.findings[0].sentence


def with_halves_exchanged(model: Transformer) -> Transformer:
    changed = copy.deepcopy(model)
    matrix = changed.mtp[0].eh_proj.weight
    matrix.copy_(matrix.roll(model.config.hidden_size, dims=1))
    return changed


def verdicts(settlement: Settlement) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in settlement.findings}


def test_a_module_fed_as_trained_is_left_alone() -> None:
    settled = settle_mtp(learnt(), TEXT)
    assert (settled.verdict, settled.mtp_hidden) == ("post_norm", "post_norm")
    assert verdicts(settled) == {"mtp-trained": "pass", "mtp-order": "pass", "mtp-hidden": "pass"}
    (module,) = settled.modules
    assert module.drafts == sum(row.numel() - len(row) for row in windows(TEXT, ROW, 8192))
    assert module.share(POST) > 0.7 > 4 * module.share(SWAPPED)
    assert module.guessed < 0.3 * module.drafts


def test_acceptance_is_what_speculation_would_accept() -> None:
    """Row by row: the module's likeliest token against the trunk's own choice one place on, given the same text."""
    model = learnt()
    settled = settle_mtp(model, TEXT[: 8 * ROW])
    hits = []
    for tokens_W in TEXT[: 2 * ROW].split(ROW):
        chosen_W = model.logits(tokens_W).argmax(-1)
        for i in range(ROW - 1):
            hits.append(bool(draft_after(model, tokens_W[: i + 2]) == chosen_W[i + 1]))
    assert settled.modules[0].hits[POST][: len(hits)].tolist() == hits


def draft_after(model: Transformer, tokens_T: Tensor) -> Tensor:
    """What comes after `tokens_T` by the module, which has the trunk's state of all but the last of them."""
    hidden_TD = hidden_states(model, tokens_T[None, :-1])[0]
    made_TD, _ = model.draft(0, hidden_TD, tokens_T[1:], *layout(tokens_T[None, 1:]))
    return model.draft_head(0, made_TD)[-1].argmax()


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
def test_a_wrong_hidden_state_is_found(hidden: str) -> None:
    right = {"post_norm": learnt(), "pre_norm": for_pre_norm(learnt())}
    other = {"post_norm": "pre_norm", "pre_norm": "post_norm"}[hidden]
    assert settle_mtp(right[hidden], TEXT).mtp_hidden == hidden
    settled = settle_mtp(variant(right[hidden], mtp_hidden=other), TEXT)
    assert settled.mtp_hidden == hidden
    found = settled.findings[-1]
    assert (found.check, found.trap) == ("mtp-hidden", 6)
    assert found.verdict in ("warn", "fail")  # warn where the drafts are accepted nearly as often all the same
    assert (found.value["better"], found.value["configured"]) == (hidden, other)
    assert f"MTP was trained on {hidden}, but mtp_hidden is {other}" in found.sentence


def test_a_wrong_hidden_state_that_costs_drafts_fails() -> None:
    """With a final norm that silences half of the channels after the norm and not before."""
    model = copy.deepcopy(learnt())
    scale_D = torch.where(torch.arange(model.config.hidden_size) % 2 == 0, 0.02, 1.0)
    model.model.norm.weight.mul_(scale_D)
    model.lm_head.weight.div_(scale_D)
    model.mtp[0].norm.weight.mul_(scale_D)
    model.mtp[0].hnorm.weight.div_(scale_D)
    settled = settle_mtp(variant(model, mtp_hidden="pre_norm"), TEXT)
    assert (settled.verdict, verdicts(settled)["mtp-hidden"]) == ("post_norm", "fail")


def test_a_norm_of_ones_leaves_nothing_to_decide() -> None:
    model = copy.deepcopy(learnt())
    weight_D = model.model.norm.weight.clone()
    model.lm_head.weight.mul_(weight_D)
    model.mtp[0].hnorm.weight.mul_(weight_D)
    model.mtp[0].norm.weight.div_(weight_D)
    model.model.norm.weight.fill_(1.0)
    settled = settle_mtp(model, TEXT)
    assert (settled.verdict, settled.mtp_hidden, verdicts(settled)["mtp-hidden"]) == ("undecided", None, "pass")
    assert settled.modules[0].share(POST) > 0.7


def test_the_papers_order_is_found() -> None:
    settled = settle_mtp(with_halves_exchanged(learnt()), TEXT)
    assert (settled.verdict, settled.mtp_hidden) == ("swapped order", None)
    assert verdicts(settled) == {"mtp-trained": "pass", "mtp-order": "fail"}
    assert settled.findings[-1].trap == 6
    assert "Exchange the halves" in settled.findings[-1].sentence
    assert settled.modules[0].share(SWAPPED) > 0.7


def test_an_untrained_module_is_found() -> None:
    model = copy.deepcopy(learnt())
    fresh = random_model(model.config, seed=5)
    model.mtp = fresh.mtp
    settled = settle_mtp(model, TEXT)
    assert (settled.verdict, settled.mtp_hidden, verdicts(settled)) == ("untrained", None, {"mtp-trained": "fail"})
    assert "MTP module 1 looks untrained" in settled.findings[0].sentence


def test_of_a_chain_the_module_at_fault_is_named() -> None:
    config = learner(num_nextn_predict_layers=2)
    first = learnt()
    model = random_model(config, seed=6)
    model.load_state_dict(first.state_dict(), strict=False)
    settled = settle_mtp(model, TEXT)
    assert (settled.verdict, len(settled.modules)) == ("untrained", 2)
    assert settled.modules[0].hits[POST].float().mean() > 0.7
    assert [len(module.hits[POST]) for module in settled.modules] == [module.drafts for module in settled.modules]
    assert "MTP module 2 looks untrained" in settled.findings[0].sentence


def test_a_model_that_knows_nothing_is_not_judged() -> None:
    settled = settle_mtp(random_model(learner(num_nextn_predict_layers=1)), TEXT)
    assert (settled.verdict, verdicts(settled)) == ("not tested", {"mtp-hidden": "pass"})
    assert "no better than chance" in settled.findings[0].sentence


def test_a_few_tokens_or_no_module_are_not_judged() -> None:
    assert "only 40 tokens" in settle_mtp(learnt(), TEXT[:40]).findings[0].sentence
    assert settle_mtp(trained_without_mtp(), TEXT) == Settlement("not tested", None, (), ())


def trained_without_mtp() -> Transformer:
    return random_model(learner())


def test_progress_is_told() -> None:
    events: list[Event] = []
    settle_mtp(learnt(), TEXT[:500], events.append)
    phases = [event for event in events if isinstance(event, Phase)]
    assert [(phase.done, phase.total) for phase in phases] == [(done, 4) for done in range(5)]


def test_sign_test_counts_what_only_one_has() -> None:
    one, other = torch.tensor([1, 1, 1, 1, 0, 1, 0]).bool(), torch.tensor([1, 0, 0, 0, 1, 0, 0]).bool()
    assert sign_test(one, other) == pytest.approx((4 - 1) / 5**0.5)
    assert sign_test(one, one) == 0


def test_a_settlement_holds_after_a_round_trip(tmp_path: Path) -> None:
    """What config.json says is read back as configured."""
    write_checkpoint(for_pre_norm(learnt()), tmp_path / "model")
    settled = settle_mtp(read_checkpoint(tmp_path / "model"), TEXT)
    assert (settled.mtp_hidden, verdicts(settled)["mtp-hidden"]) == ("pre_norm", "pass")
