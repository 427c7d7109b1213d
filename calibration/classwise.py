"""Calibration of every class, not only of the predicted one: a reliability curve for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.binning import Binning, assign_bins, check_bins
from lapkit.calibration.curves import ReliabilityCurve
from lapkit.calibration.inputs import Array, as_labels, as_probabilities
from lapkit.calibration.metrics import Metric, Result, RowMetric, SumMetric
from lapkit.calibration.reliability import EqualMass, bin_sums, curve_of_sums

Curves: TypeAlias = tuple[ReliabilityCurve, ...]


@final
@dataclass(frozen=True)
class ClasswiseReliability(SumMetric[Curves]):
    """The reliability curve of each class in bins of equal width, from sums per class and bin.

    Args:
        bins: number of bins M.
    """

    bins: int = 15

    def __post_init__(self) -> None:
        check_bins(self.bins)

    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """Sums per class and bin; see `Metric.summarise`.

        Args:
            predictions: `(N, C)` class probabilities.
            targets: `(N,)` labels.

        Returns:
            `(3, C, M)` float64: number, sum of probabilities, number that came true.
        """
        rows, occurred = class_events(predictions, targets)
        classes = rows.shape[1]
        sums = bin_sums(class_bins(rows, self.bins), rows.reshape(-1), occurred.reshape(-1), self.bins * classes)
        return sums.reshape(3, classes, self.bins)

    def finish(self, summary: Tensor) -> Curves:
        """The curves; see `Metric.finish`.

        Args:
            summary: `(3, C, M)` sums.

        Returns:
            A curve for each class.
        """
        edges = torch.arange(self.bins + 1, dtype=torch.float64, device=summary.device) / self.bins
        return tuple(curve_of_sums(edges, sums) for sums in summary.unbind(dim=1))


class ClassEventMetric(RowMetric[Result]):
    """A metric of every class against the others, which keeps all probabilities."""

    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """All probabilities and what occurred; see `Metric.summarise`.

        Args:
            predictions: `(N, C)` class probabilities.
            targets: `(N,)` labels.

        Returns:
            `(N, 2, C)` float64.
        """
        return torch.stack(class_events(predictions, targets), dim=1)


@final
@dataclass(frozen=True)
class ClasswiseEqualMass(ClassEventMetric[Curves]):
    """The reliability curve of each class in bins of equal count: these need all probabilities, and keep them.

    Args:
        bins: number of bins M.
        threshold: probabilities up to here are left out, of each class by itself; -1 leaves out none.
    """

    bins: int = 15
    threshold: float = -1.0

    def __post_init__(self) -> None:
        check_bins(self.bins)

    def finish(self, summary: Tensor) -> Curves:
        """The curves; see `Metric.finish`.

        Args:
            summary: `(N, 2, C)`.

        Returns:
            A curve for each class with a probability above the threshold.
        """
        curve = EqualMass(self.bins)
        columns = ((p[p > self.threshold], y[p > self.threshold]) for p, y in summary.permute(2, 1, 0).contiguous())
        return tuple(curve(p, y) for p, y in columns if len(p))


CLASSWISE: dict[Binning, Callable[[int], Metric[Curves]]] = {
    "equal_width": ClasswiseReliability,
    "equal_mass": ClasswiseEqualMass,
}


def class_events(probabilities: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """The probability of every class and whether it is the label.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        Probabilities and outcomes, `(N, C)` each, float64.
    """
    rows = as_probabilities(probabilities)
    targets = as_labels(labels, rows)
    return rows, torch.zeros_like(rows).scatter(1, targets[:, None], 1.0)


def class_bins(rows: Tensor, bins: int) -> Tensor:
    """The bin of equal width of every probability, numbered class after class.

    Args:
        rows: checked probabilities `(N, C)`.
        bins: number of bins M.

    Returns:
        `(N C,)`, in [0, C M).
    """
    _, index = assign_bins(rows, bins=bins, binning="equal_width")
    return (index + bins * torch.arange(rows.shape[1], device=rows.device)).reshape(-1)


def classwise_reliability_curves(
    probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_width"
) -> Curves:
    """The reliability of each class's probability against whether that class is the label.

    In batches: `ClasswiseReliability(bins)`, or `ClasswiseEqualMass(bins)`, which keeps the probabilities. A wrong
    dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        binning: "equal_width", M intervals (lo, hi] of [0, 1]; or "equal_mass", M groups of equal count.

    Returns:
        A curve for each class.

    Raises:
        ValueError: `binning` is unknown.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> [curve.ece for curve in classwise_reliability_curves(p, torch.tensor([0, 1, 1]), bins=2)]
        [0.3, 0.3]
    """
    if binning not in CLASSWISE:
        raise ValueError(f"binning is {binning!r}, expected one of {', '.join(map(repr, CLASSWISE))}.")
    return CLASSWISE[binning](bins)(probabilities, labels)
