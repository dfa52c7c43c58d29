"""Models that run from packed weights: the same numbers as unpacked, in less memory, and for running only."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cavelight.api import generate_tokens
from cavelight.errors import UserError
from cavelight.kernels import experts
from cavelight.model.layers import Linear
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import FP8, INT4, INT8, PACKED_ROLES, Format
from cavelight.spec.shapes import parameters
from cavelight.weights import swap
from cavelight.weights.files import SINGLE
from cavelight.weights.quant import pack, unpack
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint
from cavelight.weights.swap import Packed, PackedExperts, PackedLinear, is_packed

from .packing import packable, stored_as, write_folder, write_packed
from .reference.random_weights import random_weights
from .reference.tiny import V2, some_tokens, tiny

FORMATS = [FP8, Format("fp8", (16, 8)), INT8, INT4]
CONFIG = tiny(num_nextn_predict_layers=1)
E, F, D = 6, 20, 36  # not whole groups of 32


def saved(folder: Path, format: Format, config: ModelConfig = CONFIG, seed: int = 0) -> Path:
    return write_packed(folder, config, random_weights(config, seed), format)


def outputs(model: Transformer, tokens: list[int]) -> list[Tensor]:
    """Logits of the trunk and of its first MTP module."""
    tokens_T, positions_T = torch.tensor(tokens), torch.arange(len(tokens))
    with torch.inference_mode():
        attend, dispatch = PackedAttend([len(tokens)]), GroupedDispatch()
        hidden_TD, _ = model(tokens_T, positions_T, attend, dispatch)
        logits = [model.head(hidden_TD)]
        if len(model.mtp):
            hidden_TD, _ = model.draft(0, hidden_TD, tokens_T.roll(-1), positions_T, attend, dispatch)
            logits.append(model.draft_head(0, hidden_TD))
    return logits


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "config", [CONFIG, tiny(V2), tiny(q_lora_rank=None, n_shared_experts=None)], ids=["v3", "v2", "-"]
)
def test_packed_and_unpacked_say_the_same(tmp_path: Path, format: Format, config: ModelConfig) -> None:
    folder, tokens = saved(tmp_path, format, config), some_tokens(config, 20)
    packed = read_checkpoint(folder, torch.float32, packed=True)
    plain = read_checkpoint(folder, torch.float32, packed=False)
    assert is_packed(packed) and not is_packed(plain)
    for ours, theirs in zip(outputs(packed, tokens), outputs(plain, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    # One token at a time, too.
    one, whole = outputs(packed, tokens[:1]), outputs(plain, tokens[:1])
    torch.testing.assert_close(one[0], whole[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("format", "packed", "kept"),
    [(INT8, None, True), (INT4, None, True), (FP8, None, False), (INT4, False, False), (FP8, True, True)],
)
def test_what_stays_packed(tmp_path: Path, format: Format, packed: bool | None, kept: bool) -> None:
    model = read_checkpoint(saved(tmp_path, format), packed=packed)
    assert is_packed(model) == kept
    assert model.lm_head.weight.dtype == torch.bfloat16
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    by_role = {p.name.removesuffix(".weight"): p.role for p in parameters(CONFIG)}
    assert {by_role[name] for name in linears} & PACKED_ROLES == (set() if kept else PACKED_ROLES - {"expert"})
    held = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert held["model.layers.1.self_attn.k_up"] == torch.bfloat16
    assert held["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32


@pytest.mark.parametrize(("format", "share"), [(FP8, 0.5), (INT8, 0.5), (INT4, 0.25)], ids=str)
def test_packed_weights_take_less_memory(tmp_path: Path, format: Format, share: float) -> None:
    config = tiny(hidden_size=256, moe_intermediate_size=128, intermediate_size=512)
    model = read_checkpoint(saved(tmp_path, format, config), packed=True)
    wide = {p.name: p.size for p in parameters(config) if p.role in PACKED_ROLES and not p.name.endswith("_up")}
    plain = {name for name, _ in model.named_parameters()}
    assert not plain & wide.keys()
    held = sum(b.nbytes for module in model.modules() if isinstance(module, Packed) for b in module.buffers())
    in_bfloat16 = 2 * sum(size for name, size in wide.items())
    assert share * in_bfloat16 < held < (share + 0.05) * in_bfloat16
    whole = sum(t.nbytes for t in model.state_dict().values())
    assert whole == held + sum(
        p.size * (4 if p.dtype == "float32" else 2) for p in parameters(config) if p.name not in wide
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_linear_is_a_linear(format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(70, 33, generator=generator)
    x_TI = torch.randn(5, 33, generator=generator).to(dtype)
    parts = pack(weight_OI, format)
    linear = PackedLinear(parts, format, (70, 33))
    plain_TO = x_TI @ unpack(parts, format, dtype).T
    for tile in (swap.TILE, 100):
        monkeypatch.setattr(swap, "TILE", tile)
        torch.testing.assert_close(linear(x_TI), plain_TO, rtol=2e-2 if dtype == torch.bfloat16 else 0, atol=1e-4)
    assert linear(x_TI).dtype == dtype
    assert linear(x_TI[:0]).shape == (0, 70)


def stacks(format: Format, monkeypatch_seed: int = 0) -> tuple[PackedExperts, list[Tensor]]:
    generator = torch.Generator().manual_seed(monkeypatch_seed)
    shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    packed = {
        stack: [pack(0.2 * torch.randn(shape, generator=generator), format) for _ in range(E)]
        for stack, shape in shapes.items()
    }
    parts = {
        stack: {suffix: torch.stack([m[suffix] for m in each]) for suffix in each[0] if suffix != "weight_shape"}
        for stack, each in packed.items()
    }
    plain = [torch.stack([unpack(m, format, torch.float32) for m in each]) for each in packed.values()]
    return PackedExperts(parts, format, D, F), plain


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("T", [0, 1, 40])
def test_packed_experts_are_experts(format: Format, T: int) -> None:
    packed, plain = stacks(format)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=generator)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :3]
    weights_TK = torch.rand(T, 3, generator=generator)
    y_TD = packed(x_TD, ids_TK, weights_TK)
    assert y_TD.shape == (T, D)
    if T:
        torch.testing.assert_close(y_TD, experts.plain(x_TD, ids_TK, weights_TK, *plain), rtol=0, atol=1e-5)


def test_only_chosen_experts_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = stacks(INT4)
    asked: list[tuple[str, int]] = []
    matrix = PackedExperts.matrix

    def recorded(self: PackedExperts, stack: str, expert: int, dtype: torch.dtype) -> Tensor:
        asked.append((stack, expert))
        return matrix(self, stack, expert, dtype)

    monkeypatch.setattr(PackedExperts, "matrix", recorded)
    packed(torch.ones(1, D), torch.tensor([[4, 1]]), torch.ones(1, 2))
    assert {expert for _, expert in asked} == {1, 4} and len(asked) == 6


def test_experts_alone_may_be_packed(tmp_path: Path) -> None:
    """As in released checkpoints with integer experts; and one plain matrix makes its whole layer's stacks plain."""
    weights = random_weights(CONFIG)
    alone = {name for name in packable(CONFIG) if ".mlp.experts." in name}
    for left_out in (set(), {"model.layers.1.mlp.experts.3.up_proj.weight"}):
        chosen = alone - left_out
        folder = tmp_path / str(len(chosen))
        write_folder(folder, CONFIG, stored_as(weights, INT4, chosen.__contains__), INT4)
        packed, plain = read_checkpoint(folder, torch.float32), read_checkpoint(folder, torch.float32, packed=False)
        held = [name for name, module in packed.named_modules() if isinstance(module, Packed)]
        assert held == ["model.layers.1.mlp.experts", "mtp.0.block.mlp.experts"][len(left_out) :]
        tokens = some_tokens(CONFIG, 12)
        for ours, theirs in zip(outputs(packed, tokens), outputs(plain, tokens), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", [INT8, INT4], ids=str)
def test_drafts_change_nothing(tmp_path: Path, format: Format) -> None:
    model = read_checkpoint(saved(tmp_path, format), torch.float32)
    prompt = some_tokens(CONFIG, 6)
    alone, drafted = (generate_tokens(model, prompt, max_new_tokens=30, mtp=mtp) for mtp in (False, True))
    assert alone == drafted


def test_casts_leave_packed_weights_alone(tmp_path: Path) -> None:
    for format in (FP8, INT4):
        model = read_checkpoint(saved(tmp_path / format.kind, format), packed=True)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.float()
        for name, buffer in model.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
        assert outputs(model, some_tokens(CONFIG, 8))[0].isfinite().all()


# For running only


def test_gradients_are_refused(tmp_path: Path) -> None:
    model = read_checkpoint(saved(tmp_path, INT8), torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.logits(torch.tensor([1, 2, 3])).requires_grad  # and needs no torch.no_grad()
    model.model.embed_tokens.weight.requires_grad_()
    with pytest.raises(UserError, match=r"packed weights cannot be trained.*packed=False"):
        model.logits(torch.tensor([1, 2, 3]))
    packed, _ = stacks(INT8)
    with pytest.raises(UserError, match="cannot be trained"):
        packed(nn.Parameter(torch.ones(1, D)), torch.tensor([[0]]), torch.ones(1, 1))


def test_saving_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", INT4)
    with pytest.raises(UserError, match=r"packed weights cannot be saved.*cavelight convert"):
        write_checkpoint(read_checkpoint(folder), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("format", [FP8, INT4], ids=str)
def test_unpacked_it_can_be_trained_and_saved(tmp_path: Path, format: Format) -> None:
    model = read_checkpoint(saved(tmp_path / "a", format), torch.float32, packed=False)
    model.logits(torch.tensor([1, 2, 3])).sum().backward()
    write_checkpoint(model, tmp_path / "b", shift_biases=False)
    again = read_checkpoint(tmp_path / "b")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert "quantization_config" not in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("packed", [True, False])
def test_values_that_are_no_numbers(tmp_path: Path, packed: bool) -> None:
    tensors = stored_as(random_weights(CONFIG), FP8, packable(CONFIG).__contains__)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    codes = tensors[name].view(torch.uint8).clone()
    codes[2, 5:7] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    folder = write_folder(tmp_path, CONFIG, tensors | {name: codes.view(torch.float8_e4m3fn)}, FP8)
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite. Got: 2 of"):
        read_checkpoint(folder, packed=packed)
    read_checkpoint(folder, packed=packed, check_finite=False)


def test_mtp_may_be_plain_in_a_packed_checkpoint(tmp_path: Path) -> None:
    trunk = {name for name in packable(CONFIG) if not name.startswith("model.layers.2.")}
    for format in (FP8, replace(INT4, group=8)):
        folder = tmp_path / format.kind
        write_folder(folder, CONFIG, stored_as(random_weights(CONFIG), format, trunk.__contains__), format)
        model = read_checkpoint(folder, packed=True)
        packed = {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, Packed)}
        assert packed == {"model"}
        for without_mtp in (False, True):
            assert len(read_checkpoint(folder, without_mtp=without_mtp).mtp) == (not without_mtp)


def test_scales_of_several_dtypes_are_not_made_one(tmp_path: Path) -> None:
    """Held in one stack, those of the first expert would round the others'."""
    folder = saved(tmp_path, INT8)
    tensors = load_file(folder / SINGLE)
    name = "model.layers.1.mlp.experts.{}.up_proj.weight_scale"
    tensors[name.format(0)] = tensors[name.format(0)].bfloat16()
    tensors[name.format(1)] = tensors[name.format(1)].float() * 1.001
    save_file(tensors, folder / SINGLE)
    model, plain = (read_checkpoint(folder, torch.float32, packed=packed) for packed in (None, False))
    assert is_packed(model) and not is_packed(model.get_submodule("model.layers.1.mlp.experts"))
    stack = "model.layers.1.mlp.experts.up_proj"
    assert torch.equal(model.get_parameter(stack), plain.get_parameter(stack))
