"""One training step of the report, stated plainly: losses, gradients and the update of the routing biases.

A batch is a list of rows; a row is a list of documents (token ids) packed one after another. No label crosses into
another document; whether attention does is the caller's choice (V3's pre-training let it). The model reads all but the
last token of a row, so a row of T+1 tokens is the report's sequence of T inputs and T labels.

T tokens read of a row, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cavelight.spec.config import ModelConfig

from .report import Routing, Weights, head, is_moe, largest, predict_further, trunk

Row = list[list[int]]


@dataclass
class Step:
    """The parts of a step's loss (each a scalar with gradient) and how often each MoE layer chose each expert."""

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    counts: dict[int, list[int]]
    mtp_weight: float

    @property
    def loss(self) -> Tensor:
        """L_main + alpha L_balance + lambda / D * sum_k L_k; alpha is in `balance` already."""
        further = sum(self.mtp) * self.mtp_weight / len(self.mtp) if self.mtp else 0
        return self.main + self.balance + further


@dataclass(frozen=True)
class Tokens:
    """A row laid out: its tokens, and the document each belongs to."""

    ids: list[int]
    documents: list[int]

    @classmethod
    def of(cls, row: Row) -> "Tokens":
        return cls([t for document in row for t in document], [n for n, document in enumerate(row) for _ in document])

    def has_label(self, i: int, depth: int) -> bool:
        """Depth k predicts t_(i+k+1), which must be there and in the same document. Depth 0 is the main model."""
        label = i + depth + 1
        return label < len(self.ids) and self.documents[label] == self.documents[i]

    def labelled(self, depth: int) -> list[int]:
        return [i for i in range(len(self.ids)) if self.has_label(i, depth)]


def log_likelihood(tokens: Tokens, depth: int, logits_TV: Tensor) -> Tensor:
    """Sum of log P(label) over the positions that have one."""
    total = logits_TV.new_zeros(())
    for i in tokens.labelled(depth):
        total = total + logits_TV[i, tokens.ids[i + depth + 1]] - torch.logsumexp(logits_TV[i], dim=0)
    return total


def balance_of(config: ModelConfig, routing: Routing) -> Tensor:
    """sum_i f_i P_i over one row, V3 report equations 17 to 20.

    V3 counts the K best plain scores, whatever the bias and the groups chose; V2 counts what was chosen.
    """
    tokens, experts, chosen_per_token = len(routing.ids_TK), config.n_routed_experts, config.num_experts_per_tok
    chosen = [0] * experts
    for ids, scores_E in zip(routing.ids_TK, routing.scores_TE, strict=True):
        by_score = largest(scores_E.tolist(), chosen_per_token)
        for expert in by_score if config.topk_method == "noaux_tc" else ids:
            chosen[expert] += 1
    p_E = sum(scores_E / scores_E.sum() for scores_E in routing.scores_TE) / tokens
    return sum(experts / (chosen_per_token * tokens) * chosen[i] * p_E[i] for i in range(experts))


@dataclass
class RowResult:
    """One row's part of a step: log likelihood at each depth, and the routing of each MoE layer by its number."""

    likelihoods: list[Tensor]
    routings: dict[int, Routing]


def only(routing: Routing, kept: list[int]) -> Routing:
    """The routing of some of the positions."""
    return Routing([routing.ids_TK[i] for i in kept], routing.weights_TK[kept], routing.scores_TE[kept])


def run_row(weights: Weights, config: ModelConfig, row: Row, across: bool) -> RowResult:
    """The main model on the T tokens read, then each module on the positions whose t_(i+k) is in the row.

    `across` lets attention look into earlier documents of a row. Only labelled positions count in a module's routing.
    """
    tokens = Tokens.of(row)
    read = len(tokens.ids) - 1
    seen = [0] * read if across else tokens.documents[:read]
    hidden_TD, routings = trunk(weights, config, tokens.ids[:read], range(read), seen)
    layers = [layer for layer in range(config.num_hidden_layers) if is_moe(config, layer)]
    routed = dict(zip(layers, routings, strict=True))
    likelihoods = [log_likelihood(tokens, 0, head(weights, config, 0, hidden_TD))]
    for depth in range(1, config.num_nextn_predict_layers + 1):
        left = len(tokens.ids) - depth
        hidden_TD, routing = predict_further(
            weights, config, depth, hidden_TD[:left], tokens.ids[depth:], range(left), seen[:left]
        )
        likelihoods.append(log_likelihood(tokens, depth, head(weights, config, depth, hidden_TD)))
        if routing and tokens.labelled(depth):
            routed[config.num_hidden_layers + depth - 1] = only(routing, tokens.labelled(depth))
    return RowResult(likelihoods, routed)


def step(
    weights: Weights,
    config: ModelConfig,
    rows: list[Row],
    mtp_weight: float,
    balance_weight: float,
    across: bool = False,
) -> Step:
    """The losses of one optimizer step over a batch.

    Main and MTP losses are divided by N, the number of main labels in the step (the report's T on one sequence).
    The balance loss is alpha times the mean over rows of the sum over MoE layers.
    """
    results = [run_row(weights, config, row, across) for row in rows]
    labels = sum(len(Tokens.of(row).labelled(0)) for row in rows)
    losses = [-sum(parts) / labels for parts in zip(*(r.likelihoods for r in results), strict=True)]
    layers = [n for n in range(config.num_hidden_layers + config.num_nextn_predict_layers) if is_moe(config, n)]
    counts = {layer: [0] * config.n_routed_experts for layer in layers}
    balance = losses[0].new_zeros(())
    for result in results:
        for layer, routing in result.routings.items():
            balance = balance + balance_weight / len(rows) * balance_of(config, routing)
            for ids in routing.ids_TK:
                for expert in ids:
                    counts[layer][expert] += 1
    return Step(losses[0], losses[1:], balance, counts, mtp_weight)


def gradients(weights: Weights, loss: Tensor) -> Weights:
    """The gradient of every tensor that took part; `weights` are the leaves the loss was computed from."""
    leaves = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def updated_biases(weights: Weights, counts: dict[int, list[int]], speed: float) -> Weights:
    """b_i += gamma * sign(mean(c) - c_i) in every MoE layer: up for the underloaded, down for the overloaded."""
    biases = {}
    for layer, chosen in counts.items():
        name, mean = f"model.layers.{layer}.mlp.gate.e_score_correction_bias", sum(chosen) / len(chosen)
        signs = torch.tensor([(mean > c) - (mean < c) for c in chosen], dtype=weights[name].dtype)
        biases[name] = weights[name].detach() + speed * signs
    return biases
