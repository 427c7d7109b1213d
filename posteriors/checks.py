"""What the functions of a Gaussian over outputs refuse."""

from __future__ import annotations

import torch
from torch import Tensor


def check_gaussian(mean: Tensor, covariance: Tensor) -> None:
    """Refuse what is no Gaussian over C outputs for each input.

    That a covariance has no negative eigenvalue is seen where its root is taken; here only its diagonal is.

    Args:
        mean: `(..., C)`.
        covariance: `(..., C, C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if the shapes do not fit, a number is not finite, a covariance is not symmetric beyond rounding, or
            a variance is negative.
    """
    _check_floating(mean, covariance, "covariance")
    if mean.ndim < 1 or covariance.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(
            f"Expected means (..., C) and covariances (..., C, C), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}. Variances alone become a covariance by torch.diag_embed."
        )
    _check_finite(mean, "mean")
    _check_finite(covariance, "covariance")
    slack = torch.finfo(covariance.dtype).eps ** 0.5 * covariance.abs().amax((-2, -1), keepdim=True)
    skew = (covariance - covariance.mT).abs()
    if (skew > slack).any():
        raise ValueError(
            f"A covariance is not symmetric: entries differ from their mirror images by up to {float(skew.max()):.3g}. "
            "Use (V + V.mT) / 2 if that is rounding."
        )
    _check_not_negative(covariance.diagonal(dim1=-2, dim2=-1), slack[..., 0])


def check_variance(mean: Tensor, variance: Tensor) -> None:
    """Refuse what are no means and variances of single numbers.

    Args:
        mean: any shape.
        variance: of the same shape.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if the shapes differ, a number is not finite, or a variance is negative.
    """
    _check_floating(mean, variance, "variance")
    if mean.shape != variance.shape:
        raise ValueError(f"Expected one variance for each mean, got {tuple(mean.shape)} and {tuple(variance.shape)}.")
    _check_finite(mean, "mean")
    _check_finite(variance, "variance")
    _check_not_negative(variance, 0.0)


def check_classes(mean: Tensor) -> None:
    """Refuse a single class.

    Raises:
        ValueError: if there are not at least two.
    """
    if mean.shape[-1] < 2:
        raise ValueError(
            f"Got {mean.shape[-1]} logit for each input; a softmax needs at least two classes. A single logit f says "
            "yes or no: use the likelihood Bernoulli, or the logits (-f / 2, f / 2)."
        )


def _check_floating(mean: Tensor, spread: Tensor, name: str) -> None:
    if not mean.is_floating_point() or mean.dtype != spread.dtype:
        raise TypeError(f"Expected mean and {name} of one floating type, got {mean.dtype} and {spread.dtype}.")


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"The {name} of the outputs holds NaN or infinite values. Does the network return any?")


def _check_not_negative(variances: Tensor, slack: Tensor | float) -> None:
    if (variances < -slack).any():
        raise ValueError(f"A variance is negative, {float(variances.min()):.3g}. Is it a covariance, not its inverse?")
