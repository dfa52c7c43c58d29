"""Plain attention in the place of MLA: against attention written out, in the cache, in training, on the disk."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from cavelight.doctor.examine import examine
from cavelight.errors import UserError
from cavelight.kernels import attend
from cavelight.model.gqa import GQA
from cavelight.model.layers import Rotary, rotate
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.plan.table import facts
from cavelight.run.cache import LatentCache
from cavelight.run.generate import generate_tokens
from cavelight.see.architecture import draw_architecture
from cavelight.see.look import look
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import flops_per_token, stored_bytes_per_token, total_parameters
from cavelight.spec.presets import preset
from cavelight.spec.shapes import parameters
from cavelight.spec.variants import with_plain_attention
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint
from cavelight.weights.stored import Checkpoint

from .reference.tiny import some_tokens, tiny, yarn

HEADS = 4


def plain(key_value_heads: int, width: int = 6, value_width: int = 10, **changes: object) -> ModelConfig:
    """A tiny model with attention whose keys and values differ in width."""
    own = {"attention": "gqa", "num_key_value_heads": key_value_heads, "q_lora_rank": None, "kv_lora_rank": 0}
    widths = {"qk_nope_head_dim": 0, "qk_rope_head_dim": width, "v_head_dim": value_width}
    return tiny().replace(**own, **widths, **changes)


def filled(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if tensor.ndim == 1 else 0.2 * noise)
    return model


def written_out(gqa: GQA, x_TD: Tensor, rotary: Rotary) -> Tensor:
    """Grouped-query attention of one sequence, keys and values repeated for the query heads that share them."""
    H, g, R, U = gqa.sizes
    cos_sin = rotary(torch.arange(len(x_TD)))
    q_HTR, k_gTR = (
        rotate((x_TD @ weight.T).view(len(x_TD), -1, R), cos_sin).transpose(0, 1)
        for weight in (gqa.q_proj.weight, gqa.k_proj.weight)
    )
    v_gTU = (x_TD @ gqa.v_proj.weight.T).view(len(x_TD), g, U).transpose(0, 1)
    k_HTR, v_HTU = (t.repeat_interleave(H // g, dim=0) for t in (k_gTR, v_gTU))
    o_HTU = F.scaled_dot_product_attention(q_HTR, k_HTR, v_HTU, is_causal=True, scale=R**-0.5)
    return o_HTU.transpose(0, 1).flatten(1) @ gqa.o_proj.weight.T


@pytest.mark.parametrize("key_value_heads", [1, 2, HEADS], ids=["MQA", "GQA", "MHA"])
def test_equals_attention_written_out(key_value_heads: int) -> None:
    config = plain(key_value_heads)
    model, generator = filled(config), torch.Generator().manual_seed(1)
    gqa = model.model.layers[0].self_attn
    assert isinstance(gqa, GQA)
    x_TD = torch.randn(23, config.hidden_size, generator=generator)
    ours = gqa(0, x_TD, model.rotary(torch.arange(23)), PackedAttend((23,)))
    torch.testing.assert_close(ours, written_out(gqa, x_TD, model.rotary), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_attention_written_out() -> None:
    config = plain(2)
    model = filled(config)
    gqa = model.model.layers[0].self_attn
    x_TD = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(2))
    weights = list(gqa.parameters())
    both = (gqa(0, x_TD, model.rotary(torch.arange(9)), PackedAttend((9,))), written_out(gqa, x_TD, model.rotary))
    ours, theirs = (torch.autograd.grad(y_TD.square().sum(), weights) for y_TD in both)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [attend.expanded, attend.absorbed, None])
@pytest.mark.parametrize("key_value_heads", [1, 2, HEADS])
def test_decode_equals_forward(form: object, key_value_heads: int) -> None:
    model = filled(plain(key_value_heads, rope_scaling=None))
    tokens_T = torch.tensor(some_tokens(model.config, 17))
    cache = LatentCache(model.config, 8, torch.float32)
    with torch.inference_mode():
        whole_TV = model.logits(tokens_T)
        parts = []
        for start, end in ((0, 7), (7, 8), (8, 12), (12, 17)):
            positions = torch.arange(start, end)
            hidden, _ = model(tokens_T[start:end], positions, cache.at(start, form), GroupedDispatch())
            parts.append(model.head(hidden))
    torch.testing.assert_close(torch.cat(parts), whole_TV, rtol=1e-4, atol=1e-4)
    assert cache.rows_MSW.shape[-1] == key_value_heads * (6 + 10)


def test_training_works_after_inference_came_first() -> None:
    """What picks the heads is made once in a process, perhaps under inference mode."""
    config = plain(2, width=14)  # of a size that no other test has
    model, tokens_T = filled(config), torch.arange(5)
    with torch.inference_mode():
        model.logits(tokens_T)
    model.logits(tokens_T).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[0].self_attn.parameters())


def test_drafts_change_no_token() -> None:
    model = filled(plain(2, num_nextn_predict_layers=1))
    prompt = some_tokens(model.config, 12)
    drafted, alone = (generate_tokens(model, prompt, max_new_tokens=24, mtp=mtp) for mtp in (True, False))
    assert drafted == alone and len(alone) == 24


def test_checkpoint_goes_round(tmp_path: Path) -> None:
    model = filled(plain(2, num_nextn_predict_layers=1, rope_scaling=tiny(rope_scaling=yarn(64)).rope_scaling))
    write_checkpoint(model, tmp_path / "model", shift_biases=False)
    again = read_checkpoint(tmp_path / "model")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert raw["model_type"] == "cavelight_gqa_v3" and raw["num_key_value_heads"] == 2 and "architectures" not in raw
    with pytest.raises(ValueError, match="cavelight_gqa_v3"):
        AutoConfig.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None"),
        ({"kv_lora_rank": 8}, "but kv_lora_rank belong"),
        ({"attention": "mla"}, "kv_lora_rank and qk_nope_head_dim must be greater than 0"),
        ({"qk_rope_head_dim": 7}, "rotary dimensions come in pairs"),
    ],
)
def test_mistakes_are_told(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plain(2).replace(**changes)


def test_model_type_and_attention_agree() -> None:
    raw = plain(2).to_hf()
    for wrong in ({"attention": "mla"}, {"model_type": "deepseek_v3"}):
        with pytest.raises(UserError, match="attention is"):
            ModelConfig.from_hf(raw | wrong)


def test_latent_heads_are_not_shared() -> None:
    with pytest.raises(UserError, match="for attention gqa alone"):
        tiny().replace(num_key_value_heads=2)


def test_the_table_is_the_model() -> None:
    config = plain(2, num_nextn_predict_layers=1)
    state = Transformer(config, device=torch.device("meta")).state_dict()
    assert {p.name: p.shape for p in parameters(config)} == {name: tuple(t.shape) for name, t in state.items()}


def test_costs() -> None:
    config = plain(2)
    assert stored_bytes_per_token(config) == 2 * (6 + 10) * 2 * 2  # heads, widths, layers, bytes
    far, near = (flops_per_token(config, past) for past in (101, 1))
    assert far - near == 2 * 100 * 2 * HEADS * (6 + 10)  # two operations, rows, layers


def test_the_planner_and_the_pictures_refuse(tmp_path: Path) -> None:
    model = filled(plain(2))
    write_checkpoint(model, tmp_path / "model")
    for act in (
        lambda: facts(model.config),
        lambda: draw_architecture(model.config, tmp_path / "architecture.png"),
        lambda: look(Checkpoint(tmp_path / "model"), tmp_path / "look"),
    ):
        with pytest.raises(UserError, match="knows latent attention alone"):
            act()


def test_the_doctor_examines_but_does_not_run_it(tmp_path: Path) -> None:
    write_checkpoint(filled(plain(2)), tmp_path / "model")
    findings = examine(tmp_path / "model", "model")
    assert not [finding for finding in findings if finding.verdict == "fail"]
    assert "not run" in findings[-1].sentence


@pytest.mark.parametrize("name", ["nano", "demo", "small", "deepseek-v2-lite"])
@pytest.mark.parametrize("share", [1, 2, None], ids=["MQA", "two", "MHA"])
def test_equal_numbers_of_parameters(name: str, share: int | None) -> None:
    latent = preset(name)
    other = with_plain_attention(latent, share or latent.num_attention_heads)
    counts = [total_parameters(config, mtp=True) for config in (latent, other)]
    assert abs(counts[1] / counts[0] - 1) <= 0.01
    same = set(ModelConfig.model_fields) - {"attention", "num_key_value_heads", "v_head_dim", "kv_lora_rank"}
    same -= {"q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"}
    assert all(getattr(latent, key) == getattr(other, key) for key in same)


def test_no_width_is_said() -> None:
    with pytest.raises(UserError, match="No width"):
        with_plain_attention(tiny(num_attention_heads=64, q_lora_rank=1, kv_lora_rank=1), 64)
