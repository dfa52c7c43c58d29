"""Speculation is lossless: the same tokens whatever the drafts, and when sampled from the true distribution."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.run import generate, settle
from cavelight.run.cache import LatentCache
from cavelight.run.generate import TokenStream
from cavelight.run.sample import Sampling, distribution
from cavelight.run.speculate import Drafter, Wish, cost_of_round
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset
from cavelight.spec.shapes import parameters

from .chance import COMMON, SURELY_NOT, chi_square_of
from .run_models import TableModel, drafting_model, random_model, small_config, some_prompts


def run(model: Transformer, prompt: Sequence[int], tokens: int, drafts: int, **sampling: float) -> TokenStream:
    stream = TokenStream(model, prompt, max_new_tokens=tokens, drafts=drafts, sampling=Sampling(**sampling))
    stream.made = list(stream)
    return stream


@pytest.fixture
def no_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TIMED_STEPS", ())


# Greedy


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_greedy_output_is_the_same_with_drafts(modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNK", 4)  # so that prompts take several
    model = drafting_model(small_config(num_nextn_predict_layers=modules), seed=modules, surprise=0.25)
    rounds: dict[int, list[int]] = {drafts: [] for drafts in (1, 2, 3, 4)}
    for n, prompt in enumerate(some_prompts(model.config, 5, longest=5)):
        penalty = 1.3 if n == 4 else 1.0
        plain = run(model, prompt, 14, 0, repetition_penalty=penalty)
        for drafts, tokens in rounds.items():
            drafted = run(model, prompt, 14, drafts, repetition_penalty=penalty)
            assert drafted.made == plain.made
            tokens += drafted.stats.round_tokens
    for tokens in rounds.values():
        assert 1 in tokens and max(tokens) > 1, "drafts were rejected and accepted, or this shows little"


def test_greedy_output_is_the_same_over_two_hundred_prompts() -> None:
    """One module, applied up to three times; some drafts are right and some are wrong."""
    config = small_config()
    model = drafting_model(config)
    proposed = accepted = 0
    for number, prompt in enumerate(some_prompts(config, 200)):
        plain = TokenStream(model, prompt, max_new_tokens=16, drafts=0)
        drafted = TokenStream(model, prompt, max_new_tokens=16, drafts=1 + number % 3)
        assert list(plain) == list(drafted), f"prompt {number}"
        proposed += sum(drafted.stats.proposed)
        accepted += sum(drafted.stats.accepted)
    assert 0.1 < accepted / proposed < 0.95


def test_greedy_output_is_the_same_with_drafts_that_are_right_by_chance_alone() -> None:
    model = random_model(small_config(num_nextn_predict_layers=2))
    for prompt in some_prompts(model.config, 3):
        assert run(model, prompt, 20, 3).made == run(model, prompt, 20, 0).made


@torch.inference_mode()
def test_greedy_output_is_the_likeliest_of_whole_forward_passes() -> None:
    model = drafting_model(small_config(), surprise=0.3)
    for prompt in some_prompts(model.config, 3):
        tokens = list(prompt)
        for _ in range(16):
            tokens.append(int(model.logits(torch.tensor(tokens))[-1].argmax()))
        assert run(model, prompt, 16, 2).made == tokens[len(prompt) :]


# Near-ties


def with_twin_tokens(config: ModelConfig) -> Transformer:
    """Every even token's row of the head again, but for rounding, as the next one's: the likeliest two always tie."""
    model = drafting_model(config, surprise=0.4)
    head = model.lm_head.weight
    with torch.no_grad():
        head[1::2] = head[::2] + 1e-8 * torch.randn(head[::2].shape, generator=torch.Generator().manual_seed(0))
    return model


def with_twin_experts(config: ModelConfig) -> Transformer:
    """The same for some of the gates' rows: two experts of a group tie wherever both may be the last one chosen."""
    model = drafting_model(config, surprise=0.3)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            gate, bias = layer.mlp.gate.weight, layer.mlp.gate.e_score_correction_bias
            gate[1:4:2] = gate[:4:2] + 1e-8 * torch.randn(gate[:4:2].shape, generator=torch.Generator().manual_seed(0))
            bias[1:4:2] = bias[:4:2]
    return model


