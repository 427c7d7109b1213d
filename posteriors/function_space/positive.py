"""Positive hyper-parameters of gpytorch: kept as logarithms of whatever type, used in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.posteriors.function_space.gaussian_processes import gpytorch


def by_logarithm() -> gpytorch.constraints.Positive:
    """The constraint of a parameter that is the logarithm of a positive number.

    A module's parameters are cast with it, and BoTorch's analytic acquisition functions cast their model to the type of
    the inputs; the numbers that are made of the parameters stay in double precision.

    Returns:
        A constraint whose transform is `exp`, of doubles.
    """
    return gpytorch.constraints.Positive(transform=_exponential, inv_transform=torch.log)


def _exponential(logarithm: Tensor) -> Tensor:
    return logarithm.double().exp()
