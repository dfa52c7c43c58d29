"""What each part of one layer computes, taken down by hooks and ports from our layer and from transformers' layer.

A record is a dict from a part's name to its values, in the same shapes and order on both sides. PARTS lists them in
the order in which they are computed; a layer has those of its kind.

Letters: T tokens, D hidden size, H heads, N width without position, R rotary width, X = N + R, U value width,
C latent width, E experts, K experts a token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cavelight.model.block import Block
from cavelight.model.moe import MoE
from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.spec.config import ModelConfig

Record = dict[str, Tensor]
PARTS = (
    "input norm",  # [T, D]
    "query latent",  # [T, Q], past its norm
    "queries",  # [T, H * X], before RoPE
    "latent",  # [T, C], past its norm
    "rotary queries",  # [T, H, R], past RoPE
    "rotary key",  # [T, R], past RoPE
    "keys",  # [T, H, N]
    "values",  # [T, H, U]
    "attention scores",  # [H, T, T], 0 where not seen
    "mixed values",  # [T, H * U]
    "attention",  # [T, D], past o_proj
    "post-attention norm",  # [T, D]
    "gate scores",  # [T, E]
    "chosen experts",  # [T, E], 1 where chosen
    "gate weights",  # [T, E], 0 where not chosen
    "routed experts",  # [T, D]
    "shared experts",  # [T, D]
    "feed-forward",  # [T, D]
    "layer output",  # [T, D]
)
# What goes into a part, kept for the search for a cause.
INPUTS = ("layer input", "query latent before its norm", "latent and rotary key before", "post-attention norm input")
_OUTPUTS = {
    "input_layernorm": "input norm",
    "self_attn.q_a_proj": "query latent before its norm",
    "self_attn.q_a_layernorm": "query latent",
    "self_attn.q_proj": "queries",
    "self_attn.q_b_proj": "queries",
    "self_attn.kv_a_proj_with_mqa": "latent and rotary key before",
    "self_attn.kv_a_layernorm": "latent",
    "self_attn.o_proj": "attention",
    "post_attention_layernorm": "post-attention norm",
    "mlp.experts": "routed experts",
    "mlp.shared_experts": "shared experts",
    "mlp": "feed-forward",
}


@torch.no_grad()
def our_record(block: Block, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], config: ModelConfig) -> Record:
    """Run one of our layers on one sequence `x_TD` and take down its parts."""
    record: Record = {"layer input": x_TD}
    inner = PackedAttend((len(x_TD),))

    def attend(
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        k_up_HNC: Tensor,
        v_up_HUC: Tensor,
        scale: float,
    ) -> Tensor:
        k_nope_THN = torch.einsum("tc,hnc->thn", c_TC, k_up_HNC)
        values_THU = torch.einsum("tc,huc->thu", c_TC, v_up_HUC)
        k_rope_THR = k_rope_TR[:, None].expand(-1, k_nope_THN.shape[1], -1)
        q_THX, k_THX = (torch.cat(t, dim=-1) for t in ((q_nope_THN, q_rope_THR), (k_nope_THN, k_rope_THR)))
        _take_attention(record, q_THX, k_THX, values_THU, scale, config)
        o_THU = inner(layer, q_nope_THN, q_rope_THR, c_TC, k_rope_TR, k_up_HNC, v_up_HUC, scale)
        record["mixed values"] = o_THU.flatten(1)
        return o_THU

    def take_gate(_: nn.Module, __: object, routing: Routing) -> None:
        _take_routing(record, routing.scores_TE, routing.ids_TK, routing.weights_TK)

    with ExitStack() as hooks:
        _hook_outputs(hooks, block, record)
        if isinstance(block.mlp, MoE):
            hooks.enter_context(_removed(block.mlp.gate.register_forward_hook(take_gate)))
        record["layer output"] = block(x_TD, cos_sin, attend, GroupedDispatch())[0]
    return record


@dataclass
class TheirLayers:
    """Takes down each decoder layer of transformers as it runs, one at a time, and hands the record on.

    on_layer gets the layer's number, its record, and the position embeddings that it was given. The attention function
    is transformers' own port for it: `attention` is to be registered there, and calls `inner`, which computes.
    """

    config: ModelConfig
    inner: Callable[..., tuple[Tensor, Tensor | None]]
    on_layer: Callable[[int, Record, Any], None]
    record: Record = field(default_factory=dict)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        q_THX, k_THX, values_THU = (t[0].transpose(0, 1) for t in (query, key, value))
        _take_attention(self.record, q_THX, k_THX, values_THU, options["scaling"], self.config)
        mixed, weights = self.inner(module, query, key, value, mask, **options)
        self.record["mixed values"] = mixed[0].flatten(1)
        return mixed, weights

    @contextmanager
    def watching(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """While this lasts, each of these layers that runs is taken down."""
        with ExitStack() as hooks:
            for number, layer in layers.items():
                hooks.enter_context(_removed(layer.register_forward_pre_hook(self._begin, with_kwargs=True)))
                self._hook_parts(hooks, layer)
                end = partial(self._end, number)
                hooks.enter_context(_removed(layer.register_forward_hook(end, with_kwargs=True)))
            yield

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        self.record.clear()
        self.record["layer input"] = (inputs[0] if inputs else named["hidden_states"])[0]

    def _end(self, number: int, _: nn.Module, __: object, named: dict[str, Any], out: Tensor) -> None:
        self.record["layer output"] = out[0]
        self.on_layer(number, self.record, named["position_embeddings"])

    def _hook_parts(self, hooks: ExitStack, layer: nn.Module) -> None:
        # A context manager's record is the same dict for all layers: `_begin` empties it.
        _hook_outputs(hooks, layer, self.record)
        mlp = layer.get_submodule("mlp")
        if hasattr(mlp, "gate"):
            hooks.enter_context(_removed(mlp.get_submodule("gate").register_forward_hook(self._take_gate)))

    def _take_gate(self, _: nn.Module, __: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        """transformers' gates return the logits, then the weights and ids of the chosen."""
        logits_TE, weights_TK, ids_TK = out
        sigmoid = self.config.scoring_func == "sigmoid"
        scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
        _take_routing(self.record, scores_TE, ids_TK, weights_TK)


def _take_attention(
    record: Record, q_THX: Tensor, k_THX: Tensor, values_THU: Tensor, scale: float, config: ModelConfig
) -> None:
    widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
    record["rotary queries"] = q_THX.split(widths, dim=-1)[1]
    record["keys"], k_rope_THR = k_THX.split(widths, dim=-1)
    record["rotary key"] = k_rope_THR[:, 0]
    record["values"] = values_THU
    record["attention scores"] = (torch.einsum("thx,shx->hts", q_THX, k_THX) * scale).tril()


def _take_routing(record: Record, scores_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    record["gate scores"] = scores_TE
    record["chosen experts"] = torch.zeros_like(scores_TE).scatter(1, ids_TK, 1.0)
    record["gate weights"] = torch.zeros_like(scores_TE).scatter(1, ids_TK, weights_TK.to(scores_TE.dtype))


def _hook_outputs(hooks: ExitStack, layer: nn.Module, record: Record) -> None:
    def take(name: str, _: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out  # our MoE returns its routing too
        record[name] = out.flatten(0, -2)  # transformers has a batch axis
        if name == "post-attention norm":
            record["post-attention norm input"] = inputs[0].flatten(0, -2)

    modules = dict(layer.named_modules())
    for at, name in _OUTPUTS.items():
        if modules.get(at) is not None:
            hooks.enter_context(_removed(modules[at].register_forward_hook(partial(take, name))))


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
