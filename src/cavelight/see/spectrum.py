"""How many directions of a latent are in use: singular values of the maps into it, out of it, and through it.

A latent c = W_a x is normed, weighted by g, and read by W_b, so three maps tell of it:
  written  diag(g) W_a     what comes to lie in the cached latent
  read     W_b diag(g)     what keys and values of all heads take from the normed latent
  through  W_b diag(g) W_a both at once; scaling a coordinate up in W_a and down in W_b leaves it as it is
W_a includes the weight of the norm before it. Inputs count as alike in all directions: weights alone are seen, and
text may use fewer. All comes from Gram matrices, C x C or Q x Q, so that nothing larger than one of the two matrices
has to be held; eigenvalues are squared singular values, in float64 exact down to about 1e-8 of the largest.

Letters: C rank of the latent (here also for the queries' Q).
"""

from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor

from cavelight.see.figure import Floats

ENERGY = 0.99


@dataclass(frozen=True, slots=True)
class Spectra:
    """Singular values of the three maps, falling, [C] each; NaN where a weight is not finite."""

    written: Floats
    read: Floats
    through: Floats


def gram(rows: Tensor) -> Tensor:
    """rows^T rows, [C, C], of a block of rows [o, C] in float64."""
    return rows.T @ rows


def spectra(down_CC: Tensor, norm_C: Tensor, up_CC: Tensor) -> Spectra:
    """From W_a W_a^T, the norm's weight g, and W_b^T W_b."""
    written_CC = norm_C[:, None] * down_CC * norm_C
    read_CC = norm_C[:, None] * up_CC * norm_C
    if not (written_CC.isfinite().all() and read_CC.isfinite().all()):
        unknown = np.full(len(norm_C), nan)
        return Spectra(unknown, unknown, unknown)
    energies_C, directions_CC = torch.linalg.eigh(down_CC)
    root_CC = directions_CC * energies_C.clamp(min=0).sqrt()  # root root^T = W_a W_a^T
    return Spectra(_singular(written_CC), _singular(read_CC), _singular(root_CC.T @ read_CC @ root_CC))


def _singular(gram_CC: Tensor) -> Floats:
    values: Floats = torch.linalg.eigvalsh(gram_CC).clamp(min=0).sqrt().flip(0).numpy()
    return values


def effective_rank(singular: Floats) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): C if all are equal, 1 if one is."""
    if not singular.sum() > 0:
        return nan if np.isnan(singular).any() else 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def participation_ratio(singular: Floats) -> float:
    """(sum of squares)^2 / sum of fourth powers: how many directions share the energy evenly."""
    if not singular.sum() > 0:
        return nan if np.isnan(singular).any() else 0.0
    energy = (singular / singular[0]) ** 2
    return float(energy.sum() ** 2 / (energy**2).sum())


def energy_rank(singular: Floats, share: float = ENERGY) -> float:
    """The least number of directions that hold `share` of the energy, the sum of squares."""
    if not singular.sum() > 0:
        return nan if np.isnan(singular).any() else 0.0
    energy = np.cumsum((singular / singular[0]) ** 2)
    return float(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)
