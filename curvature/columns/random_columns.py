"""Unbiased estimates of the exact GGN's columns, with fewer of them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns, LazyColumns
from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import Likelihood


@dataclass(frozen=True)
class RandomSignGGN(Columns):
    """An unbiased estimate of the exact GGN for T positions with K columns instead of `K T`.

    The columns of an example's positions are added up with independent random signs, `s_k = sum_t sign_t s_kt`: their
    products are `sum_t s_kt s_kt^T` on average. With one position they are exact.

    Args:
        samples: how many independent sets of signs, M, the estimate is the mean of; `K M` columns.
        seed: of the signs; that of the pass over the data by default.

    Raises:
        TypeError: if the number of samples is no integer.
        ValueError: if there is not at least one sample.

    Reference:
        Martens, Sutskever and Swersky, Estimating the Hessian by back-propagating curvature, 2012.
    """

    samples: int = 1
    seed: int | None = None
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _at_least_one(self.samples)

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> LazyColumns:
        """The columns of all positions together; number `m * K + k` is column k with the m-th signs."""
        draws, count = _draws(draws, self.seed, f), likelihood.rank(f)

        def compute(part: range) -> Tensor:
            pieces = [f.new_empty(0, *f.shape)]
            for m in range(part.start // count, -(-part.stop // count)):
                own = slice(max(part.start - m * count, 0), min(part.stop - m * count, count))
                signs = draws.signs(m, *f.shape[1:-1], 1, dtype=f.dtype) / self.samples**0.5
                pieces.append(likelihood.hessian_root(f, y, own) * signs)
            return torch.cat(pieces)

        return LazyColumns(count * self.samples, compute, f.dtype)


@dataclass(frozen=True)
class MonteCarloGGN(Columns):
    """An unbiased estimate with M columns: `s_m = sqrt(precision / M) d loss(f, y_m) / df`, `y_m ~ p(y|f)`.

    Positions are sampled independently, so M columns serve all of them.

    Args:
        samples: the number of columns M.
        seed: of the samples; that of the pass over the data by default.

    Raises:
        TypeError: if the number of samples is no integer.
        ValueError: if there is not at least one.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (5.8), (5.9).
    """

    samples: int = 1
    seed: int | None = None
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _at_least_one(self.samples)

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> LazyColumns:
        """Gradients at sampled targets; the precision makes their covariance that of a unit dispersion."""
        draws = _draws(draws, self.seed, f)

        def compute(part: range) -> Tensor:
            columns = [likelihood.sampled_column(f, y, draws, m) / self.samples**0.5 for m in part]
            return torch.stack(columns) if columns else f.new_empty(0, *f.shape)

        return LazyColumns(self.samples, compute, f.dtype)


def _at_least_one(samples: int) -> None:
    """Refuse no samples.

    Raises:
        TypeError: if their number is no integer.
        ValueError: if there is not at least one.
    """
    if isinstance(samples, bool) or not isinstance(samples, Integral):
        raise TypeError(f"The number of Monte Carlo samples is an integer, got samples={samples!r}.")
    if samples < 1:
        raise ValueError(f"At least one Monte Carlo sample is needed, got {samples}.")


def _draws(draws: Draws | None, seed: int | None, f: Tensor) -> Draws:
    if draws is None:
        draws = Draws.fresh(len(f), device=f.device)
    return draws if seed is None else draws.reseeded(seed)
