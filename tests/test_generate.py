"""Streams of tokens and text: ends, limits, mistakes, stop strings, statistics, and turning speculation off."""

import codecs
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.run import generate
from cavelight.run.generate import TRIED, TokenStream, generate_tokens
from cavelight.run.sample import Sampling
from cavelight.run.stats import RECENT, WINDOW, Stats
from cavelight.run.text import StopStrings, TextStream, generate_text

from .run_models import TableModel, drafting_model, random_model, small_config

CONFIG = small_config()
MODEL = drafting_model(CONFIG, surprise=0.3)
PROMPT = [5, 9, 2]


class Bytes:
    """Token ids are bytes; as an encoder and as a decoder that never gives half a character."""

    def __init__(self) -> None:
        self.inner = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def push(self, token_id: int) -> str:
        return self.inner.decode(bytes([token_id]))

    def flush(self) -> str:
        return self.inner.decode(b"", final=True)


def parrot(text: str, period: int = 16) -> Transformer:
    """A model that writes this text, whose characters must have different bytes, over and over again."""
    data = text.encode()
    assert len(set(data)) == len(data)
    model = random_model(small_config(vocab_size=256, hidden_size=256, num_nextn_predict_layers=0, bos_token_id=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(256))
        model.lm_head.weight.zero_()
        for here, there in zip(data, data[1:] + data[:1], strict=True):
            model.lm_head.weight[there, here] = 1
    return model


# Ends


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_end_token_is_the_last(drafts: int) -> None:
    free = generate_tokens(MODEL, PROMPT, 20, drafts=drafts)
    assert len(free) == 20
    end = free[7]
    first = free.index(end)
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=20, stop_ids=[end], drafts=drafts)
    assert list(stream) == free[: first + 1]
    assert stream.stats.finish == "end token" and stream.stats.new_tokens == first + 1


def test_the_end_tokens_are_the_configurations_unless_given() -> None:
    free = generate_tokens(MODEL, PROMPT, 12)
    for eos in (free[4], [free[4], 1]):
        model = drafting_model(small_config(eos_token_id=eos), surprise=0.3)
        assert generate_tokens(model, PROMPT, 12) == free[: free.index(free[4]) + 1]
        assert generate_tokens(model, PROMPT, 12, stop_ids=[]) == free


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("drafts", [0, 4])
def test_there_are_as_many_tokens_as_asked_for(count: int, drafts: int) -> None:
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=count, drafts=drafts)
    assert len(list(stream)) == stream.stats.new_tokens == count
    assert stream.stats.finish == "limit of new tokens"


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_full_context_ends_it(drafts: int) -> None:
    model = drafting_model(small_config(max_position_embeddings=16), surprise=0.3)
    whole = generate_tokens(drafting_model(small_config(), surprise=0.3), PROMPT, 14, drafts=drafts)
    stream = TokenStream(model, PROMPT, max_new_tokens=50, drafts=drafts)
    assert list(stream) == whole, "positions 0 to 15 make tokens 1 to 16"
    assert stream.stats.finish == "context's limit of 16 tokens"
    full = TokenStream(model, list(range(16)), max_new_tokens=50, drafts=drafts)
    assert len(list(full)) == 1 and full.stats.finish == "context's limit of 16 tokens"


# Mistakes


def test_a_prompt_longer_than_the_context_is_refused_in_numbers() -> None:
    model = random_model(small_config(max_position_embeddings=16))
    with pytest.raises(UserError, match=r"17 tokens.*at most 16.*at least 1 token"):
        generate_tokens(model, [1] * 17)


