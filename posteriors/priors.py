"""The Gaussian prior over the weights: one precision, one for each parameter tensor, or one for each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.operators.operator import spread
from lapkit.curvature.parameters import Parameters


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """`N(mean, diag(precision)^{-1})`.

    Args:
        precision: positive; a number, `(L,)` with one entry for each parameter tensor (weight and bias of a layer are
            two), or `(P,)`. A weight decay `d` on a *mean* loss over N examples corresponds to the precision `N d`.
        mean: a number or `(P,)`.

    Raises:
        TypeError: if one is no number, tensor or list of numbers.
        ValueError: if the precision is not positive and finite, the mean is not finite, or one has more than one axis.

    Example:
        >>> from torch import nn
        >>> from lapkit.curvature import Parameters
        >>> GaussianPrior(2.0).diagonal(Parameters.of(nn.Linear(1, 1)))
        tensor([2., 2.])
    """

    precision: Tensor | float = 1.0
    mean: Tensor | float = 0.0

    def __post_init__(self) -> None:
        precision, mean = _numbers(self.precision, "precision"), _numbers(self.mean, "mean")
        if precision.ndim > 1 or precision.numel() == 0:
            raise ValueError(f"A prior precision is a number or a vector, got shape {tuple(precision.shape)}.")
        low, high = _range(precision)
        if not 0 < low <= high < math.inf:
            raise ValueError(f"Prior precisions must be positive and finite, got values between {low:g} and {high:g}.")
        if mean.ndim > 1 or mean.numel() == 0 or not all(map(math.isfinite, _range(mean))):
            raise ValueError(f"A prior mean is a finite number or vector, got shape {tuple(mean.shape)}: {mean}.")

    def values(self, parameters: Parameters) -> Tensor:
        """The precision as it was given, in the weights' place: one number `()`, `(L,)` or `(P,)`.

        Args:
            parameters: the weights that the prior is over.

        Returns:
            Differentiable in the precision.

        Raises:
            ValueError: if the precision's length is neither 1 nor the number of tensors or of weights.
        """
        precision = _beside(parameters, self.precision)
        if precision.numel() == 1:
            return precision.reshape(())
        if len(precision) in (len(parameters.tensors), parameters.numel):
            return precision
        raise ValueError(
            f"Expected 1 prior precision, {len(parameters.sizes)} (one for each parameter tensor) or "
            f"{parameters.numel} (one for each weight), got {len(precision)}."
        )

    def shift(self, parameters: Parameters) -> Tensor:
        """The precision as one number `()` or one for each weight `(P,)`; see `values`."""
        values = self.values(parameters)
        return spread(values, parameters.sizes) if values.shape == (len(parameters.tensors),) else values

    def centre(self, parameters: Parameters) -> Tensor:
        """The mean as one number `()` or one for each weight `(P,)`, in the weights' type and place.

        Args:
            parameters: the weights that the prior is over.

        Returns:
            The mean.

        Raises:
            ValueError: if its length is neither 1 nor the number of weights.
        """
        mean = _beside(parameters, self.mean)
        if mean.numel() not in (1, parameters.numel):
            raise ValueError(f"Expected 1 prior mean, or {parameters.numel} (one for each weight), got {mean.numel()}.")
        return mean.reshape(()) if mean.numel() == 1 else mean

    def diagonal(self, parameters: Parameters) -> Tensor:
        """The precision of each weight, `(P,)`."""
        return self.shift(parameters).expand(parameters.numel)

    def logdet(self, parameters: Parameters) -> Tensor:
        """`log det` of the prior precision."""
        return self.diagonal(parameters).log().sum()

    def scatter(self, parameters: Parameters, weights: Tensor) -> Tensor:
        """`(w - mean)^T diag(precision) (w - mean)` for weights `(P,)`."""
        centre = self.centre(parameters).to(weights.dtype) if not isinstance(self.mean, float) else self.mean
        return (self.shift(parameters) * (weights - centre).square()).sum()


def _numbers(value: Tensor | float, what: str) -> Tensor:
    """A tensor.

    Raises:
        TypeError: if it cannot be one.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"A prior {what} is a number, or a tensor with one number for each parameter tensor or weight, got "
            f"{type(value).__name__} {value!r:.80}."
        ) from error


def _range(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest one, NaN where there is one."""
    if values.numel() == 1:
        return (float(values.detach()),) * 2
    low, high = values.detach().aminmax()
    return float(low), float(high)


def _beside(parameters: Parameters, value: Tensor | float) -> Tensor:
    """A tensor where the weights are, of their type or a wider one of its own; torch's default type would round it."""
    dtype = torch.promote_types(parameters.dtype, torch.float32)
    if isinstance(value, Tensor) and value.dtype != dtype and value.is_floating_point():
        dtype = torch.promote_types(value.dtype, dtype)
    return torch.as_tensor(value, dtype=dtype, device=parameters.device)
