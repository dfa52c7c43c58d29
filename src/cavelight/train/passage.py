"""One long passage through the trunk, over the latent cache, in pieces that fit into memory.

Letters: T tokens of a piece, D hidden size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cavelight.model.ports import GroupedDispatch
from cavelight.model.transformer import Transformer
from cavelight.run.cache import LatentCache
from cavelight.spec.config import ModelConfig

HIDDEN_AT_ONCE = 1 << 23  # numbers of hidden states up to which a passage goes through whole
PAIRS_AT_ONCE = 1 << 26  # of query and row, in a piece that comes after others and so needs a mask


@torch.inference_mode()
def hidden_of(
    model: Transformer, cache: LatentCache, tokens: Sequence[int], start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Hidden states before the final norm [T, D] of tokens at positions `start` on, piece by piece, each with the
    position of its first; the tokens' latent rows stay in the cache, those before `start` are in it."""
    device = model.lm_head.weight.device
    step = tokens_at_once(model.config, len(tokens), start)
    for first in range(0, len(tokens), step):
        tokens_T = torch.tensor(tokens[first : first + step], device=device)
        positions_T = torch.arange(start + first, start + first + len(tokens_T), device=device)
        hidden_TD, _ = model(tokens_T, positions_T, cache.at(start + first), GroupedDispatch())
        yield start + first, hidden_TD


def tokens_at_once(config: ModelConfig, length: int, start: int = 0) -> int:
    """Tokens of a piece: the whole passage of a small model, else so many that states and masks stay small."""
    room = HIDDEN_AT_ONCE // config.hidden_size
    if start == 0 and length <= room:
        return max(length, 1)
    return max(1, min(room, PAIRS_AT_ONCE // (start + length)))
