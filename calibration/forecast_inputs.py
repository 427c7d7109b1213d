"""Predictions and targets of a regression in the forms that users have, checked and brought to a common one.

Nothing is broadcast: `(N,)` and `(N, 1)` are the same single target, and any other difference of shapes is an error.
Results go back in the form that the prediction came in.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal

from lapkit.calibration.continuous_forecasts import Continuous
from lapkit.calibration.forecasts import Forecast, Samples
from lapkit.calibration.gaussian_forecasts import Gaussians
from lapkit.calibration.inputs import Array, as_finite, as_tensor

Prediction: TypeAlias = "Forecast | Distribution | tuple[Array, Array | float]"


def as_forecast(prediction: Prediction) -> Forecast:
    """A prediction as what the scores ask.

    Args:
        prediction: a pair `(mean, std)`, each `(N,)` or `(N, K)` (std also a number); a distribution of torch, of
            batch shape `(N,)` or `(N, K)`, or `(N,)` with events `(K,)`; or `Samples`.

    Returns:
        The forecast of `(N, K)` targets.

    Raises:
        TypeError: if it is something else, such as an array without a standard deviation.
        ValueError: if the shape of a distribution is another.
    """
    if isinstance(prediction, Forecast):
        return prediction
    if isinstance(prediction, tuple) and len(prediction) == 2:
        return _of_moments(*prediction)
    if not isinstance(prediction, Distribution):
        raise TypeError(
            f"The prediction is a {type(prediction).__name__}, expected a pair (mean, std), a torch.distributions "
            "object, or Samples(values), of the targets, observation noise included."
        )
    given: Distribution = prediction
    if isinstance(given, Independent) and given.reinterpreted_batch_ndims == 1:
        given = given.base_dist
    if isinstance(given, Normal):
        return _of_moments(given.mean, given.stddev)
    batch, event = tuple(given.batch_shape), tuple(given.event_shape)
    if len(batch) + len(event) not in (1, 2) or not batch or len(event) > 1:
        raise ValueError(
            f"A {type(given).__name__} of batch shape {batch} and event shape {event} was given, expected (N,) or "
            "(N, K), or (N,) with events (K,)."
        )
    return _of_distribution(given)


def as_targets(targets: Array, forecast: Forecast) -> Tensor:
    """Checked targets of a forecast.

    Args:
        targets: `(N,)` or `(N, K)`.
        forecast: of them.

    Returns:
        The targets `(N, K)`, float64, on the device of the forecast.
    """
    return as_columns(targets, "targets", forecast.like, "prediction")


def in_form_of(prediction: Prediction, values: Tensor) -> Tensor:
    """Values of each target in the shape of the prediction: `(N, 1)` beside targets `(N,)` would be broadcast.

    Args:
        prediction: of any form.
        values: `(N, K)`.

    Returns:
        `(N,)`, where the prediction is one of `(N,)` targets, or `(N, K)`.
    """
    if isinstance(prediction, tuple):
        return values.reshape(as_tensor(prediction[0]).shape)
    if isinstance(prediction, Samples):
        return values.reshape(as_tensor(prediction.values).shape[1:])
    if isinstance(prediction, Distribution):
        return values.reshape(prediction.batch_shape + prediction.event_shape)
    return values


def z_scores(forecast: Forecast, y: Tensor) -> Tensor:
    """Errors of the mean in standard deviations, `(y - E[y]) / Std[y]`.

    Args:
        forecast: of the targets.
        y: `(N, K)`, from `as_targets`.

    Returns:
        `(N, K)`.
    """
    return (y - forecast.mean) / positive_std(forecast)


def positive_std(forecast: Forecast) -> Tensor:
    """Standard deviations to divide by.

    Args:
        forecast: of the targets.

    Returns:
        `(N, K)`, above zero.

    Raises:
        ValueError: if one is zero, as where all samples are equal.
    """
    std = forecast.std
    if not (std > 0).all():
        raise ValueError(
            f"The predictive standard deviation of example {int((~(std > 0)).nonzero()[0, 0])} is zero, expected all "
            "above zero. Is the observation noise part of the samples?"
        )
    return std


def as_columns(values: Array, name: str, like: Tensor | None = None, other: str = "") -> Tensor:
    """Checked numbers as `(N, K)` float64.

    Args:
        values: `(N,)` or `(N, K)`.
        name: what the caller names them, for the error.
        like: `(N, K)`, whose shape they must have and on whose device they go.
        other: what the caller names those.

    Returns:
        The values `(N, K)`.

    Raises:
        ValueError: if they have another shape.
    """
    given = as_finite(values, name)
    if given.ndim not in (1, 2) or not given.numel():
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, expected (N,) or (N, K) with N > 0. Flatten further axes."
        )
    table = given.reshape(len(given), -1)
    if like is None:
        return table
    if table.shape != like.shape:
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, that of {other} {tuple(like.shape)}; expected a number of the "
            "one for each of the other. Nothing is broadcast."
        )
    return table.to(like.device)


def as_level(value: float, name: str) -> float:
    """A checked probability, strictly between 0 and 1.

    Args:
        value: a number.
        name: what the caller names it, for the error.

    Returns:
        The same.

    Raises:
        ValueError: if it is outside.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}, expected a number between 0 and 1, such as 0.9 for 90 %.")
    return float(value)


def _of_moments(mean: Array, std: Array | float) -> Gaussians:
    means = as_columns(mean, "mean")
    stds = torch.full_like(means, float(std)) if isinstance(std, (int, float)) else std
    stds = as_columns(stds, "std", means, "mean")
    if not (stds > 0).all():
        raise ValueError(
            f"The smallest standard deviation is {float(stds.min()):g}, expected all above zero. Is the observation "
            "noise part of it? Without any spread there is no density."
        )
    return Gaussians(means[None], stds[None], torch.ones_like(means[None, :, 0]))


def _of_distribution(given: Distribution) -> Forecast:
    if isinstance(given, MultivariateNormal):
        whole = _of_moments(given.mean, given.stddev)
        root = given.scale_tril.detach().double()
        return Gaussians(whole.means, whole.stds, whole.weights, root[None] if root.shape[-1] > 1 else None)
    if isinstance(given, MixtureSameFamily):
        return _of_mixture(given)
    return Continuous(given)


def _of_mixture(given: MixtureSameFamily) -> Gaussians:
    """A mixture, whose batch shape `(N, M)` of components puts the components last.

    Raises:
        TypeError: if it is none of Gaussians, or one for each target.
    """
    parts, roots = given.component_distribution, None
    if isinstance(parts, MultivariateNormal):
        roots = parts.scale_tril.detach().double().movedim(1, 0)
    elif isinstance(parts, Independent):
        parts = parts.base_dist
    if not isinstance(parts, (Normal, MultivariateNormal)) or len(given.batch_shape) > 1:
        raise TypeError(
            f"A mixture of {type(parts).__name__} was given, of batch shape {tuple(given.batch_shape)}; expected one "
            "of Gaussians, of batch shape (N,). Draw from it: Samples(distribution.sample((1000,)))."
        )
    weights = given.mixture_distribution.probs.detach().double().movedim(-1, 0)
    means, stds = (m.detach().double().movedim(1, 0).reshape(*weights.shape, -1) for m in (parts.mean, parts.stddev))
    return Gaussians(means, stds, weights, roots)
