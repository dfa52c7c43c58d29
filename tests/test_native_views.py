"""The view of a model that is run: what changes beneath it, what it must not go past, and what it does not read."""

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cavelight.api import generate_tokens
from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.kernels import native
from cavelight.model.layers import Linear
from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run import quick as quick_module
from cavelight.run.cache import LatentCache
from cavelight.run.engine import Engine
from cavelight.run.generate import TokenStream
from cavelight.run.paged import PagedAttend, PagedCache
from cavelight.run.quick import quick
from cavelight.run.request import Request
from cavelight.spec.formats import FP8, INT4, INT8, Format
from cavelight.weights.snapshot import read_checkpoint
from cavelight.weights.swap import STACKS, is_packed

from .crowds import some_prefixes, some_request
from .native_views import Store, assert_close, case, native_view, packed_linear, plain_only, put, step, stored
from .packing import write_folder
from .reference.random_weights import random_weights
from .reference.tiny import tiny
from .run_models import drafting_model, random_model, small_config, some_prompts

CONFIG = small_config()
GIVEN = case(CONFIG, [(0, 3), (70, 2)], 4, torch.float32)
INT8_ROWS = Format("int", bits=8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each native step took."""
    made: list[int] = []
    layers = native.layers

    def counted(library: Any, chain: native.Chain, *rest: Any) -> Any:
        made.append(chain.count)
        return layers(library, chain, *rest)

    monkeypatch.setattr(native, "layers", counted)
    return made


def outcome(model: Transformer) -> list[Tensor]:
    return step(quick(model), GIVEN).all()


def assert_as_plain(model: Transformer) -> None:
    """As a view made anew, without the library."""
    ours = outcome(model)
    with plain_only():
        theirs = step(quick_module._view(model), GIVEN).all()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, INT8_ROWS], ids=str)
@pytest.mark.parametrize("by_data", [False, True])
def test_what_changes_in_place_is_seen(store: Store, by_data: bool) -> None:
    """Without asking for a view again: an engine asks once and lives long."""
    model = stored(CONFIG, store)
    view = native_view(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        before = step(view, GIVEN).all()
        with torch.no_grad():
            target = tensor.data if by_data else tensor
            target.copy_(target.flatten().roll(1).view(target.shape) if tensor.ndim > 1 else target * 1.5 + 0.1)
        after = step(view, GIVEN).all()
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
    assert quick(model) is view
    assert_as_plain(model)


def test_scales_that_are_held_as_copies() -> None:
    """The library reads no float16: the next view has the new scales."""
    model = stored(CONFIG, INT8_ROWS, scale=torch.float16)
    view, before = native_view(model), outcome(model)
    model.get_submodule("model.layers.0.mlp.up_proj").get_buffer("weight_scale").mul_(1.5)
    assert quick(model) is not view
    assert any(not torch.equal(a, b) for a, b in zip(before, outcome(model), strict=True))
    assert_as_plain(model)


def test_what_moves_is_seen() -> None:
    model = random_model(CONFIG).requires_grad_(False)
    view = native_view(model)
    model.to(torch.bfloat16)
    assert native_view(model) is not view
    assert_as_plain(model)
    model.to(torch.float32)
    assert_as_plain(model)
    view = native_view(model)
    model.load_state_dict(random_model(CONFIG, seed=1).state_dict(), assign=True)
    assert native_view(model) is not view
    assert_as_plain(model)
    view = native_view(model)
    model.load_state_dict(random_model(CONFIG, seed=2).state_dict())
    assert native_view(model) is view
    assert_as_plain(model)
    norm = model.model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)
    assert native_view(model) is not view
    assert_as_plain(model)
    put(model, "model.layers.1.mlp.shared_experts", random_model(CONFIG, seed=3).model.layers[1].mlp.shared_experts)
    assert_as_plain(model)


def test_a_view_and_its_model_live_apart() -> None:
    model = random_model(CONFIG)
    view, before = native_view(model), outcome(model)
    assert quick(view) is view
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    junk = [torch.full((32, 32), torch.nan) for _ in range(100)]
    for a, b in zip(before, step(view, GIVEN).all(), strict=True):
        assert torch.equal(a, b)
    del junk


def test_a_view_of_what_is_gone_is_not_kept() -> None:
    model = random_model(CONFIG)
    gone = weakref.ref(quick(model))
    del model
    gc.collect()
    assert gone() is None


class Doubled(Linear):
    """As adapters change a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_hooks_and_foreign_modules_are_not_gone_past() -> None:
    model = random_model(CONFIG)
    plain = generate_tokens(model, [3, 1, 4], 20)
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(lambda _, __, out: (out[0] * -1, out[1]))
    assert generate_tokens(model, [3, 1, 4], 20) != plain
    hook.remove()
    assert generate_tokens(model, [3, 1, 4], 20) == plain
    doubled = Doubled(32, 32, torch.float32, None)
    doubled.weight = layer.self_attn.o_proj.weight
    put(model, "model.layers.1.self_attn.o_proj", doubled)
    changed = outcome(model)
    with torch.no_grad():
        put(model, "model.layers.1.self_attn.o_proj", other := Linear(32, 32, torch.float32, None))
        other.weight = nn.Parameter(doubled.weight * 2)
    for a, b in zip(changed, outcome(model), strict=True):
        assert_close(a, b)


def test_methods_of_a_module_itself_are_not_gone_past() -> None:
    model = random_model(CONFIG)
    layer = model.model.layers[1]
    vars(layer)["forward"] = lambda *given: (2 * given[0], None)
    assert quick(model) is model
    del vars(layer)["forward"]
    assert quick(model) is not model


def test_shapes_that_the_configuration_does_not_say() -> None:
    """Experts may be taken out of a model by hand: its plain modules do not mind."""
    model = random_model(small_config(n_group=1, topk_group=1, num_nextn_predict_layers=0)).requires_grad_(False)
    moe = model.model.layers[1].mlp
    for stack in STACKS:
        setattr(moe.experts, stack, nn.Parameter(getattr(moe.experts, stack)[:5].clone()))
    moe.gate.weight = nn.Parameter(moe.gate.weight[:5].clone())
    moe.gate.e_score_correction_bias = moe.gate.e_score_correction_bias[:5].clone()
    assert quick(model) is model
    assert all(torch.isfinite(t).all() for t in outcome(model))


class Counted(GroupedDispatch):
    """As one derives a port, to record or to change what goes through it."""

    def __call__(self, layer: int, *rest: Any) -> Tensor:
        LAYERS.append(layer)
        return super().__call__(layer, *rest)


LAYERS: list[int] = []


def test_ports_that_are_derived_from_ours_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    view = native_view(random_model(CONFIG))
    before = step(view, GIVEN)
    for a, b in zip(step(view, GIVEN, Counted()).all(), before.all(), strict=True):
        assert_close(a, b)
    assert LAYERS == [1, 2]

    class Looked(PagedAttend):
        def __call__(self, layer: int, *rest: Any) -> Tensor:
            LAYERS.append(layer)
            return super().__call__(layer, *rest)

    monkeypatch.setattr(PagedCache, "at", lambda cache, spans: Looked(cache, spans, False))
    step(view, GIVEN)
    assert LAYERS == [1, 2, 0, 1, 2]


class Elsewhere(Tensor):
    """As packages of quantised tensors derive from it."""


def test_layers_that_are_not_where_they_were() -> None:
    """A trunk without its first layer: rows go where the layers' numbers say, as in the plain modules."""
    model = random_model(small_config(num_hidden_layers=3, num_nextn_predict_layers=0))
    model.model.layers = model.model.layers[1:]
    given = case(model.config, [(5, 2)], 4, torch.float32)
    ours = step(quick(model), given)
    with plain_only():
        theirs = step(quick(model), given)
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("form", [INT4, INT8], ids=str)
def test_layers_of_mixed_storage(form: Format, name: str) -> None:
    """Checkpoints may leave single matrices unpacked, or a layer of float32 among bfloat16."""
    model = stored(CONFIG, torch.bfloat16)
    for at in ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"):
        linear = model.get_submodule(f"{at}.{name}")
        put(model, f"{at}.{name}", packed_linear(linear.weight, form))
    assert_as_plain(model)
    model.model.layers[0].to(torch.float32)
    assert_as_plain(model)


def refuse(*_: Any) -> None:
    raise AssertionError("native")


@pytest.mark.parametrize(
    "store",
    [
        torch.float16,
        torch.float64,
        FP8,
        Format("int", bits=8, group=24),
        Format("int", bits=4, group=24),
        Format("int", bits=4, group=4),
    ],
    ids=str,
)
def test_what_is_not_read_natively(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(hidden_size=48, intermediate_size=96, moe_intermediate_size=48, q_lora_rank=48)
    model = stored(config, store)
    given = case(config, [(0, 3), (70, 2)], 4, model.lm_head.weight.dtype)
    with plain_only():
        plain = step(quick(model), given)
    monkeypatch.setattr(native, "layers", refuse)
    for a, b in zip(step(quick(model), given).all(), plain.all(), strict=True):
        assert_close(a, b)
    if store in (torch.float16, torch.float64):
        assert quick(model) is model


def test_other_attention_and_other_widths() -> None:
    heads = {
        "attention": "gqa",
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 0,
        "qk_nope_head_dim": 0,
    }
    for config in (small_config(kv_lora_rank=24), small_config().replace(**heads)):
        model = random_model(config)
        given = case(config, [(0, 3), (70, 2)], 4, torch.float32)
        ours = step(quick(model), given)
        assert quick(model).model.chain is None
        with plain_only():
            theirs = step(quick(model), given)
        for a, b in zip(ours.all(), theirs.all(), strict=True):
            assert_close(a, b)


def test_matrices_that_are_not_read() -> None:
    assert native.matrix(torch.ones(4, 6).T) is None
    assert native.matrix(torch.ones(4, 6)[:, :3]) is None
    assert native.matrix(torch.ones(4, 6, dtype=torch.float16)) is None
    assert native.matrix(torch.ones(4, 6, device="meta")) is None
    assert native.matrix(torch.ones(4, 6).as_subclass(Elsewhere)) is None
    assert native.matrix(nn.Parameter(torch.ones(4, 6).as_subclass(Elsewhere))) is None
    model = random_model(CONFIG).requires_grad_(False)
    o_proj = model.get_submodule("model.layers.0.self_attn.o_proj")
    o_proj.weight = nn.Parameter(o_proj.weight.T.contiguous().T, requires_grad=False)
    assert quick(model).model.chain is None
    assert_as_plain(model)
    words = torch.zeros(1, 8 * 4097 // 4, dtype=torch.int32)
    many = native.packed_matrix(words, torch.ones(1, 4097), 4, 8, 8 * 4097)  # more scales than there is room for
    assert many is None
    most = native.packed_matrix(words[:, :4096], torch.ones(1, 4096), 4, 8, 8 * 4096)
    assert most is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_cache_in_other_numbers(dtype: torch.dtype, calls: list[int]) -> None:
    model = stored(CONFIG, torch.float32)
    given = case(CONFIG, [(0, 3)], 4, dtype)
    if dtype == torch.float64:
        step(quick(model), given)
    cache = LatentCache(CONFIG, 8, dtype)
    with torch.inference_mode():
        quick(model)(torch.tensor([1, 2]), torch.arange(2), cache.at(0), GroupedDispatch())
    assert not calls


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_other_default_numbers(default: torch.dtype, calls: list[int]) -> None:
    model = stored(CONFIG, torch.bfloat16)
    before = outcome(model)
    torch.set_default_dtype(default)
    try:
        after = outcome(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)
    assert calls == [2, 1, 2, 1]


def test_inputs_of_other_shapes() -> None:
    head = quick(random_model(CONFIG)).lm_head
    x_TD = torch.randn(4, 32)
    y_TV = head(x_TD)
    assert_close(head(x_TD[0]), y_TV[0])
    assert_close(head(x_TD[None])[0], y_TV)
    assert head(x_TD[:0]).shape == (0, 48)
    assert torch.equal(head(x_TD.T.contiguous().T), y_TV)
    for wrong in (x_TD[:, :31], torch.randn(4, 33)):
        with pytest.raises((AssertionError, RuntimeError)):
            head(wrong)


def test_two_threads_at_once() -> None:
    model = stored(small_config(max_position_embeddings=512), torch.bfloat16)
    asks = [([3, 1, 4], 60), (list(range(40)), 25), ([7] * 90, 40), ([9, 9], 30)]
    alone = [generate_tokens(model, *ask) for ask in asks]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with ThreadPoolExecutor(4) as pool:
                for _ in range(2):
                    assert list(pool.map(lambda ask: generate_tokens(model, *ask), asks)) == alone
        finally:
            torch.set_num_threads(1)


PLACES = ("embed_tokens", "kv_a_proj_with_mqa", "k_up", "shared_experts.up_proj", "gate.weight", "experts.down_proj")


@pytest.mark.parametrize("where", [*PLACES, "input_layernorm", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_not_numbers(where: str, dtype: torch.dtype) -> None:
    model = stored(CONFIG, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if where in name and "mtp" not in name:
            tensor.data[(-1,) * tensor.ndim] = torch.nan
            if where in ("experts.down_proj", "embed_tokens"):
                tensor.data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        list(TokenStream(model, [3, 1, 4], max_new_tokens=30, drafts=0))
    engine = Engine(model, memory=1 << 20)
    (made,) = engine.submit(Request([3, 1, 4], max_new_tokens=30))
    with pytest.raises(UserError, match="NaN"):
        list(made)


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, INT4], ids=str)
def test_a_crowd_with_drafts_gets_what_each_gets_alone(store: Store, calls: list[int]) -> None:
    """In float32 and elsewhere: company, drafts and the order of steps change nothing, to the bit."""
    config = small_config(num_nextn_predict_layers=2)
    model, source = stored(config, store), random.Random(0)
    prefixes = some_prefixes(source)
    requests = [some_request(source, prefixes, drafting=True) for _ in range(12)]

    def run(together: list[Request]) -> list[list[int]]:
        engine = Engine(model, memory=1 << 20, page=4, budget=24, most=12, invariant=True)
        made = [generation for request in together for generation in engine.submit(request)]
        engine.run()
        return [list(generation.tokens) for generation in made]

    crowd = run(requests)
    assert calls and crowd == [tokens for request in requests for tokens in run([request])]
    assert crowd == [tokens for request in requests for tokens in run([replace(request, drafts=0)])]


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_greedy_tokens_are_those_of_the_plain_modules(drafts: int) -> None:
    model = drafting_model(small_config(num_nextn_predict_layers=2), surprise=0.3)
    for prompt in some_prompts(CONFIG, 8, 40):
        ours = list(TokenStream(model, prompt, max_new_tokens=40, drafts=drafts))
        with plain_only():
            assert ours == list(TokenStream(model, prompt, max_new_tokens=40, drafts=drafts))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_converted_checkpoint_says_the_same(tmp_path: Path, bits: str, calls: list[int]) -> None:
    config = tiny(num_nextn_predict_layers=1, hidden_size=160, intermediate_size=200, n_routed_experts=4)
    tensors = {name: t if name.endswith("bias") else t.to(torch.bfloat16) for name, t in random_weights(config).items()}
    write_folder(tmp_path / "source", config, tensors, Format("plain"))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", bits])
    assert result.exit_code == 0, result.output
    model = read_checkpoint(tmp_path / "out")
    assert is_packed(model)
    ours = [generate_tokens(model, prompt, 40) for prompt in ([3], list(range(40)))]
    assert calls
    with plain_only():
        assert ours == [generate_tokens(model, prompt, 40) for prompt in ([3], list(range(40)))]
