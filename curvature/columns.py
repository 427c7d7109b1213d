"""Which curvature: the output-space columns `S_n` of `H = sum_n J_n^T S_n S_n^T J_n`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lapkit.curvature.likelihoods import Likelihood


class Columns(ABC):
    """Makes the columns `(K, N, C)` that are sent back through the network.

    The curvature is that of the loss, free of dispersion; `dispersion_power` says how it scales with the likelihood's
    precision.
    """

    dispersion_power: ClassVar[int] = 1

    @abstractmethod
    def __call__(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Columns `(K, N, C)` for outputs `f` `(N, C)` and checked targets `y`."""


def loss_gradient(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """`d loss / df` of each example, `(N, C)`."""
    with torch.enable_grad():
        leaf = f.detach().requires_grad_()
        return torch.autograd.grad(likelihood.loss(leaf, y).sum(), leaf)[0]


@dataclass(frozen=True)
class GGN(Columns):
    """The exact generalised Gauss-Newton, for these likelihoods the Fisher: `S S^T = d^2 loss / df^2`.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.15b) and (5.6); the number of columns is the rank of the
        Hessian.
    """

    def __call__(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The likelihood's own root; labels and generator do not matter."""
        return likelihood.hessian_root(f)


@dataclass(frozen=True)
class MonteCarloGGN(Columns):
    """An unbiased estimate with M columns: `s_m = sqrt(precision / M) d loss(f, y_m) / df`, `y_m ~ p(y|f)`.

    Args:
        samples: the number of columns M.

    Raises:
        ValueError: if there is not at least one.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (5.8), (5.9).
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"At least one Monte Carlo sample is needed, got {self.samples}.")

    def __call__(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Gradients at sampled targets; the precision makes their covariance that of a unit dispersion."""
        draws = [loss_gradient(likelihood, f, likelihood.sample(f, generator)) for _ in range(self.samples)]
        return torch.stack(draws) * (likelihood.precision / self.samples) ** 0.5


@dataclass(frozen=True)
class EmpiricalFisher(Columns):
    """One column an example, the gradient at the observed label.

    This gives the uncentred covariance of gradients, which is not a curvature in general.
    The gradient of a log likelihood carries the precision once, its outer product twice.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.29).
    """

    dispersion_power: ClassVar[int] = 2

    def __call__(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The gradient of the loss at the data's own targets."""
        return loss_gradient(likelihood, f, y)[None]
