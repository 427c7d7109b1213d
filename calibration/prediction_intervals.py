"""Prediction intervals: how often they hold the target, how wide they are, and one score for both.

Intervals are a pair `(lower, upper)`, each `(N,)` or `(N, K)`: from `central_interval`, from `lapkit.calibration`'s
conformal prediction, or from elsewhere. `coverage` is always the probability that is asked for, such as 0.9; never the
alpha = 0.1 of the literature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.forecast_inputs import Prediction, as_columns, as_level
from lapkit.calibration.inputs import Array, as_tensor
from lapkit.calibration.metrics import Mean
from lapkit.calibration.regression import quantiles

Bounds: TypeAlias = tuple[Array, Array]


def central_interval(prediction: Prediction, *, coverage: float) -> tuple[Tensor, Tensor]:
    """The interval between the quantiles that leave out as much on either side.

        F^{-1}(1/2 - coverage/2), F^{-1}(1/2 + coverage/2)

    Args:
        prediction: of any form.
        coverage: the probability of each target's interval, in (0, 1).

    Returns:
        Lower and upper ends, `(N,)` or `(N, K)` each, as the prediction is, float64.

    Example:
        >>> central_interval((torch.zeros(1), 1.0), coverage=0.95)
        (tensor([-1.9600], dtype=torch.float64), tensor([1.9600], dtype=torch.float64))
    """
    tail = (1 - as_level(coverage, "coverage")) / 2
    return quantiles(prediction, tail), quantiles(prediction, 1 - tail)


def covered(bounds: Bounds, targets: Array) -> Tensor:
    """The fraction of each example's targets that lie in their intervals, ends included, `(N,)`."""
    lower, upper, y = _checked(bounds, targets)
    return ((lower <= y) & (y <= upper)).double().mean(1)


def interval_coverage(bounds: Bounds, targets: Array) -> float:
    """The fraction of targets that lie in their intervals, ends included.

        1/N sum_n 1[l_n <= y_n <= u_n]

    Args:
        bounds: lower and upper ends, `(N,)` or `(N, K)` each.
        targets: of the same shape.

    Returns:
        The coverage, in [0, 1].

    Example:
        >>> interval_coverage((torch.zeros(2), torch.ones(2)), torch.tensor([0.5, 2.0]))
        0.5
    """
    return Mean(covered)(bounds, targets)


def interval_width(bounds: Bounds) -> float:
    """Mean width of intervals, in units of the targets.

        1/N sum_n (u_n - l_n)

    Args:
        bounds: lower and upper ends, `(N,)` or `(N, K)` each.

    Returns:
        The width.

    Example:
        >>> interval_width((torch.zeros(2), torch.tensor([1.0, 2.0])))
        1.5
    """
    lower, upper = _ordered(bounds)
    return float((upper - lower).mean())


def interval_score(bounds: Bounds, targets: Array, *, coverage: float) -> float:
    """Mean interval score of Winkler, in units of the targets: the width, and a penalty for each target outside.

        (u - l) + 2/alpha max(l - y, 0) + 2/alpha max(y - u, 0),   alpha = 1 - coverage

    Args:
        bounds: lower and upper ends, `(N,)` or `(N, K)` each.
        targets: of the same shape.
        coverage: the probability that the intervals were made for, in (0, 1).

    Returns:
        The score; in expectation the true central interval has the smallest.

    Example:
        >>> interval_score((torch.zeros(2), torch.ones(2)), torch.tensor([0.5, 1.1]), coverage=0.9)
        2.0

    Reference:
        Winkler (1972); Gneiting and Raftery (2007), equation 43.
    """
    return Mean(IntervalScores(coverage))(bounds, targets)


@final
@dataclass(frozen=True)
class IntervalScores:
    """The interval score of each example, the mean over its targets; see `interval_score`.

    Args:
        coverage: the probability that the intervals were made for, in (0, 1).
    """

    coverage: float

    def __post_init__(self) -> None:
        as_level(self.coverage, "coverage")

    def __call__(self, bounds: Bounds, targets: Array) -> Tensor:
        """Of intervals and targets, `(N,)`."""
        lower, upper, y = _checked(bounds, targets)
        outside = (lower - y).clamp(min=0) + (y - upper).clamp(min=0)
        return (upper - lower + 2 / (1 - self.coverage) * outside).mean(1)


def _checked(bounds: Bounds, targets: Array) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper = _ordered(bounds)
    return lower, upper, as_columns(targets, "targets", lower, "lower ends")


def _ordered(bounds: Bounds) -> tuple[Tensor, Tensor]:
    lower, upper = (_ends(end) for end in bounds)
    if lower.shape != upper.shape:
        raise ValueError(
            f"shapes of lower and upper ends are {tuple(lower.shape)} and {tuple(upper.shape)}, expected the same."
        )
    if not ((lower <= upper) & (lower < torch.inf) & (upper > -torch.inf)).all():
        raise ValueError(
            "A lower end is above its upper end, or both are the same infinity, or NaN, expected lower <= upper. Check "
            "the quantiles they came from."
        )
    return lower, upper


def _ends(values: Array) -> Tensor:
    """Of intervals, `(N, K)`; the whole line, such as a conformal interval of too few examples, is one too."""
    given = as_tensor(values).double()
    finite = as_columns(given.where(~given.isinf(), 0.0), "ends of intervals")
    return torch.where(given.reshape(finite.shape).isinf(), given.reshape(finite.shape), finite)
