"""The whole model: trunk, head and MTP chain, on flat tokens.

Letters: T tokens of all sequences in one row (no batch axis, no padding), D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn

from cavelight.kernels import cross_entropy
from cavelight.model.block import Block
from cavelight.model.layers import Linear, RMSNorm, Rotary
from cavelight.model.mtp import MTPModule
from cavelight.model.ports import Attend, Dispatch, GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.spec.config import ModelConfig

NO_LABEL = -100  # in place of a label: nothing is to be predicted there
TRUNK = -1  # as `after`: the hidden state came from the trunk, not from an MTP module


class Trunk(nn.Module):
    """Embedding and layers. Ends before the final norm, since MTP may want the state from there."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
        )
        self.layers = nn.ModuleList(Block(config, n, dtype, device) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)

    def forward(
        self, tokens_T: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, list[Routing]]:
        hidden_TD, routings = self.embed_tokens(tokens_T), []
        for layer in self.layers:
            hidden_TD, routing = layer(hidden_TD, cos_sin, attend, dispatch)
            if routing is not None:
                routings.append(routing)
        return hidden_TD, routings


class Transformer(nn.Module):
    """A DeepSeek-V2/V3-style language model. Parameters are named as in Hugging Face checkpoints (see spec/shapes).

    A new one holds no sensible weights: `train` initialises them, `weights` reads them.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, dtype, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, device)
        depths = range(config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPModule(config, config.num_hidden_layers + d, dtype, device) for d in depths)
        self.rotary = Rotary(config)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, dispatch: Dispatch
    ) -> tuple[Tensor, list[Routing]]:
        """Hidden states before the final norm [T, D], and each MoE layer's routing, in the layers' order."""
        result: tuple[Tensor, list[Routing]] = self.model(tokens_T, self.rotary(positions_T), attend, dispatch)
        return result

    def head(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits [T, V], float32."""
        logits_TV: Tensor = self.lm_head(self.model.norm(hidden_TD))
        return logits_TV.float()

    def nll(self, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        """Sum of the labels' -log p by `head`, in nats, float32; NO_LABEL counts nothing. All logits never stand."""
        return cross_entropy.linear(self.model.norm(hidden_TD), self.lm_head.weight, labels_T, NO_LABEL)

    def draft(
        self,
        depth: int,
        hidden_TD: Tensor,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        dispatch: Dispatch,
        after: int | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """One step of the MTP chain: MTP module `depth` (from 0) on the hidden states of the step before.

        hidden_TD: states before their norm, of the trunk or of MTP module `after` (depth - 1 unless told; the last
        module applied to its own output makes longer drafts). tokens_T: at row i the token depth + 1 places after
        the one at i. Returns the module's hidden states before its norm, and its routing. V3 report, eq. 21-22.
        """
        after = depth - 1 if after is None else after
        if self.config.mtp_hidden == "post_norm":
            hidden_TD = self._norm_after(after)(hidden_TD)
        embedding_TD = self.model.embed_tokens(tokens_T)
        hidden_TD, routing = self.mtp[depth](hidden_TD, embedding_TD, self.rotary(positions_T), attend, dispatch)
        return hidden_TD, [routing] if routing is not None else []

    def draft_head(self, depth: int, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] of the token depth + 2 places on, by the shared head (V3 report, eq. 23); float32."""
        logits_TV: Tensor = self.lm_head(self._norm_after(depth)(hidden_TD))
        return logits_TV.float()

    def draft_nll(self, depth: int, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        """As `nll`, by `draft_head`."""
        return cross_entropy.linear(self._norm_after(depth)(hidden_TD), self.lm_head.weight, labels_T, NO_LABEL)

    def _norm_after(self, module: int) -> RMSNorm:
        """The norm before the head, of the trunk or of an MTP module."""
        norm = self.model.norm if module == TRUNK else self.mtp[module].norm
        assert isinstance(norm, RMSNorm)
        return norm

    def logits(self, tokens_T: Tensor) -> Tensor:
        """Next-token logits [T, V] of one sequence, without a cache."""
        positions_T = torch.arange(tokens_T.shape[0], device=tokens_T.device)
        hidden_TD, _ = self(tokens_T, positions_T, PackedAttend((tokens_T.shape[0],)), GroupedDispatch())
        return self.head(hidden_TD)
