"""Tiny models to generate with: random ones, and ones whose drafts are often right."""

from typing import Any

import torch
from torch import Tensor

from cavelight.model.mtp import MTPModule
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig

from .reference.tiny import tiny


def small_config(**changes: object) -> ModelConfig:
    """Two layers, grouped experts, no end token, so that only the number of tokens ends a generation."""
    groups: dict[str, Any] = {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1, "eos_token_id": None}
    return tiny(**(groups | changes))


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """Every part makes a visible difference; the drafts of such a model are right by chance alone."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.2) if parameter.ndim == 1 else (0.0, min(max(parameter.shape[-1] ** -0.5, 0.1), 0.3))
            parameter.normal_(mean, std, generator=generator)
        for buffer in model.buffers():
            buffer.normal_(0, 0.3, generator=generator)
    return model.to(dtype)


def drafting_model(config: ModelConfig, seed: int = 0, surprise: float = 0.5) -> Transformer:
    """The next token hangs mostly on the last one, in the trunk as in the modules, so drafts are often right.

    `surprise` scales what layers add to the residual stream, and with it how often the drafts are wrong.
    """
    model = random_model(config, seed)
    D = config.hidden_size
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.mul_(surprise)
        for module in model.mtp:
            assert isinstance(module, MTPModule)
            module.eh_proj.weight.mul_(0.1 * surprise)
            module.eh_proj.weight[:, :D] += torch.eye(D)
            module.enorm.weight.fill_(1)
            module.norm.weight.copy_(model.model.norm.weight * (1 + 0.1 * module.norm.weight))
    return model


def some_prompts(config: ModelConfig, count: int, longest: int = 12) -> list[list[int]]:
    """Prompts of every length from 1 on."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(config.vocab_size, (1 + n % longest,), generator=generator).tolist() for n in range(count)]


class TableModel:
    """Stands in for a Transformer where thousands of generations are needed: its logits are looked up.

    The trunk's logits hang on the token and the position, a module's on its token, the position and how often it was
    applied to its own output. Nothing of it uses the cache.
    """

    def __init__(self, V: int, modules: int, seed: int = 0) -> None:
        self.config = small_config(
            vocab_size=V, num_nextn_predict_layers=modules, bos_token_id=0, max_position_embeddings=16
        )
        source = torch.Generator().manual_seed(seed)
        self.trunk_PVV = 1.5 * torch.randn(16, V, V, generator=source)
        self.modules_DPVV = 1.5 * torch.randn(modules, 16, V, V, generator=source)
        self.lm_head = torch.nn.Linear(1, V)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, *_: object) -> tuple[Tensor, list[Routing]]:
        return self.trunk_PVV[positions_T, tokens_T], []

    def head(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD

    def draft(
        self, depth: int, hidden_TD: Tensor, tokens_T: Tensor, positions_T: Tensor, *_: object, after: int
    ) -> tuple[Tensor, list[Routing]]:
        return self.modules_DPVV[depth, positions_T, tokens_T] + 0.3 * hidden_TD, []

    def draft_head(self, depth: int, hidden_TD: Tensor) -> Tensor:
        return hidden_TD
