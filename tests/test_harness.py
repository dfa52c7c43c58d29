"""lm-evaluation-harness on models of ours: scores against the model's own logits, and tasks from file to table."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cavelight.cli import tasks as command
from cavelight.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from cavelight.errors import UserError
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.run.sample import Sampling
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Phase
from cavelight.train.workers import Workers
from cavelight.weights.snapshot import write_checkpoint

from .reference.tiny import V2, tiny

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from cavelight import harness
from cavelight.harness import CavelightLM, Fork, ForkedAttend, batches_of, forks_of, generation_of

WORDS = ("The sky is blue. ", "Grass is green, and the sky is not. ", "What is red? ", "Ünïcödé ", "is it? ") * 20
VOCABULARY = len(SPECIAL_TOKENS) + 256 + 24
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green, and not red"),
    ("Grass is", " blue"),
    ("The sky is", " blue"),
    ("", "Grass"),
    ("What is ", "red?"),  # the space belongs to what follows
    ("x", "y"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, VOCABULARY)


def filled(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + (parameter.ndim == 1))
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Transformer:
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_nextn_predict_layers": 1}
    return filled(tiny(**changes) if request.param == "v3" else tiny(V2, **(changes | {"bos_token_id": None})))


def asked(*pairs: Any) -> list[SimpleNamespace]:
    """As lm-eval hands requests over."""
    return [SimpleNamespace(args=pair) for pair in pairs]


def expected(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the model's plain logits over the whole text."""
    logits_TV = model.logits(torch.tensor(context + continuation))
    predicted = logits_TV[len(context) - 1 : -1]
    log_p = predicted.log_softmax(-1)[range(len(continuation)), continuation]
    return float(log_p.sum()), predicted.argmax(-1).tolist() == continuation


