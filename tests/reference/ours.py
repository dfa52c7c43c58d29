"""The package's model, given the same Hugging Face-named weights as the restatement."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cavelight.model.ports import GroupedDispatch, PackedAttend
from cavelight.model.router import Routing
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.weights.names import hf_tensors, load_hf_dict

Weights = dict[str, Tensor]


def our_model(config: ModelConfig, weights: Weights) -> Transformer:
    model = Transformer(config, dtype=torch.float32)
    load_hf_dict(model, weights)
    return model


def in_hf_names(config: ModelConfig, tensors: Weights) -> Weights:
    """What stands under our parameters' names (weights, gradients) under those of the checkpoint, copies left out."""
    return {tensor.name: tensor.pack(tensors) for tensor in hf_tensors(config) if not tensor.is_copy}


def our_logits(
    config: ModelConfig, weights: Weights, tokens_T: Sequence[int], positions_T: Sequence[int]
) -> tuple[Tensor, list[Routing]]:
    """Logits [T, V] of one sequence, and the routing of each MoE layer in turn."""
    model, attend = our_model(config, weights), PackedAttend([len(tokens_T)])
    with torch.no_grad():
        hidden_TD, routings = model(
            torch.tensor(list(tokens_T)), torch.tensor(list(positions_T)), attend, GroupedDispatch()
        )
        return model.head(hidden_TD), routings


def our_chain_logits(config: ModelConfig, weights: Weights, tokens_T: Sequence[int]) -> list[Tensor]:
    """Logits of the main model [T, V] and of each MTP module k [T-k, V], on one sequence from position 0."""
    model, tokens = our_model(config, weights), torch.tensor(list(tokens_T))
    with torch.no_grad():
        hidden_TD, _ = model(tokens, torch.arange(len(tokens)), PackedAttend([len(tokens)]), GroupedDispatch())
        logits = [model.head(hidden_TD)]
        for depth in range(1, config.num_nextn_predict_layers + 1):
            left = len(tokens) - depth
            hidden_TD, _ = model.draft(
                depth - 1, hidden_TD[:left], tokens[depth:], torch.arange(left), PackedAttend([left]), GroupedDispatch()
            )
            logits.append(model.draft_head(depth - 1, hidden_TD))
    return logits
