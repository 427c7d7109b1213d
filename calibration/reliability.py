"""Reliability: how often predictions come true against how sure they were, per bin of confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lapkit.calibration.binning import Binning, assign_bins, check_bins
from lapkit.calibration.curves import ReliabilityCurve
from lapkit.calibration.inputs import Array
from lapkit.calibration.metrics import Metric, SumMetric
from lapkit.calibration.pairs import Pairs, Ranked, event, top_label


@final
@dataclass(frozen=True)
class EqualWidthReliability(SumMetric[ReliabilityCurve]):
    """The reliability curve in bins of equal width, from sums per bin: what `reliability_curve` gives, in batches.

    Args:
        bins: number of bins M.
        pairs: `top_label`, or `event` for `event_reliability_curve`.

    Example:
        >>> from lapkit.calibration import Streaming
        >>> stream = Streaming(EqualWidthReliability(bins=10))
        >>> stream.update(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> stream.update(torch.tensor([[0.2, 0.8]]), torch.tensor([1]))
        >>> stream.compute().ece
        0.3
    """

    bins: int = 15
    pairs: Pairs = top_label

    def __post_init__(self) -> None:
        check_bins(self.bins)

    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """Sums per bin; see `Metric.summarise`.

        Args:
            predictions: what `pairs` takes.
            targets: what `pairs` takes.

        Returns:
            `(3, M)` float64: number, sum of confidences, number that came true.
        """
        confidence, outcome = self.pairs(predictions, targets)
        _, index = assign_bins(confidence, bins=self.bins, binning="equal_width")
        return bin_sums(index, confidence, outcome, self.bins)

    def finish(self, summary: Tensor) -> ReliabilityCurve:
        """The curve; see `Metric.finish`.

        Args:
            summary: `(3, M)` sums per bin.

        Returns:
            The curve.
        """
        edges = torch.arange(self.bins + 1, dtype=torch.float64, device=summary.device) / self.bins
        return curve_of_sums(edges, summary)


@final
@dataclass(frozen=True)
class EqualMass:
    """The reliability curve in bins of equal count, of pairs; in batches `Ranked(EqualMass(bins))`.

    Args:
        bins: number of bins M.
    """

    bins: int = 15

    def __post_init__(self) -> None:
        check_bins(self.bins)

    def __call__(self, confidence: Tensor, outcome: Tensor) -> ReliabilityCurve:
        """The curve.

        Args:
            confidence: `(N,)` float64, N > 0.
            outcome: `(N,)` float64, ones and zeros.

        Returns:
            The curve.
        """
        edges, index = assign_bins(confidence, bins=self.bins, binning="equal_mass")
        return curve_of_sums(edges, bin_sums(index, confidence, outcome, self.bins))


RELIABILITY: dict[Binning, Callable[[int, Pairs], Metric[ReliabilityCurve]]] = {
    "equal_width": EqualWidthReliability,
    "equal_mass": lambda bins, pairs: Ranked(EqualMass(bins), pairs),
}


def reliability_metric(*, bins: int = 15, binning: Binning = "equal_width", pairs: Pairs = top_label) -> Metric[Any]:
    """The metric whose value is the reliability curve; in equal width it streams by sums, in equal mass by pairs.

    Args:
        bins: number of bins M.
        binning: "equal_width" or "equal_mass".
        pairs: `top_label` or `event`.

    Returns:
        The metric, for `Streaming`; called with predictions and targets it gives the `ReliabilityCurve`.

    Raises:
        TypeError: `bins` is not an integer.
        ValueError: `bins` is less than one, or `binning` is unknown.
    """
    if binning not in RELIABILITY:
        raise ValueError(f"binning is {binning!r}, expected one of {', '.join(map(repr, RELIABILITY))}.")
    return RELIABILITY[binning](bins, pairs)


def reliability_curve(
    probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_width"
) -> ReliabilityCurve:
    """Reliability of the top label: the confidence max_k p_nk against whether argmax_k p_nk is the label.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class, which
            are judged by the more probable of the two classes as well; for the positive class itself, see
            `event_reliability_curve`.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        binning: "equal_width", M intervals (lo, hi] of [0, 1]; or "equal_mass", M groups of equal count.

    Returns:
        The curve, with tensors on the device of the probabilities.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
        >>> curve = reliability_curve(probabilities, torch.tensor([0, 1, 0]), bins=5)
        >>> curve.confidence
        tensor([   nan,    nan, 0.6000, 0.8000, 0.9000], dtype=torch.float64)

    Reference:
        Guo, Pleiss, Sun and Weinberger (2017), section 2; equal mass: Nguyen and O'Connor (2015), 3.2.
    """
    return reliability_metric(bins=bins, binning=binning)(probabilities, labels)


def event_reliability_curve(
    probabilities: Array, occurred: Array, *, bins: int = 15, binning: Binning = "equal_width"
) -> ReliabilityCurve:
    """Reliability of an event's probabilities: the positive class, or class k by `p[:, k], labels == k`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N,)` probabilities of the event.
        occurred: `(N,)` whether it occurred: booleans, or integers 0 and 1.
        bins: number of bins M.
        binning: "equal_width", M intervals (lo, hi] of [0, 1]; or "equal_mass", M groups of equal count.

    Returns:
        The curve; its `confidence` is the mean probability, its `accuracy` the frequency of the event.

    Example:
        >>> occurred = torch.tensor([False, True, True])
        >>> event_reliability_curve(torch.tensor([0.1, 0.2, 0.9]), occurred, bins=2).accuracy
        tensor([0.5000, 1.0000], dtype=torch.float64)

    Reference:
        Murphy and Winkler (1977), Reliability of subjective probability forecasts of precipitation and
        temperature.
    """
    return reliability_metric(bins=bins, binning=binning, pairs=event)(probabilities, occurred)


def expected_calibration_error(
    probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_width"
) -> float:
    """Expected calibration error of the top label, `sum_m w_m |acc_m - conf_m|`.

    Short for `reliability_curve(...).ece`. It is above zero for a perfectly calibrated model as well: see
    `ReliabilityCurve.expected_by_chance`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        binning: "equal_width", M intervals (lo, hi] of [0, 1]; or "equal_mass", M groups of equal count.

    Returns:
        The expected calibration error, in [0, 1].

    Example:
        >>> expected_calibration_error(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]))
        0.45

    Reference:
        Guo, Pleiss, Sun and Weinberger (2017), equation 3; Naeini, Cooper and Hauskrecht (2015).
    """
    return reliability_curve(probabilities, labels, bins=bins, binning=binning).ece


def bin_sums(index: Tensor, confidence: Tensor, outcome: Tensor, bins: int) -> Tensor:
    """Number, sum of confidences and sum of outcomes in each bin.

    Args:
        index: `(N,)` int64, the bin of each example.
        confidence: `(N,)` float64.
        outcome: `(N,)` float64.
        bins: number of bins M.

    Returns:
        `(3, M)` float64.
    """
    values = torch.stack((torch.ones_like(confidence), confidence, outcome))
    return values.new_zeros(3, bins).index_add_(1, index, values)


def curve_of_sums(edges: Tensor, sums: Tensor) -> ReliabilityCurve:
    """The curve of these bins.

    Args:
        edges: `(M + 1,)`.
        sums: `(3, M)`, from `bin_sums`.

    Returns:
        The curve; zero over zero is NaN, an empty bin has no mean.
    """
    count, confidence, outcome = sums
    return ReliabilityCurve(edges, count.to(torch.int64), confidence / count, outcome / count)
