"""Whether counts agree with the probabilities that they should come from."""

from collections.abc import Mapping, Sequence

import torch

SURELY_NOT = 1e-9  # below this a deviation cannot be luck
COMMON = 1e-3  # fixed seeds: a p-value seen once above this is seen always


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's p-value; cells expected less than five times are taken together, impossible ones must be empty."""
    total = sum(counts)
    pairs = sorted((p * total, c) for c, p in zip(counts, probabilities, strict=True))
    if any(c for expected, c in pairs if expected == 0):
        return 0.0
    cells = [(0.0, 0)]
    for expected, count in pairs:
        if cells[-1][0] >= 5:
            cells.append((0.0, 0))
        cells[-1] = (cells[-1][0] + expected, cells[-1][1] + count)
    assert len(cells) > 1, "too few to say anything"
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def chi_square_of(seen: Mapping[tuple[int, ...], int], joint: Mapping[tuple[int, ...], float]) -> float:
    """The same for outcomes by name; an outcome that is not in `joint` is impossible."""
    if seen.keys() - joint.keys():
        return 0.0
    return chi_square([seen.get(outcome, 0) for outcome in joint], list(joint.values()))
