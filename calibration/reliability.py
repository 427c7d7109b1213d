"""Reliability: how often predictions come true against how sure they were, and the errors read off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lapkit.calibration.binning import Binning, assign_bins
from lapkit.calibration.diagrams import draw_reliability, new_axes
from lapkit.calibration.inputs import Array, as_events, as_labels, as_probabilities

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Confidence and accuracy per bin, and the calibration errors that follow from them.

    With M bins of n_m examples and the weights w_m = n_m / N, the calibration error of order q is

        ( sum_m w_m |acc_m - conf_m|^q )^(1/q)

    Attributes:
        edges: `(M + 1,)` the bins' edges (lo, hi]; the first bin has its left edge as well.
        count: `(M,)` int64, the number of examples n_m in each bin; 0 where a bin is empty.
        confidence: `(M,)` the mean confidence conf_m; NaN where a bin is empty.
        accuracy: `(M,)` the fraction acc_m that came true; NaN where a bin is empty.

    Example:
        >>> probabilities = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> curve = reliability_curve(probabilities, torch.tensor([0, 1, 0]), bins=2)
        >>> curve.count
        tensor([0, 3])
        >>> curve.ece
        0.0333

    Reference:
        Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, equations 3 (ECE)
        and 5 (MCE); Hendrycks, Mazeika and Dietterich (2019), Deep anomaly detection (RMSCE).
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    def calibration_error(self, order: float) -> float:
        """The count-weighted norm of the gaps, of any order; for the infinite order, their maximum.

            ( sum_m w_m |acc_m - conf_m|^q )^(1/q)

        Args:
            order: the order q of the norm, at least 1; `math.inf` for the maximum over the non-empty bins.

        Returns:
            The calibration error, in [0, 1].

        Raises:
            ValueError: the order is less than 1 or NaN.

        Example:
            >>> curve = reliability_curve(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([1, 1, 0]), bins=3)
            >>> curve.calibration_error(1), curve.calibration_error(2), curve.calibration_error(math.inf)
            (0.3, 0.367, 0.6)
        """
        if not order >= 1:
            raise ValueError(f"order is {order}, expected at least 1: 1 for ECE, 2 for RMSCE, math.inf for MCE.")
        filled = self.count > 0
        gap = (self.accuracy - self.confidence).abs()[filled]
        if math.isinf(order):
            return gap.max().item()
        return (self._weight[filled] * gap**order).sum().item() ** (1 / order)

    @property
    def ece(self) -> float:
        """Expected calibration error, `sum_m w_m |acc_m - conf_m|`."""
        return self.calibration_error(1)

    @property
    def rmsce(self) -> float:
        """Root mean square calibration error, `sqrt( sum_m w_m (acc_m - conf_m)^2 )`."""
        return self.calibration_error(2)

    @property
    def mce(self) -> float:
        """Maximum calibration error, `max_m |acc_m - conf_m|` over the non-empty bins."""
        return self.calibration_error(math.inf)

    @property
    def expected_by_chance(self) -> float:
        """The ECE that a perfectly calibrated model with these accuracies and counts would show by chance.

            sqrt(2 / pi) sum_m w_m sqrt( acc_m (1 - acc_m) / n_m )

        Even then acc_m scatters about conf_m, by a binomial standard error whose mean absolute value (of a
        Gaussian) is sqrt(2/pi) of it. An ECE is to be read beside this number; it falls as 1/sqrt(N), so ECEs
        of different N do not compare. A bin of one example, or one that is all right or all wrong, adds
        nothing: with few examples to a bin it is too low.

        Example:
            >>> curve = reliability_curve(torch.full((100,), 0.75), (torch.arange(100) % 5 > 0).long())
            >>> curve.ece, curve.expected_by_chance
            (0.05, 0.032)
        """
        filled = self.count > 0
        count, accuracy = self.count[filled], self.accuracy[filled]
        deviation = (accuracy * (1 - accuracy) / count).sqrt()
        return math.sqrt(2 / math.pi) * (self._weight[filled] * deviation).sum().item()

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draw the reliability diagram: accuracy per bin, its gap to the confidence, and above it the counts.

        Args:
            ax: the axes to draw in; new ones if None. To compare models, give each its own.
            label: the name of the model in the legend.

        Returns:
            The axes, for titles and the like.

        Example:
            >>> import matplotlib
            >>> matplotlib.use("agg")
            >>> curve = reliability_curve(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([1, 1, 0]))
            >>> ax = curve.plot(label="MAP")
            >>> ax.get_xlabel(), ax.get_ylabel()
            ('confidence', 'accuracy')
        """
        summary = f"ECE {self.ece:.3f} ({self.expected_by_chance:.3f} by chance)"
        return draw_reliability(
            new_axes() if ax is None else ax,
            edges=self.edges.tolist(),
            count=self.count.tolist(),
            confidence=self.confidence.tolist(),
            accuracy=self.accuracy.tolist(),
            label=label or "accuracy",
            summary=summary,
        )

    @property
    def _weight(self) -> Tensor:
        # Integers over integers would come out in torch's default dtype.
        return self.count.to(torch.float64) / self.count.sum()


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
    rows = as_probabilities(probabilities)
    targets = as_labels(labels, rows)
    confidence, predicted = rows.max(dim=1)
    return _curve(confidence, (predicted == targets).to(torch.float64), bins=bins, binning=binning)


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
    probability, outcome = as_events(probabilities, occurred)
    return _curve(probability, outcome, bins=bins, binning=binning)


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


def _curve(confidence: Tensor, outcome: Tensor, *, bins: int, binning: Binning) -> ReliabilityCurve:
    edges, index = assign_bins(confidence, bins=bins, binning=binning)
    count = torch.bincount(index, minlength=bins)
    # Zero over zero is NaN: an empty bin has no mean.
    means = (torch.bincount(index, weights=values, minlength=bins) / count for values in (confidence, outcome))
    return ReliabilityCurve(edges, count, *means)
