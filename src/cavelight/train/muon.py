"""Muon: momentum made orthogonal, so that an update moves all directions of a matrix alike (Jordan et al., 2024).

torch.optim.Muon takes one matrix at a time; here stacked ones go together. Letters: a matrix has A rows and B columns.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MOMENTUM = 0.95
RMS = 0.2  # of an update's elements, about what AdamW's have
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at zero is greatest
EPS = 1e-7


class Muon:
    """Nesterov momentum, orthogonalised; weight decay as in AdamW.

    `matrices` are what it writes to, [A, B] or stacks of such, [..., A, B]. An update is scaled by 0.2 sqrt(max(A, B)),
    so that its elements are as large as AdamW's and the same learning rate and decay serve both (Moonlight report,
    eq. 4; arXiv 2502.16982). `dtype` is what the orthogonalisation is computed in.
    """

    def __init__(self, matrices: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.matrices, self.dtype = dict(matrices), dtype
        self.momentum = {name: torch.zeros_like(matrix) for name, matrix in self.matrices.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, weight_decay: float) -> None:
        """Of the matrices that have a gradient; the others and their momentum stay as they are."""
        for name, gradient in gradients.items():
            matrix, momentum = self.matrices[name], self.momentum[name].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM), self.dtype)
            matrix.mul_(1 - learning_rate * weight_decay)
            matrix.add_(update, alpha=-learning_rate * RMS * max(matrix.shape[-2:]) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        return dict(self.momentum)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(state[name])


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each matrix of [..., A, B] with its singular values brought near 1 (0.65 to 1.25), by Newton-Schulz iterations.

    Five of them do not finish the task: a singular value below some 0.003 of the matrix' norm stays smaller. Computed
    and returned in `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices  # the Gram matrix is then the smaller one
    x = wide.to(dtype).reshape(-1, *wide.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(wide.shape)
    return x.mT if tall else x
