"""Scores of predictive distributions of real targets: NLL, CRPS, errors of the mean, intervals, sharpness.

A prediction is a pair `(mean, std)`, a distribution of torch, such as `la.predictive_distribution(x)`, or `Samples`. It
is one of targets: the observation noise is part of it. All scores are in the units of the targets, the NLL in nats.
With K targets errors and CRPS are means over them; the NLL is of an example's targets together.

A function that ends in an `s` gives a value for each example: `Streaming(Mean(crps_scores))` is its mean over batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributions import Distribution

from lapkit.calibration.forecast_inputs import (
    Prediction,
    as_columns,
    as_forecast,
    as_level,
    as_targets,
    in_form_of,
    z_scores,
)
from lapkit.calibration.forecasts import Forecast
from lapkit.calibration.inputs import Array
from lapkit.calibration.metrics import Mean


def density_losses(prediction: Prediction, targets: Array) -> Tensor:
    """`-log p(y|x)` of each example, `(N,)`, in nats; see `predictive_nll`."""
    forecast = as_forecast(prediction)
    return -forecast.log_prob(as_targets(targets, forecast))


def crps_scores(prediction: Prediction, targets: Array) -> Tensor:
    """The CRPS of each example, the mean over its targets, `(N,)`; see `crps`."""
    forecast = as_forecast(prediction)
    return forecast.crps(as_targets(targets, forecast)).mean(1)


def squared_errors(prediction: Prediction | Array, targets: Array) -> Tensor:
    """`(y - E[y])^2` of each example, the mean over its targets, `(N,)`; see `rmse`."""
    return _errors(prediction, targets).square().mean(1)


def absolute_errors(prediction: Prediction | Array, targets: Array) -> Tensor:
    """`|y - E[y]|` of each example, the mean over its targets, `(N,)`; see `mae`."""
    return _errors(prediction, targets).abs().mean(1)


def squared_z_scores(prediction: Prediction, targets: Array) -> Tensor:
    """`(y - E[y])^2 / Var[y]` of each example, the mean over its targets, `(N,)`; see `mean_squared_z`."""
    forecast = as_forecast(prediction)
    return z_scores(forecast, as_targets(targets, forecast)).square().mean(1)


def predictive_nll(prediction: Prediction, targets: Array) -> float:
    """Mean negative log density of the targets, in nats per example.

        -1/N sum_n log p(y_n | x_n)

    It depends on the units of the targets: times a, and `K log a` comes to it.

    Args:
        prediction: with a density.
        targets: `(N,)` or `(N, K)`.

    Returns:
        The negative log-likelihood; it may be negative.

    Example:
        >>> predictive_nll((torch.tensor([0.0, 1.0]), 0.5), torch.tensor([0.5, 1.0]))
        0.4758

    Reference:
        Gneiting and Raftery (2007), section 4.1.
    """
    return Mean(density_losses)(prediction, targets)


def crps(prediction: Prediction, targets: Array) -> float:
    """Mean continuous ranked probability score, in units of the targets.

        CRPS(F, y) = int (F(t) - 1[t >= y])^2 dt = E|X - y| - 1/2 E|X - X'|

    The absolute error of a prediction without spread. In closed form for Gaussians and their mixtures; of samples see
    `Samples.fair`.

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`.

    Returns:
        The score, at least 0 (of fair samples, in expectation).

    Example:
        >>> crps((torch.tensor([0.0, 1.0]), 0.5), torch.tensor([0.5, 1.0]))
        0.2090

    Reference:
        Gneiting and Raftery (2007), equations 20 and 21.
    """
    return Mean(crps_scores)(prediction, targets)


def rmse(prediction: Prediction | Array, targets: Array) -> float:
    """Root mean squared error of the predictive mean, in units of the targets.

        sqrt( 1/N sum_n (y_n - E[y_n])^2 )

    Args:
        prediction: of any form, or the means themselves.
        targets: `(N,)` or `(N, K)`.

    Returns:
        The error.

    Example:
        >>> rmse(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
        1.414
    """
    return Mean(squared_errors, then=math.sqrt)(prediction, targets)


def mae(prediction: Prediction | Array, targets: Array) -> float:
    """Mean absolute error of the predictive mean, in units of the targets.

        1/N sum_n |y_n - E[y_n]|

    Args:
        prediction: of any form, or the means themselves.
        targets: `(N,)` or `(N, K)`.

    Returns:
        The error.

    Example:
        >>> mae(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
        1.0
    """
    return Mean(absolute_errors)(prediction, targets)


def mean_squared_z(prediction: Prediction, targets: Array) -> float:
    """The variance found over the variance predicted: 1 if calibrated, above 1 if overconfident.

        1/N sum_n (y_n - E[y_n])^2 / Var[y_n]

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`.

    Returns:
        The ratio; its root is the factor of `SigmaScaling`.

    Example:
        >>> mean_squared_z((torch.zeros(2), 0.5), torch.tensor([1.0, 0.0]))
        2.0
    """
    return Mean(squared_z_scores)(prediction, targets)


def sharpness(prediction: Prediction) -> float:
    """Root mean predictive variance, in units of the targets: how narrow predictions are, right or wrong.

        sqrt( 1/N sum_n Var[y_n] )

    To be read beside a calibration error: predicting mean and variance of all targets, whatever the input, is
    calibrated and useless.

    Args:
        prediction: of any form.

    Returns:
        The sharpness; smaller is sharper.

    Example:
        >>> sharpness((torch.zeros(2), torch.tensor([3.0, 4.0])))
        3.536

    Reference:
        Gneiting, Balabdaoui and Raftery (2007), Probabilistic forecasts, calibration and sharpness.
    """
    return float(as_forecast(prediction).std.square().mean().sqrt())


def quantiles(prediction: Prediction, level: float) -> Tensor:
    """The quantile of each target.

        F_n^{-1}(level)

    Args:
        prediction: of any form.
        level: in (0, 1).

    Returns:
        `(N,)` or `(N, K)`, as the prediction is, float64.

    Example:
        >>> quantiles((torch.zeros(1), 1.0), 0.975)
        tensor([1.9600], dtype=torch.float64)
    """
    return in_form_of(prediction, as_forecast(prediction).quantile(as_level(level, "level")))


def pinball_loss(prediction: Prediction, targets: Array, *, level: float) -> float:
    """Mean pinball loss of a quantile, in units of the targets; at 0.5 half the absolute error of the median.

        max( a (y - q_a), (a - 1) (y - q_a) )

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`.
        level: a, of the quantile, in (0, 1).

    Returns:
        The loss.

    Example:
        >>> pinball_loss((torch.zeros(2), 1.0), torch.tensor([1.0, -1.0]), level=0.5)
        0.5

    Reference:
        Koenker and Bassett (1978), Regression quantiles.
    """
    return Mean(PinballLosses(level))(prediction, targets)


@final
@dataclass(frozen=True)
class PinballLosses:
    """The pinball loss of each example, the mean over its targets; see `pinball_loss`.

    Args:
        level: of the quantile, in (0, 1).
    """

    level: float

    def __post_init__(self) -> None:
        as_level(self.level, "level")

    def __call__(self, prediction: Prediction, targets: Array) -> Tensor:
        """Of predictions and targets, `(N,)`."""
        forecast = as_forecast(prediction)
        gap = as_targets(targets, forecast) - forecast.quantile(self.level)
        return torch.maximum(self.level * gap, (self.level - 1) * gap).mean(1)


def _errors(prediction: Prediction | Array, targets: Array) -> Tensor:
    """Targets minus predictive means, `(N, K)`."""
    if isinstance(prediction, (Forecast, Distribution, tuple)):
        mean = as_forecast(prediction).mean
    else:
        mean = as_columns(prediction, "prediction")
    return as_columns(targets, "targets", mean, "prediction") - mean