def test_a_prompt_may_be_a_tensor_and_an_empty_one_is_the_begin_token() -> None:
    assert generate_tokens(MODEL, torch.tensor(PROMPT), 5) == generate_tokens(MODEL, PROMPT, 5)
    assert generate_tokens(MODEL, [], 5) == generate_tokens(MODEL, [CONFIG.bos_token_id], 5)
    with pytest.raises(UserError, match="empty"):
        generate_tokens(random_model(small_config(bos_token_id=None)), [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"drafts": -1}, "Got: -1"),
        ({"drafts": "many"}, "Got: 'many'"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TokenStream(MODEL, PROMPT, **options)


@pytest.mark.parametrize("unknown", [48, -1])
def test_unknown_ids_are_refused(unknown: int) -> None:
    with pytest.raises(UserError, match=rf"{unknown}.*0 to 47"):
        generate_tokens(MODEL, [1, unknown])


def test_drafts_need_modules() -> None:
    model = random_model(small_config(num_nextn_predict_layers=0))
    with pytest.raises(UserError, match="no MTP module"):
        generate_tokens(model, PROMPT, drafts=2)
    with pytest.raises(UserError, match="negative"):
        generate_tokens(MODEL, PROMPT, drafts=-1)
    stream = TokenStream(model, PROMPT, max_new_tokens=3)
    assert len(list(stream)) == 3
    assert stream.stats.report().endswith("No speculation: the model has no MTP module.")


@pytest.mark.parametrize("where", ["lm_head.weight", "model.layers.1.self_attn.o_proj.weight", "mtp.0.eh_proj.weight"])
def test_nan_in_the_weights_is_said(where: str) -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        model.get_parameter(where)[3, 3] = math.nan
    with pytest.raises(UserError, match="produced NaN"):
        generate_tokens(model, PROMPT)


# Turning speculation off


class Machine:
    """A clock on which each pass of the trunk and of a module takes a given time, whatever the time is."""

    def __init__(self, model: Transformer, module_seconds: float) -> None:
        self.now = 0.0
        self.hooks = [model.model.register_forward_hook(self.takes(1.0))]
        self.hooks += [module.register_forward_hook(self.takes(module_seconds)) for module in model.mtp]

    def takes(self, seconds: float) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.now += seconds

        return hook

    def __call__(self) -> float:
        return self.now


def on_machine(model: Transformer, module_seconds: float, tokens: int, **options: object) -> tuple[list[int], Stats]:
    machine = Machine(model, module_seconds)
    stream = TokenStream(model, PROMPT, max_new_tokens=tokens, clock=machine, **options)
    made = list(stream)
    for hook in machine.hooks:
        hook.remove()
    return made, stream.stats


def test_drafts_that_do_not_pay_are_turned_off_and_it_says_so() -> None:
    plain, _ = on_machine(MODEL, 9.0, 60, drafts=0)
    # One draft gives two tokens at most: ten steps' time is too much for any draft, 1.95 for most.
    for seconds, rounds in ((9.0, TRIED), (0.95, WINDOW)):
        made, stats = on_machine(MODEL, seconds, 60)
        assert made == plain and len(stats.round_tokens) == rounds
        assert stats.off and stats.off.startswith(f"after {rounds} rounds")
        assert f"{1 + seconds:.2f} plain steps" in stats.off and stats.off in stats.report()
        assert stats.gain == pytest.approx(stats.tokens_per_round / (1 + seconds))


def test_drafts_that_pay_stay_on_and_so_do_those_that_were_asked_for() -> None:
    _, stats = on_machine(MODEL, 0.01, 60)
    assert stats.off is None and len(stats.round_tokens) > WINDOW
    assert stats.gain == pytest.approx(stats.tokens_per_round / 1.01)
    _, stats = on_machine(MODEL, 9.0, 60, drafts=1)
    assert stats.off is None and len(stats.round_tokens) > WINDOW


def test_plain_steps_are_timed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PERIOD", 8)
    _, stats = on_machine(MODEL, 0.01, 50)
    steps = len(stats.round_tokens) + len(stats.plain_seconds)
    timed = len(generate.TIMED_STEPS) + steps // 8
    assert timed > 4 and len(stats.plain_seconds) in (timed, timed + 1), "the last token may leave no room for a draft"
    assert stats.new_tokens == 1 + sum(stats.round_tokens) + len(stats.plain_seconds)


@pytest.mark.parametrize("natively", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_clock_decides_what_a_seed_says(dtype: torch.dtype, natively: bool, request: pytest.FixtureRequest) -> None:
    """Nor what is written in bfloat16, where near-ties may fall either way. Natively it may turn drafts off, though."""
    if not natively:
        request.getfixturevalue("plainly")
    sampling = Sampling() if dtype == torch.bfloat16 else Sampling(temperature=1.5, seed=7)
    model = random_model(small_config(num_hidden_layers=1, first_k_dense_replace=1), dtype=dtype)
    texts, offs = [], []
    for seed in range(3):
        stream = TokenStream(model, PROMPT, max_new_tokens=45, sampling=sampling, clock=random.Random(seed).random)
        texts.append(list(stream))
        offs.append(stream.stats.off)
    assert texts[0] == texts[1] == texts[2]
    assert natively or (offs[0] is not None and offs[0] == offs[1] == offs[2])


# Statistics


def test_it_is_the_last_rounds_and_steps_that_are_judged() -> None:
    """Drafts that were good once, or steps that were quick while the context was short, say little about now."""
    stats = Stats(prompt_tokens=1, round_tokens=[4] * 100 + [1] * WINDOW)
    assert (
        not stats.judge(1.5)
        and stats.off == "after 116 rounds: 1.00 tokens a round, which costs as much as 1.50 plain steps"
    )
    stats.plain_seconds, stats.round_seconds = [1.0] * 9 + [4.0] * RECENT, [2.0] * 9 + [8.0] * WINDOW
    assert stats.measured_cost() == 2


def test_no_more_drafts_are_made_than_may_be_kept() -> None:
    stream, most = TokenStream(MODEL, PROMPT, max_new_tokens=9, drafts=3), 0
    for _ in stream:
        assert len(stream.drafts) <= max(0, 9 - stream.stats.new_tokens - 1)
        most = max(most, len(stream.drafts))
    assert most == 3


def test_statistics_add_up() -> None:
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=40, drafts=3)
    made = list(stream)
    stats = stream.stats
    assert stats.new_tokens == len(made) == 40
    assert len(stats.proposed) == 3 and stats.proposed[0] == len(stats.round_tokens)
    assert sum(stats.accepted) == sum(stats.round_tokens) - len(stats.round_tokens)
    assert all(a <= p for a, p in zip(stats.accepted, stats.proposed, strict=True))
    assert stats.accepted == sorted(stats.accepted, reverse=True)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(39 / stats.decode_seconds)
    assert json.loads(json.dumps(stats.as_dict()))["rounds"] == len(stats.round_tokens)


@pytest.mark.usefixtures("plainly")
def test_what_native_layers_lack_is_said() -> None:
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=3)
    list(stream)
    assert stream.stats.as_dict()["without_native"] == "a test is without"
    assert stream.stats.report().splitlines()[2] == "Without native layers: a test is without."


