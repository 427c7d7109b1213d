"""How sure a metric is: bootstrap intervals, and what a calibrated model would show by chance.

Any metric will do that takes probabilities and labels and returns a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.bands import check_level
from lapkit.calibration.inputs import Array, as_labels, as_probabilities, as_tensor

Score: TypeAlias = Callable[[Tensor, Tensor], float]
Method: TypeAlias = Literal["basic", "percentile"]


@final
@dataclass(frozen=True)
class BootstrapInterval:
    """A number and its confidence interval.

    Attributes:
        value: of the data.
        lower: lower end.
        upper: upper end.
        level: the confidence level, in (0, 1).
    """

    value: float
    lower: float
    upper: float
    level: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.lower:.4g}, {self.upper:.4g}]"


@final
@dataclass(frozen=True)
class ConsistencyTest:
    """A calibration error beside those of models that are calibrated.

    Attributes:
        value: the error of the data.
        expected: the mean error of a calibrated model with these probabilities.
        upper: the error that a calibrated model exceeds with probability `1 - level`.
        p_value: the probability that a calibrated model shows at least this error.
        level: of `upper`, in (0, 1).
    """

    value: float
    expected: float
    upper: float
    p_value: float
    level: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.expected:.4g} by chance, p = {self.p_value:.3g})"


def bootstrap_interval(
    metric: Score,
    probabilities: Array,
    labels: Array,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    method: Method = "basic",
    generator: torch.Generator | None = None,
) -> BootstrapInterval:
    """Confidence interval of a metric, by drawing the examples again with replacement.

    "percentile" takes the quantiles of the resampled values; "basic" mirrors them at the value, `2 v - q`. Calibration
    errors are biased upwards, once in the data and once more in resamples: mirrored, one bias makes good for the other,
    and the lower end may be less than zero. Still, errors are nearly never below their true value in resamples, so the
    interval of an ECE holds less often than it says: one of 95 % held a true ECE of 0.10 about 9 times in 10, and that
    of a calibrated model 7 times in 10 ("basic") or never ("percentile"). Near zero `consistency_test` is exact.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        metric: takes probabilities and labels and returns a number, such as `expected_calibration_error`.
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        level: the confidence level, in (0, 1).
        resamples: how many to draw, at least 2.
        method: "basic" or "percentile".
        generator: the only source of randomness, on the CPU.

    Returns:
        The value and the interval.

    Raises:
        ValueError: the level is not in (0, 1), there are too few resamples, the method is unknown, or the metric is not
            finite, such as the NLL where a label has probability zero.

    Example:
        >>> from lapkit.calibration import accuracy
        >>> p, y = torch.full((200,), 0.75), (torch.arange(200) % 5 > 0).long()
        >>> bootstrap_interval(accuracy, p, y, generator=torch.Generator().manual_seed(0)).value
        0.8

    Reference:
        Efron and Tibshirani (1993), An introduction to the bootstrap, chapter 13; Davison and Hinkley (1997),
        Bootstrap methods and their application, equation 5.6 (basic).
    """
    _check_resamples(resamples)
    tail = (1 - check_level(level)) / 2
    if method not in {"basic", "percentile"}:
        raise ValueError(f"method is {method!r}, expected 'basic' or 'percentile'.")
    rows, given, targets = _checked(probabilities, labels)
    value = metric(given, targets)

    def resampled() -> float:
        draw = torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device)
        return metric(given[draw], targets[draw])

    values = torch.tensor([resampled() for _ in range(resamples)], dtype=torch.float64)
    if not (math.isfinite(value) and values.isfinite().all()):
        raise ValueError(
            f"The metric is {value} of the data, or not finite of a resample: it has no interval. For an infinite NLL "
            "look for labels of probability zero; nll_from_logits does not underflow."
        )
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    ends = {"percentile": (low, high), "basic": (2 * value - high, 2 * value - low)}[method]
    return BootstrapInterval(value, *ends, level)


def consistency_test(
    metric: Score,
    probabilities: Array,
    labels: Array,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> ConsistencyTest:
    """What a metric would be if the model were calibrated: labels drawn from the probabilities themselves.

    Every calibration error is above zero by chance. This says by how much, for these probabilities and any metric, and
    how rare the error at hand would be: `p = (1 + #{resampled >= value}) / (1 + resamples)`, which is exact.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        metric: takes probabilities and labels and returns a number that is larger for the less calibrated.
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        level: of the upper end, in (0, 1).
        resamples: how many sets of labels to draw, at least 2.
        generator: the only source of randomness, on the device of the probabilities.

    Returns:
        The value beside the mean and the quantile of a calibrated model, and the p-value.

    Raises:
        ValueError: the level is not in (0, 1), or there are too few resamples.

    Reference:
        Bröcker and Smith (2007), Increasing the reliability of reliability diagrams (consistency resampling, there with
        the forecasts drawn again as well); Vaicenavicius et al. (2019), Evaluating model calibration in classification,
        section 5.
    """
    _check_resamples(resamples)
    check_level(level)
    rows, given, targets = _checked(probabilities, labels)
    value = metric(given, targets)

    def calibrated() -> float:
        return metric(given, torch.multinomial(rows, 1, generator=generator).squeeze(1))

    values = torch.tensor([calibrated() for _ in range(resamples)], dtype=torch.float64)
    # Errors of equal labels may differ by rounding, and count as equal.
    as_large = int((values >= value - 1e-12).sum())
    upper = values.quantile(level).item()
    return ConsistencyTest(value, values.mean().item(), upper, (1 + as_large) / (1 + resamples), level)


def _checked(probabilities: Array, labels: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `(N, C)`, what the metric is given, one column as `(N,)`, and labels."""
    rows, given = as_probabilities(probabilities), as_tensor(probabilities)
    # In its own precision: that says how far sums may be off, and the metric checks them again.
    return rows, given if given.ndim == 2 and given.shape[1] > 1 else given.reshape(-1), as_labels(labels, rows)


def _check_resamples(resamples: int) -> None:
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}, expected at least 2; 1000 or more for an interval of 95 %.")
