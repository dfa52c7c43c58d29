"""A tiny model that has truly learnt something, in seconds: how it is read then matters, as with released checkpoints.

The language has V letters: which comes next depends on the last two by a fixed random table, and one time in eight on
nothing. So attention has to find the neighbour (positions matter), experts hold the table (gates matter), and an MTP
module can know the letter after next.

Letters: T tokens, V vocabulary.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig

from .reference.tiny import tiny

V, ROW, ROWS = 16, 32, 12


def learner(**changes: Any) -> ModelConfig:
    small = {"vocab_size": V, "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2}
    small |= {"max_position_embeddings": ROW}
    return tiny(**(small | changes))


def text(count: int, seed: int) -> Tensor:
    """So many letters of the language [T]."""
    table_VV = torch.randint(V, (V, V), generator=torch.Generator().manual_seed(7)).tolist()
    source = torch.Generator().manual_seed(seed)
    strays = torch.randint(8 * V, (count,), generator=source).tolist()
    letters = [0, 1]
    for stray in strays[2:]:
        letters.append(stray if stray < V else table_VV[letters[-1]][letters[-2]])
    return torch.tensor(letters)


@cache
def trained(config: ModelConfig, steps: int = 160, seed: int = 0) -> Transformer:
    """A model of this configuration after so many steps of Adam; its routing biases stay as they were drawn."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, parameter.shape[-1] ** -0.5)
        for buffer in model.buffers():
            buffer.normal_(0, 0.3)
        model.model.norm.weight.uniform_(0.1, 2.0)  # so that MTP's input differs before and behind it
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98), fused=True)
    whole = text(steps * ROW * ROWS, seed=seed + 1).split(ROW * ROWS)
    for step, tokens_T in enumerate(whole):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss_of(model, tokens_T).backward()
        optimizer.step()
    return model.requires_grad_(False)


def loss_of(model: Transformer, tokens_T: Tensor) -> Tensor:
    """Of the trunk and of all modules; labels at a row's end, which lie in the next row, are left out."""
    positions_T, attend = torch.arange(ROW).repeat(ROWS), PackedAttend((ROW,) * ROWS)
    hidden_TD, _ = model(tokens_T, positions_T, attend, GroupedDispatch())
    total = _nll(model.head(hidden_TD), tokens_T, positions_T, 1)
    for depth in range(len(model.mtp)):
        next_T = tokens_T.roll(-depth - 1)
        hidden_TD, _ = model.draft(depth, hidden_TD, next_T, positions_T, attend, GroupedDispatch())
        total = total + 0.5 * _nll(model.draft_head(depth, hidden_TD), tokens_T, positions_T, depth + 2)
    return total


def _nll(logits_TV: Tensor, tokens_T: Tensor, positions_T: Tensor, ahead: int) -> Tensor:
    kept_T = positions_T < ROW - ahead
    return F.cross_entropy(logits_TV[kept_T], tokens_T.roll(-ahead)[kept_T])