def cut(lm: CavelightLM, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    bos = [] if lm.model.config.bos_token_id is None else [tokenizer.bos_id]
    if not context:
        return bos or [tokenizer.eos_id], tokenizer.encode(continuation)
    stem = context.rstrip()
    whole, head = bos + tokenizer.encode(context + continuation), bos + tokenizer.encode(stem)
    return head, whole[len(head) :]


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_are_those_of_the_models_logits(model: Transformer, tokenizer: Tokenizer, workers: int) -> None:
    seen: list[Any] = []
    lm = CavelightLM(model, tokenizer, seen.append, Workers(workers))
    answers = lm.loglikelihood(asked(*PAIRS))
    for answer, pair in zip(answers, PAIRS, strict=True):
        log_p, greedy = expected(model, *cut(lm, tokenizer, *pair))
        assert answer == (pytest.approx(log_p, abs=1e-3), greedy)
    assert answers[0] == answers[3] != answers[1]
    assert seen[-1] == Phase("scoring", len(PAIRS), len(PAIRS), "requests")


def test_the_greedy_continuation_is_known_as_such(model: Transformer, tokenizer: Tokenizer) -> None:
    lm, context = CavelightLM(model, tokenizer), tokenizer.encode("The sky")
    ids = list(context)
    for _ in range(3):
        ids.append(int(model.logits(torch.tensor(ids))[-1].argmax()))
    other = [*ids[len(context) : -1], (ids[-1] + 1) % VOCABULARY]
    answers = lm._loglikelihood_tokens([(("", ""), context, ids[len(context) :]), (("", ""), context, other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_few_tokens_at_once_give_the_same(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = CavelightLM(model, tokenizer)
    whole = lm.loglikelihood(asked(*PAIRS))
    monkeypatch.setattr(harness, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", 2)
    for one, many in zip(lm.loglikelihood(asked(*PAIRS)), whole, strict=True):
        assert one == (pytest.approx(many[0], abs=1e-3), many[1])


def test_what_choices_share_is_read_once(model: Transformer, tokenizer: Tokenizer) -> None:
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(len(inputs[0])))
    context = list(range(8, 40))
    requests = [(("", ""), context, [choice]) for choice in range(4)]
    CavelightLM(model, tokenizer)._loglikelihood_tokens(requests)
    hook.remove()
    assert lengths == [len(context)]  # four choices of one token cost what the question costs


def test_a_fork_sees_what_whole_texts_see(model: Transformer) -> None:
    lengths = [(5, 0, 3, 7), (1, 2), (4,)]
    tokens_T = torch.arange(8, 8 + sum(map(sum, lengths)))
    positions = [
        first + i
        for fork in lengths
        for n, size in enumerate(fork)
        for first in [fork[0] if n else 0]
        for i in range(size)
    ]
    hidden_TD, _ = model(tokens_T, torch.tensor(positions), ForkedAttend(lengths), GroupedDispatch())
    start = 0
    for context, *branches in lengths:
        shared, at = tokens_T[start : start + context], start + context
        for branch in branches:
            whole = torch.cat([shared, tokens_T[at : at + branch]])
            alone, _ = model(whole, torch.arange(len(whole)), PackedAttend([len(whole)]), GroupedDispatch())
            ours = torch.cat([hidden_TD[start : start + context], hidden_TD[at : at + branch]])
            torch.testing.assert_close(ours, alone, rtol=0, atol=2e-3)
            at += branch
        start = at


def test_long_contexts_lose_their_beginning() -> None:
    context, continuation = tuple(range(100)), (7, 8, 9)
    (fork,) = forks_of([(context, continuation)], max_length=10)
    assert fork == Fork(tuple(range(92, 100)), ((7, 8, 9),), (0,))  # 8 and the first 2 of 3: the last is not read
    assert sum(fork.lengths) == 10
    with pytest.raises(UserError, match="longer than the model's context"):
        forks_of([((1,), tuple(range(11)))], max_length=10)
    longest = forks_of([((1, 2), tuple(range(10)))], max_length=10)
    assert longest[0].context == (2,)


def test_batches_keep_forks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TOKENS_AT_ONCE", 10)
    forks = forks_of([((n,) * size, (1,)) for n, size in enumerate((4, 4, 4, 30, 1))], max_length=64)
    assert [[len(fork.context) for fork in batch] for batch in batches_of(forks)] == [[4, 4], [4], [30], [1]]
    assert list(batches_of([])) == []


def test_a_fork_with_too_many_branches_is_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts without a context fork from the begin token: together they could fill any memory."""
    monkeypatch.setattr(harness, "TOKENS_AT_ONCE", 10)
    pairs = [((1, 2, 3), (7,) * size) for size in (5, 5, 20, 2, 1, 1)]
    batches = list(batches_of(forks_of(pairs, max_length=64)))
    assert [[fork.numbers for fork in batch] for batch in batches] == [[(0, 1)], [(2,)], [(3, 4, 5)]]
    assert all(fork.context == (1, 2, 3) for batch in batches for fork in batch)
    parted = {
        number: continuation
        for batch in batches
        for fork in batch
        for number, continuation in zip(fork.numbers, fork.continuations, strict=True)
    }
    assert [parted[number] for number in range(len(pairs))] == [continuation for _, continuation in pairs]


@pytest.mark.parametrize("words", [1, 3, 30])
def test_rolling_scores_take_every_token_once(model: Transformer, tokenizer: Tokenizer, words: int) -> None:
    lm, text = CavelightLM(model, tokenizer), "".join(WORDS[:words])
    ids, limit = tokenizer.encode(text), model.config.max_position_embeddings
    total, first = 0.0, ids[:limit]
    total += expected(model, [lm.prefix_token_id], first)[0]
    for end in range(2 * limit, len(ids) + limit, limit):
        end = min(end, len(ids))
        new = (end - limit) % limit or limit
        window = ids[end - limit - 1 : end]
        total += expected(model, window[: len(window) - new], window[len(window) - new :])[0]
    assert (len(ids) > limit) == (words == 30)
    assert lm.loglikelihood_rolling(asked((text,), ("",))) == [pytest.approx(total, rel=1e-5), 0.0]


def greedy_text(model: Transformer, tokenizer: Tokenizer, ids: list[int], count: int) -> str:
    new: list[int] = []
    for _ in range(count):
        new.append(int(model.logits(torch.tensor(ids + new))[-1].argmax()))
        if new[-1] == model.config.eos_token_id:
            break
    return tokenizer.decode([token for token in new if token != model.config.eos_token_id])


def test_generated_text_is_greedy_and_ends_before_stop_texts(model: Transformer, tokenizer: Tokenizer) -> None:
    lm = CavelightLM(model, tokenizer)
    ids = lm.tok_encode("The sky is")
    whole = greedy_text(model, tokenizer, ids, 12)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    assert lm.generate_until(asked(("The sky is", settings))) == [whole]
    stop = whole[2:4]
    (cut_off,) = lm.generate_until(asked(("The sky is", settings | {"until": stop})))
    assert cut_off == whole[: whole.index(stop)]
    # A context too long for its answer loses its beginning.
    long = "".join(WORDS)
    (answer,) = lm.generate_until(asked((long, {"max_gen_toks": 4})))
    kept = lm.tok_encode(long)[-(model.config.max_position_embeddings - 4) :]
    assert answer == greedy_text(model, tokenizer, kept, 4)
    with pytest.raises(UserError, match="64 tokens, of 64"):  # no room for a question
        lm.generate_until(asked(("The sky is", {"max_gen_toks": 64})))


def test_settings_of_generation() -> None:
    assert generation_of({}) == ([], harness.MAX_NEW_TOKENS, Sampling())
    assert generation_of({"until": "\n", "max_new_tokens": 5}) == (["\n"], 5, Sampling())
    assert generation_of({"until": ["a", ""], "temperature": 0.5, "top_p": 0.9})[::2] == (
        ["a"],
        Sampling(0.5, top_p=0.9),
    )
    assert generation_of({"until": None, "top_k": None, "seed": None}) == generation_of({})
    assert generation_of({"do_sample": True})[2] == Sampling(1.0)
    assert generation_of({"do_sample": False, "temperature": 1.0, "num_beams": 1})[2] == Sampling()
    for settings in ({"num_beams": 4}, {"typical_p": 0.5}):
        with pytest.raises(UserError, match="way of generating"):
            generation_of(settings)


def test_a_continuation_that_melts_into_the_context_still_counts(model: Transformer, tokenizer: Tokenizer) -> None:
    lm = CavelightLM(model, tokenizer)
    ids = (token for token in range(len(SPECIAL_TOKENS), VOCABULARY) if tokenizer.decode([token]).isalpha())
    first, second = next(text for text in map(tokenizer.decode, ([token] for token in ids)) if len(text) == 2)
    assert len(tokenizer.encode(first + second)) == 1  # as many tokens as the context alone
    before = [] if model.config.bos_token_id is None else [tokenizer.bos_id]
    log_p, greedy = expected(model, before or [tokenizer.eos_id], tokenizer.encode(first + second))
    assert lm.loglikelihood(asked((first, second))) == [(pytest.approx(log_p, abs=1e-3), greedy)]


QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "green"], "answer": 0},
    {"question": "Grass is", "choices": ["blue", "green", "not red, and not blue"], "answer": 1},
    {"question": "What is", "choices": ["red", "it"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{rest}
metadata:
  version: 1
"""
CHOICES = """
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
EXACT = """
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two tasks of one's own, and a place for what `datasets` keeps of them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    for name, kind, target, rest in (
        ("colours", "multiple_choice", "answer", CHOICES),
        ("colours_said", "generate_until", '"{{choices[answer]}}"', EXACT),
    ):
        text = TASK.format(name=name, data=data, kind=kind, target=target, rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    yield tmp_path


def own_accuracies(model: Transformer, tokenizer: Tokenizer) -> tuple[float, float]:
    right, right_by_length = 0, 0
    for question in QUESTIONS:
        lm = CavelightLM(model, tokenizer)
        pairs = [cut(lm, tokenizer, question["question"], f" {choice}") for choice in question["choices"]]
        log_p = Tensor([expected(model, *pair)[0] for pair in pairs])
        right += int(log_p.argmax()) == question["answer"]
        lengths = Tensor([len(choice) for choice in question["choices"]])
        right_by_length += int((log_p / lengths).argmax()) == question["answer"]
    return right / len(QUESTIONS), right_by_length / len(QUESTIONS)


def test_a_task_from_its_file_to_its_scores(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    run = harness.evaluate(model, tokenizer, ["colours*"], include=folder)
    scores = {(score.task, score.metric): score for score in run}
    accuracy, by_length = own_accuracies(model, tokenizer)
    assert scores["colours", "acc"].value == pytest.approx(accuracy)
    assert scores["colours", "acc_norm"].value == pytest.approx(by_length)
    assert scores["colours", "acc"].documents == 3 and scores["colours", "acc"].shots == 0
    assert scores["colours_said", "exact_match"].documents == 3
    (few, _) = harness.evaluate(model, tokenizer, ["colours"], limit=2, include=folder, shots=1)
    assert (few.documents, few.shots) == (2, 1)
    with open(folder / "colours.yaml", "a", encoding="utf-8") as handle:
        handle.write("num_fewshot: 0\n")  # insists on none
    (none, _) = harness.evaluate(model, tokenizer, ["colours"], limit=2, include=folder, shots=1)
    assert none.shots == 0


def test_mistakes_are_the_users(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder of tasks"):
        harness.evaluate(model, tokenizer, ["colours"], include=folder / "nowhere")
    task = (folder / "colours.yaml").read_text(encoding="utf-8")
    for right, wrong, got in (
        ("{{question}}", "{{nothing}}", "UndefinedError: 'nothing' is undefined"),
        ("{{question}}", "{{question", "TemplateSyntaxError"),
        ("doc_to_target: answer", "doc_to_target: 7", "IndexError"),
    ):
        (folder / "colours.yaml").write_text(task.replace(right, wrong), encoding="utf-8")
        with pytest.raises(UserError, match=rf"cannot run colours\. Got: {got}"):
            harness.evaluate(model, tokenizer, ["colours"], include=folder)
    (folder / "colours.yaml").write_text(task, encoding="utf-8")
    (folder / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot run colours\. Got: FileNotFoundError"):
        harness.evaluate(model, tokenizer, ["colours"], include=folder)


def test_unknown_tasks_and_an_unreachable_hub(
    model: Transformer, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_ours = harness.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **options: only_ours)  # the others are many thousand files
    with pytest.raises(UserError, match=r"no such task\. Got: colors\. Do: did you mean colours"):
        harness.evaluate(model, tokenizer, ["colours", "colors"])

    def unreachable(names: list[str]) -> None:
        raise ConnectionError("Couldn't reach 'someone/colours' on the Hub")

    monkeypatch.setattr(only_ours, "load", unreachable)
    with pytest.raises(UserError, match=r"Couldn't reach.*Do: go online once"):
        harness.evaluate(model, tokenizer, ["colours"])


@pytest.mark.parametrize("flag", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_that_need_more_than_text_are_refused(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    task = SimpleNamespace(task_name="exec", **{flag: True})
    monkeypatch.setattr(harness, "_load", lambda *names: {"tasks": {"exec": task}})
    with pytest.raises(UserError, match="exec cannot be run here"):
        harness.evaluate(model, tokenizer, ["exec"])


def test_the_command_prints_a_table_and_json(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(vocab_size=VOCABULARY, max_position_embeddings=64)
    write_checkpoint(filled(config), tmp_path / "model", tokenizer)
    for as_json in (False, True):
        command.tasks(tmp_path / "model", ["colours"], 2, folder, None, "auto", False, as_json)
        out = capsys.readouterr().out
        if as_json:
            lines = [json.loads(line) for line in out.splitlines()]
            assert lines[-1]["kind"] == "result"
            assert [score["metric"] for score in lines[-1]["scores"]] == ["acc", "acc_norm"]
            assert lines[-2] == {"kind": "phase", "name": "scoring", "done": 5, "total": 5, "unit": "requests"}
        else:
            assert "colours" in out and "acc_norm" in out
