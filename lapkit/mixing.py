"""Mixtures of predictive distributions: of an ensemble's networks, or of several Laplace approximations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """`sum_m pi_m v_m` of weights `(M,)` and values `(M, *)`."""
    return torch.tensordot(weights.to(values), values, dims=1)


def mixed(parts: Sequence[Distribution], weights: Tensor | None = None) -> Distribution:
    """`p(y|x) = sum_m pi_m p_m(y|x)`.

    Args:
        parts: distributions of one kind and shape.
        weights: pi, `(M,)`, which sum to one; equal by default.

    Returns:
        `Categorical` or independent `Bernoulli`, of which a mixture is one again; or a `MixtureSameFamily` of
        `MultivariateNormal`.

    Raises:
        TypeError: if a mixture of this kind has no closed form.
    """
    if weights is None:
        weights = torch.full((len(parts),), 1 / len(parts), dtype=torch.float64)
    if all(isinstance(part, MultivariateNormal) for part in parts):
        mean = torch.stack([part.mean for part in parts], dim=-2)
        root = torch.stack([part.scale_tril for part in parts], dim=-3)  # type: ignore[attr-defined]
        shares = Categorical(weights.to(mean).expand(*mean.shape[:-2], len(parts)))
        return MixtureSameFamily(shares, MultivariateNormal(mean, scale_tril=root))
    if all(isinstance(part, Categorical) for part in parts):
        return Categorical(weighted(weights, torch.stack([part.probs for part in parts])))  # type: ignore[attr-defined]
    if all(isinstance(part, Independent) and isinstance(part.base_dist, Bernoulli) for part in parts):
        return Independent(Bernoulli(weighted(weights, torch.stack([part.mean for part in parts]))), 1)
    raise TypeError(
        f"A mixture of {type(parts[0]).__name__} has no closed form here; take LaplaceMixture.predictive_samples."
    )