def test_native_layers_need_no_word() -> None:
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=3)
    list(stream)
    assert stream.stats.as_dict()["without_native"] is None and len(stream.stats.report().splitlines()) == 2
    double = TokenStream(random_model(small_config()).double(), PROMPT, max_new_tokens=3)
    assert double.stats.without_native == "they do not compute all parts of a model like this one"


def test_the_report_is_two_lines() -> None:
    stats = Stats(prompt_tokens=7, new_tokens=9, prefill_seconds=0.5, decode_seconds=2.0, finish="end token")
    assert stats.report().splitlines() == [
        "9 tokens, 4.0 a second, after a prompt of 7 in 0.50 s; ended by the end token.",
        "No speculation.",
    ]
    stats.plain_seconds = [0.4, 0.2, 0.3]
    for tokens in (1, 3, 2, 2):
        stats.add_round([1, 2], [*[1, 2][: tokens - 1], 9], 0.5)
    assert (stats.proposed, stats.accepted) == ([4, 4], [3, 1])
    assert stats.report().splitlines()[1] == (
        "Drafts accepted: 1st 75%, 2nd 25%; 2.00 tokens a round, 1.20 times as fast as plain decoding."
    )


def test_what_was_cancelled_was_ended_by_nothing() -> None:
    stream = TokenStream(MODEL, PROMPT, max_new_tokens=3)
    next(stream)
    stream.cancel()
    assert list(stream) == [] and stream.stats.report().splitlines()[0].endswith(" s; cancelled.")
    ended = TokenStream(MODEL, PROMPT, max_new_tokens=3)
    list(ended)
    ended.cancel()
    assert ended.stats.finish == "limit of new tokens"


