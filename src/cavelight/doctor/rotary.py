"""Trap 1 by the weights alone: which rows of queries and keys form rotary pairs.

RoPE turns a pair's two rows into each other, so training leaves them about equally large, while rows of other pairs
turn at another frequency and differ. Large models show that; small ones often do not, and then nothing is said.

Letters: N, R per-head widths without and with RoPE, H heads, P pairs of one head.
"""

from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed
from cavelight.doctor.statistics import Statistics, Summary
from cavelight.spec.config import ModelConfig

CLEAR = 6.0  # standard errors, over layers
FEWEST = 8  # layers, below which a standard error means little
NARROWEST = 8  # rotary rows


def pairs(case: Case, found: Statistics) -> Iterator[Finding]:
    """Whether queries and keys are paired as adjacent rows, or as halves by a conversion for other engines."""
    config = case.config
    if config is None or config.qk_rope_head_dim < NARROWEST:
        return
    queries, keys = [], []
    for layer in range(config.num_layers_with_mtp):
        at = f"model.layers.{layer}.self_attn."
        q = found.tensors.get(f"{at}q_proj.weight") or found.tensors.get(f"{at}q_b_proj.weight")
        k = found.tensors.get(f"{at}kv_a_proj_with_mqa.weight")
        if q is not None and k is not None and not q.bad and not k.bad:
            queries.append(_rotary_rows(q, config.num_attention_heads, config))
            keys.append(_rotary_rows(k, 1, config))
    if len(keys) < FEWEST:
        yield passed("rope-pairs", "There are too few layers to see how rotary rows are paired; --level model does.", 1)
        return
    seen = {"queries": evidence(queries), "keys": evidence(keys)}
    numbers = {f"{which}_{how}": z for which, both in seen.items() for how, z in both.items()}
    wrong = [which for which, z in seen.items() if z["halves"] > CLEAR and z["halves"] > 2 * z["adjacent"]]
    right = [which for which, z in seen.items() if z["adjacent"] > CLEAR and which not in wrong]
    if wrong:
        z = max(seen[which]["halves"] for which in wrong)
        yield failed(
            "rope-pairs",
            f"The rotary rows of {' and '.join(wrong)} are paired as halves (i, i + {config.qk_rope_head_dim // 2}; "
            f"{z:.0f} standard errors), but this layout pairs neighbours (2i, 2i+1): undo the reordering.",
            1,
            **numbers,
        )
    elif right:
        said = f"Rotary rows of {' and '.join(right)} are paired as neighbours (2i, 2i+1)."
        yield passed("rope-pairs", said, 1, **numbers)
    else:
        said = "The weights do not show how rotary rows are paired; --level model does."
        yield passed("rope-pairs", said, 1, **numbers)


def _rotary_rows(summary: Summary, heads: int, config: ModelConfig) -> Tensor:
    """Logarithms of the norms of the rotary rows, [H, R]."""
    assert summary.squares_I is not None
    rows = summary.squares_I.reshape(heads, -1)[:, -config.qk_rope_head_dim :]
    return rows.clamp_min(1e-30).log() / 2


def evidence(layers: list[Tensor]) -> dict[str, float]:
    """How many standard errors partners are more alike than rows one pair further, under each of the two pairings.

    Frequencies fall from pair to pair and norms with them, so what is near in the file is alike under any pairing:
    hence the comparison with the next pair, at the same distance in the file or one row further.
    """
    adjacent, halves = [], []
    for rows_HR in layers:
        half = rows_HR.shape[1] // 2
        even_HP, odd_HP = rows_HR[:, 0::2], rows_HR[:, 1::2]
        across = (odd_HP[:, :-1] - even_HP[:, 1:]).abs() - (odd_HP - even_HP).abs()[:, :-1]
        adjacent.append(across.mean())
        low_HP, high_HP = rows_HR[:, :half], rows_HR[:, half:]
        further = (low_HP[:, :-1] - high_HP[:, 1:]).abs() - (low_HP - high_HP).abs()[:, :-1]
        halves.append(further.mean())
    return {"adjacent": _z(torch.stack(adjacent)), "halves": _z(torch.stack(halves))}


def _z(differences: Tensor) -> float:
    error = float(differences.std()) / sqrt(len(differences))
    return float(differences.mean()) / error if error > 0 else 0.0


CHECKS = (pairs,)
