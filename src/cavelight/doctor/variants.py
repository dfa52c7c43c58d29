"""Copies of a model that compute one thing differently, and how well each predicts a text.

Letters: T tokens of all rows, B rows of W tokens each, D hidden size.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cavelight.model.layers import Rotary
from cavelight.model.mla import MLA, softmax_scale
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.transformer import Transformer

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 512  # tokens, since each has a whole vocabulary of them
BLOCK = 16  # neighbouring tokens are alike: differences are judged by their means over so many


def variant(model: Transformer, **changes: Any) -> Transformer:
    """A copy that shares every weight, with fields of its configuration changed.

    The changed configuration is not checked, since most variants are mistakes that no checkpoint should ask for.
    """
    changed = model.config.model_copy(update=changes)
    kept: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, kept | {id(model.config): changed})  # all modules refer to the one configuration
    copied.rotary = Rotary(changed)
    for module in copied.modules():
        if isinstance(module, MLA):
            module.scale = softmax_scale(changed)
    return copied


def repeats_itself(tokens_T: Tensor) -> bool:
    """Whether most runs of 16 tokens occur again: then differences that are counted often are one and the same."""
    runs = tokens_T.unfold(0, BLOCK, 1)
    return 2 * len(runs.unique(dim=0)) < len(runs)


def windows(tokens_T: Sequence[int] | Tensor, width: int, most: int) -> list[Tensor]:
    """The first `most` tokens in rows [B, W] of `width` tokens; what is left is a row of its own from 8 tokens on."""
    tokens_T = torch.as_tensor(tokens_T)[:most].long()
    whole = len(tokens_T) // width * width
    rows = tokens_T[:whole].view(-1, width).split(max(TOKENS_AT_ONCE // width, 1)) if whole else ()
    return [*rows, tokens_T[None, whole:]] if len(tokens_T) - whole >= 8 else list(rows)


@torch.inference_mode()
def hidden_states(model: Transformer, tokens_BW: Tensor) -> Tensor:
    """The trunk's hidden states before the final norm, [B, W, D]."""
    hidden_TD: Tensor = model(tokens_BW.flatten(), *layout(tokens_BW))[0]
    return hidden_TD.view(*tokens_BW.shape, -1)


def layout(tokens_BW: Tensor) -> tuple[Tensor, PackedAttend, GroupedDispatch]:
    """Positions [T] and ports for rows that do not see one another."""
    B, W = tokens_BW.shape
    return torch.arange(W).repeat(B), PackedAttend((W,) * B), GroupedDispatch()


@torch.inference_mode()
def nats(model: Transformer, rows: Sequence[Tensor]) -> Tensor:
    """-log p of each token but a row's first, float32, all rows' in one."""
    losses = []
    for tokens_BW in rows:
        hidden_TD = hidden_states(model, tokens_BW[:, :-1]).flatten(0, 1)
        told = zip(hidden_TD.split(LOGITS_AT_ONCE), tokens_BW[:, 1:].flatten().split(LOGITS_AT_ONCE), strict=True)
        losses += [F.cross_entropy(model.head(some_TD), labels_T, reduction="none") for some_TD, labels_T in told]
    return torch.cat(losses)


def mean_and_z(differences_T: Tensor) -> tuple[float, float]:
    """The mean of paired differences, and how many standard errors it is away from zero (by blocks of neighbours)."""
    blocks = torch.stack([block.mean() for block in differences_T.double().split(BLOCK) if len(block) == BLOCK])
    error = float(blocks.std()) / len(blocks) ** 0.5
    mean = float(differences_T.double().mean())
    return mean, mean / error if error > 0 else 0.0