# Text


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_a_stop_string_is_found_wherever_the_pieces_are_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    filter_ = StopStrings(stops)
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    shown = "".join(filter_.push(text[a:b]) for a, b in itertools.pairwise(bounds)) + filter_.flush()
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if complete:
        hit = max((stop for stop in stops if text[: complete[0]].endswith(stop)), key=len)
        assert (shown, filter_.hit) == (text[: complete[0] - len(hit)], hit)
    else:
        assert (shown, filter_.hit) == (text, None)


def test_nothing_is_held_back_that_cannot_become_a_stop_string() -> None:
    stops = StopStrings(["\n\n", "END"])
    assert [stops.push(piece) for piece in ("a\n", "b", "EN", "C", "E")] == ["a", "\nb", "", "ENC", ""]
    assert stops.flush() == "E"
    with pytest.raises(UserError, match="empty"):
        StopStrings(["x", ""])
    with pytest.raises(UserError, match="in a list"):
        StopStrings("END")


def written(model: Transformer, prompt: str | Sequence[int], **options: object) -> tuple[list[str], TextStream]:
    stream = generate_text(model, Bytes(), Bytes(), prompt, **options)
    return list(stream), stream


def test_text_comes_in_whole_characters() -> None:
    model = parrot("aé€😀z")
    pieces, stream = written(model, "a", max_new_tokens=11)
    assert pieces == ["é", "€", "😀", "z", "a"]
    assert stream.stats.new_tokens == 11
    cut, _ = written(model, "a", max_new_tokens=4)
    assert "".join(cut) == "é�", "a character that never became whole is shown as such"


def test_text_ends_before_a_stop_string_that_spans_tokens() -> None:
    pieces, stream = written(parrot("abcdefgh"), "a", stop=["zz", "def"])
    assert "".join(pieces) == "bc"
    assert stream.stats.finish == "stop string 'def'"
    whole, _ = written(parrot("abcdefgh"), "a", stop=["dex"], max_new_tokens=6)
    assert "".join(whole) == "bcdefg"


def test_the_end_token_is_not_in_the_text() -> None:
    pieces, stream = written(parrot("abcdefgh"), "a", stop_ids=[ord("e")], stop=["dx"])
    assert "".join(pieces) == "bcd"
    assert stream.stats.finish == "end token"


def test_a_prompt_in_words_begins_a_document_and_ids_are_taken_as_they_are() -> None:
    model = parrot("abcdefgh")
    assert generate_text(model, Bytes(), Bytes(), "ab").stats.prompt_tokens == 3
    assert generate_text(model, Bytes(), Bytes(), b"ab").stats.prompt_tokens == 2
    assert generate_text(model, Bytes(), Bytes(), "").stats.prompt_tokens == 1


def test_a_stream_gives_tokens_as_they_are_made() -> None:
    model = TableModel(3, 1)
    stream = TokenStream(model, [0], max_new_tokens=8, drafts=0)
    first = next(stream)
    assert stream.stats.new_tokens == 1 and stream.tokens == [0, first]