TIED = {
    "tokens": with_twin_tokens(small_config(num_hidden_layers=3)),
    "experts": with_twin_experts(small_config(num_hidden_layers=4, n_group=1, topk_group=1, num_experts_per_tok=3)),
    "groups": with_twin_experts(small_config(num_hidden_layers=3, num_experts_per_tok=3)),
}


@pytest.mark.parametrize("kind", TIED)
def test_natively_near_ties_need_no_settling(kind: str) -> None:
    model = TIED[kind]
    for prompt in some_prompts(model.config, 6):
        plain = run(model, prompt, 20, 0)
        for drafts in (1, 3):
            assert run(model, prompt, 20, drafts).made == plain.made
        assert plain.stats.settled == 0


@pytest.mark.usefixtures("plainly")
@pytest.mark.parametrize("kind", TIED)
def test_near_ties_are_settled_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TIED[kind]
    monkeypatch.setattr(settle, "BLOCK", 8)
    for prompt in some_prompts(model.config, 3):
        plain = run(model, prompt, 20, 0)
        assert plain.stats.settled > 5
        for drafts in (1, 3):
            drafted = run(model, prompt, 20, drafts)
            assert drafted.made == plain.made
            past = slice(len(prompt) + 19)  # all but the last token have been through the trunk
            rows, plain_rows = (stream.cache.rows_MSW[:-1, past] for stream in (drafted, plain))
            torch.testing.assert_close(rows, plain_rows, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("plainly")
def test_a_settled_position_ends_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows after it were computed with another one, so even drafts that are right cannot be taken over."""
    model = drafting_model(small_config(), surprise=0.2)
    free = run(model, [4, 2], 16, 2)
    assert max(free.stats.round_tokens) > 1
    monkeypatch.setattr(generate, "is_close", lambda scores_V: True)
    settled = run(model, [4, 2], 16, 2)
    assert set(settled.stats.round_tokens) == {1} and settled.stats.settled == 15
    assert settled.made == free.made


@pytest.mark.usefixtures("plainly")  # natively a row's bits do not depend on the others
@pytest.mark.parametrize("kind", ["tokens", "experts"])
def test_without_settling_near_ties_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would show nothing."""
    model = TIED[kind]
    monkeypatch.setattr(settle, "LOGIT_TIE", 0.0)
    monkeypatch.setattr(settle, "SCORE_TIE", 0.0)
    prompts = some_prompts(model.config, 20)
    assert any(run(model, prompt, 20, 0).made != run(model, prompt, 20, 3).made for prompt in prompts)


def test_the_lead_of_a_route() -> None:
    config = small_config(n_group=2, topk_group=1, num_experts_per_tok=2)
    choice_TE = torch.tensor(
        [
            [0.9, 0.5, 0.4, 0.1, 0.3, 0.3, 0.2, 0.2],  # groups 1.4 : 0.6, experts 0.5 : 0.4
            [0.9, 0.5, 0.1, 0.1, 0.8, 0.55, 0.2, 0.2],  # groups 1.4 : 1.35, experts 0.5 : 0.1
            [-0.9, -0.5, -0.4, -0.8, -2.0, -2.0, -2.0, -2.0],  # negative biases: groups -0.9 : -4, experts -0.5 : -0.8
        ]
    )
    assert settle.route_margin(choice_TE, config).tolist() == pytest.approx([0.1, 0.05, 0.3])
    everyone = small_config(n_group=1, topk_group=1, num_experts_per_tok=8)
    assert settle.route_margin(choice_TE, everyone).isinf().all()


def test_bfloat16_is_not_settled() -> None:
    model = with_twin_tokens(small_config()).to(torch.bfloat16)
    stream = run(model, [3, 4], 12, 1)
    assert stream.settler is None and stream.stats.settled == 0 and len(stream.made) == 12


# The drafter against modules that see the whole sequence from its start


def plain_drafts(model: Transformer, tokens: Sequence[int], drafts: int) -> tuple[list[Tensor], list[int]]:
    """Logits of each greedy draft after `tokens`, and the drafts; every module from scratch, without a past."""
    modules, end, line, logits = model.config.num_nextn_predict_layers, len(tokens) - 1, list(tokens), []
    rows, dispatch = LatentCache(model.config, 4, torch.float32), GroupedDispatch()

    def add(k: int, hidden_D: Tensor) -> None:
        logits.append(model.draft_head(k - 1, hidden_D[None])[0])
        line.append(int(logits[-1].argmax()))

    positions = torch.arange(end)
    hidden_TD, _ = model(torch.tensor(line[:end]), positions, PackedAttend([end]), dispatch)
    for k in range(1, min(drafts, modules) + 1):
        hidden_TD, _ = model.draft(k - 1, hidden_TD, torch.tensor(line[k : end + k]), positions, rows.at(0), dispatch)
        add(k, hidden_TD[-1])
    for position in range(end, end + drafts - modules):
        token, here = torch.tensor([line[position + modules]]), torch.tensor([position])
        attend = rows.at(position)
        hidden_TD, _ = model.draft(modules - 1, hidden_TD[-1:], token, here, attend, dispatch, after=modules - 1)
        add(modules, hidden_TD[0])
    return logits, line[len(tokens) :]


@pytest.mark.parametrize(
    ("modules", "drafts", "mtp_hidden"),
    [
        (1, 1, "post_norm"),
        (1, 3, "post_norm"),
        (2, 1, "post_norm"),
        (2, 2, "pre_norm"),
        (2, 4, "post_norm"),
        (3, 3, "post_norm"),
        (3, 5, "pre_norm"),
    ],
)
@torch.inference_mode()
def test_every_draft_is_what_whole_modules_say(
    modules: int, drafts: int, mtp_hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CHUNK", 4)
    monkeypatch.setattr(generate, "PERIOD", 7)  # plain steps in between
    config = small_config(num_nextn_predict_layers=modules).replace(mtp_hidden=mtp_hidden)
    model = drafting_model(config, seed=2, surprise=0.25)
    propose, compared = Drafter.propose, []

    def watched(self: Drafter, wishes: Sequence[Wish]) -> list[list[int]]:
        (wish,), seen = wishes, []
        watching = replace(wish, pick=lambda logits_V, line: seen.append(logits_V) or wish.pick(logits_V, line))
        (found,) = propose(self, [watching])
        if wish.drafts:
            expected, line = plain_drafts(model, wish.tokens, wish.drafts)
            torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=1e-5, rtol=0)
            assert found == line
            compared.append(tuple(wish.tokens))
        return [found]

    monkeypatch.setattr(Drafter, "propose", watched)
    for prompt in ([5], [7, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1]):
        stream = run(model, prompt, 12, drafts)
        assert_rows_are_true(stream)
    assert len(compared) > 10


def assert_rows_are_true(stream: TokenStream) -> None:
    """The rows that each module left, as far as it saw true tokens, are those of one pass over the sequence."""
    model, drafter = stream.model, stream.drafter
    end, trunk = stream.chain.seen, model.config.num_hidden_layers
    rows, dispatch = LatentCache(model.config, end, torch.float32), GroupedDispatch()
    tokens = torch.tensor(stream.tokens)
    hidden_TD, _ = model(tokens[:end], torch.arange(end), rows.at(0), dispatch)
    for k in range(1, drafter.depth + 1):
        true = end - k + 1
        if true <= 0:
            break
        hidden_TD, _ = model.draft(
            k - 1, hidden_TD[:true], tokens[k : true + k], torch.arange(true), rows.at(0), dispatch
        )
        if k < drafter.depth and end >= k:
            torch.testing.assert_close(stream.chain.edge[k - 1][0], hidden_TD[end - k], atol=1e-5, rtol=0)
        layer = trunk + k - 1
        torch.testing.assert_close(stream.cache.rows_MSW[layer, :true], rows.rows_MSW[layer, :true], atol=1e-5, rtol=0)


# Sampled


@pytest.mark.usefixtures("no_timed_steps")
def test_sampled_output_is_the_same_with_drafts() -> None:
    """A draft stands if it is what the trunk draws: in float64 no number of drafts changes a token."""
    model = drafting_model(small_config(num_nextn_predict_layers=2), seed=2, surprise=0.25).double()
    kept = 0
    for seed, prompt in enumerate(some_prompts(model.config, 12)):
        plain = run(model, prompt, 14, 0, temperature=0.8, top_p=0.9, seed=seed)
        for drafts in (1, 2, 4):
            drafted = run(model, prompt, 14, drafts, temperature=0.8, top_p=0.9, seed=seed)
            assert drafted.made == plain.made
            kept += sum(drafted.stats.accepted)
    assert kept > 50
    assert (
        run(model, [1, 2], 14, 0, temperature=0.8, seed=1).made
        != run(model, [1, 2], 14, 0, temperature=0.8, seed=2).made
    )


@pytest.mark.usefixtures("no_timed_steps")
def test_nothing_is_guessed_or_verified_after_an_end_token() -> None:
    """There a mask may have no answer: an ordinary grammar allows nothing after its end."""
    model = drafting_model(small_config(num_nextn_predict_layers=1), surprise=0.2)
    free, asked, drafted = run(model, [4, 2], 12, 0).made, list[bool](), 0
    ends = [token for n, token in enumerate(free) if n > 2 and token not in free[:n]]
    for end in ends:

        def grammar(tokens: Sequence[int], end: int = end) -> Tensor:
            asked.append(end in tokens[2:])
            return torch.full((model.config.vocab_size,), end not in tokens[2:])

        expected = free[: free.index(end) + 1]
        for drafts in (0, 1, 3, "auto"):
            stream = TokenStream(model, [4, 2], max_new_tokens=12, stop_ids={end}, drafts=drafts, allowed=grammar)
            assert list(stream) == expected and stream.stats.finish == "end token"
            stats = stream.stats
            drafted += sum(stats.accepted) > sum(stats.round_tokens) - len(stats.round_tokens)  # the end was one
    assert len(ends) > 3 and drafted and not any(asked)


def test_a_dead_end_off_the_trunks_way_harms_nobody() -> None:
    model = drafting_model(small_config(num_nextn_predict_layers=1), surprise=0.4)
    true = run(model, [4, 2], 16, 0).made

    def only_the_way(tokens: Sequence[int]) -> Tensor:
        if list(tokens[2:]) != true[: len(tokens) - 2]:
            raise KeyError("nobody comes here")
        return torch.ones(model.config.vocab_size, dtype=torch.bool)

    for drafts in (1, 3):
        stream = TokenStream(model, [4, 2], max_new_tokens=16, drafts=drafts, allowed=only_the_way)
        assert list(stream) == true and sum(stream.stats.proposed) > sum(stream.stats.accepted)


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_error_comes_after_all_tokens_before_it(drafts: int) -> None:
    model = drafting_model(small_config(num_nextn_predict_layers=1), surprise=0.2)
    true = run(model, [4, 2], 16, 0).made

    def broken(tokens: Sequence[int]) -> None:
        if len(tokens) >= 9:
            raise KeyError("nine")

    stream, made = TokenStream(model, [4, 2], max_new_tokens=16, drafts=drafts, allowed=broken), []
    with pytest.raises(KeyError, match="nine"):
        for token in stream:
            made.append(token)
    assert made == true[:7]


def joint(model: TableModel, prompt: Sequence[int], length: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The true probability of every continuation: the product of one-token distributions."""
    outcomes = {}
    for outcome in itertools.product(range(model.config.vocab_size), repeat=length):
        line, probability = list(prompt), 1.0
        for token in outcome:
            logits_V = model.trunk_PVV[len(line) - 1, line[-1]]
            probability *= float(distribution(logits_V, line, sampling)[token])
            line.append(token)
        outcomes[outcome] = probability
    return outcomes


@pytest.mark.parametrize(
    ("modules", "drafts", "options"),
    [
        (1, 1, {}),
        (1, 2, {"top_p": 0.85}),
        (2, 2, {"temperature": 1.3, "min_p": 0.1, "repetition_penalty": 1.8}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_timed_steps")
def test_sampled_output_has_the_true_joint_distribution(modules: int, drafts: int, options: dict[str, float]) -> None:
    model, prompt, length = TableModel(3, modules, seed=4), [2, 0], 4
    options = {"temperature": 1.0} | options
    expected = joint(model, prompt, length, Sampling(**options))
    assert sum(expected.values()) == pytest.approx(1)
    counts: Counter[tuple[int, ...]] = Counter()
    rounds = []
    for seed in range(700):
        stream = run(model, prompt, length, drafts, seed=seed, **options)
        counts[tuple(stream.made)] += 1
        rounds += stream.stats.round_tokens
    assert chi_square_of(counts, expected) > COMMON
    assert 1 in rounds and max(rounds) == drafts + 1
    other = joint(model, prompt, length, Sampling(**options | {"temperature": 3.0}))
    assert chi_square_of(counts, other) < SURELY_NOT, "or these are too few to show anything"


@pytest.mark.usefixtures("no_timed_steps")
def test_a_true_model_samples_from_its_own_logits() -> None:
    model = drafting_model(small_config(vocab_size=3, bos_token_id=0, eos_token_id=None), surprise=0.3)
    options = {"temperature": 0.3, "top_p": 0.95}
    expected: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for outcome in itertools.product(range(3), repeat=3):
            line, probability = [1, 2], 1.0
            for token in outcome:
                p_V = distribution(model.logits(torch.tensor(line))[-1], line, Sampling(**options))
                probability *= float(p_V[token])
                line.append(token)
            expected[outcome] = probability
    counts = Counter(tuple(run(model, [1, 2], 3, 1, seed=seed, **options).made) for seed in range(150))
    assert chi_square_of(counts, expected) > COMMON
    assert chi_square_of(counts, dict.fromkeys(expected, 1 / 27)) < SURELY_NOT


# What a round costs


def test_a_rounds_cost_is_counted_from_the_table() -> None:
    assert cost_of_round(preset("deepseek-v2-lite"), 0) == 1
    nano = preset("nano").replace(num_nextn_predict_layers=2)
    costs = [cost_of_round(nano, drafts) for drafts in range(5)]
    assert costs == sorted(costs) and costs[1] > 1.2
    dense = nano.replace(n_routed_experts=None, first_k_dense_replace=3)
    D, V = 64, 512
    per_layer = 32 * D + 32 + 4 * 24 * 32 + 24 * D + 16 + 4 * 16 * 32 + 64 * D + 2 * D + 3 * 192 * D
    module, head = 3 * D + 2 * D * D + per_layer, V * D
    assert cost_of_round(dense, 1) == pytest.approx(1 + (module + head) / (3 * per_layer + D + head))
    assert cost_of_round(dense, 3) == pytest.approx(1 + 3 * (module + head) / (3 * per_layer + D + head))


def test_a_round_meets_more_experts_than_a_step() -> None:
    config = preset("nano")
    share = config.num_experts_per_tok / config.n_routed_experts
    sizes = {(mtp, role): 0 for mtp in (False, True) for role in ("expert", "other", "head")}
    for p in parameters(config):
        if p.role != "embedding":
            role = p.role if p.role in ("expert", "head") else "other"
            sizes[p.name.startswith("mtp."), role] += p.size

    def read(mtp: bool, tokens: int) -> float:
        head = sizes[False, "head"]
        return sizes[mtp, "other"] + head + sizes[mtp, "expert"] * (1 - (1 - share) ** tokens)

    for drafts, again in ((1, 0), (3, 2)):  # the module's later drafts go through one by one
        expected = (read(False, drafts + 1) + read(True, drafts + 1) + again * read(True, 1)) / read(False, 1)
        assert cost_of_round(config, drafts) == pytest.approx(expected)
