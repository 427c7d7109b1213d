"""The reliability curve: confidence and accuracy per bin, and what is read off them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lapkit.calibration.bands import binomial_band, proportion_interval
from lapkit.calibration.diagrams import draw_reliability, new_axes

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
        >>> from lapkit.calibration import reliability_curve
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
            >>> from lapkit.calibration import reliability_curve
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
    def average_calibration_error(self) -> float:
        """The unweighted mean of `|acc_m - conf_m|` over the non-empty bins (Neumann et al. 2018; netcal's ACE).

        Not the adaptive error of the same initials, see `adaptive_calibration_error`.
        """
        return (self.accuracy - self.confidence).abs()[self.count > 0].mean().item()

    @property
    def debiased_squared_error(self) -> float:
        """The squared RMSCE less what chance adds to it, of mean zero for a calibrated model; may be negative.

            sum_m w_m ( (acc_m - conf_m)^2 - acc_m (1 - acc_m) / (n_m - 1) )

        Bins of one example add nothing. Reference: Kumar, Liang and Ma (2019), Verified uncertainty calibration,
        definition 5.1; Bröcker (2012), Estimating reliability and resolution of probability forecasts.
        """
        several = self.count > 1
        count, accuracy = self.count[several], self.accuracy[several]
        squares = (accuracy - self.confidence[several]).square() - accuracy * (1 - accuracy) / (count - 1)
        return (self._weight[several] * squares).sum().item()

    @property
    def debiased_rmsce(self) -> float:
        """Root of `debiased_squared_error`, or zero where that is negative."""
        return math.sqrt(max(self.debiased_squared_error, 0.0))

    @property
    def expected_by_chance(self) -> float:
        """The ECE that a perfectly calibrated model with these accuracies and counts would show by chance.

            sqrt(2 / pi) sum_m w_m sqrt( acc_m (1 - acc_m) / n_m )

        Even then acc_m scatters about conf_m, by a binomial standard error whose mean absolute value (of a
        Gaussian) is sqrt(2/pi) of it. An ECE is to be read beside this number; it falls as 1/sqrt(N), so ECEs
        of different N do not compare. A bin of one example, or one that is all right or all wrong, adds
        nothing: with few examples to a bin it is too low. `consistency_test` does without the approximation.

        Example:
            >>> from lapkit.calibration import reliability_curve
            >>> curve = reliability_curve(torch.full((100,), 0.75), (torch.arange(100) % 5 > 0).long())
            >>> curve.ece, curve.expected_by_chance
            (0.05, 0.032)
        """
        filled = self.count > 0
        count, accuracy = self.count[filled], self.accuracy[filled]
        deviation = (accuracy * (1 - accuracy) / count).sqrt()
        return math.sqrt(2 / math.pi) * (self._weight[filled] * deviation).sum().item()

    def consistency_band(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the accuracy of each bin would lie if the model were calibrated: quantiles of Binomial(n_m, conf_m).

        The confidences within a bin differ, so the number that come true is not quite binomial but scatters less:
        the band is a little wide. It is for one bin at a time; of M bins `(1 - level) M` leave it by chance.

        Args:
            level: the probability that the band holds, at least, in (0, 1).

        Returns:
            Lower and upper end, `(M,)` each; NaN where a bin is empty.

        Example:
            >>> from lapkit.calibration import event_reliability_curve
            >>> curve = event_reliability_curve(torch.full((100,), 0.75), torch.arange(100) % 5 > 0, bins=2)
            >>> curve.consistency_band()[0]
            tensor([   nan, 0.6600], dtype=torch.float64)

        Reference:
            Bröcker and Smith (2007), Increasing the reliability of reliability diagrams; Hoeffding (1956), theorem 4.
        """
        return binomial_band(self.count, self.confidence, level)

    def accuracy_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the true accuracy of each bin lies, given what was seen: the exact interval for a proportion.

        Args:
            level: the confidence level, at least, in (0, 1).

        Returns:
            Lower and upper end, `(M,)` each; NaN where a bin is empty.

        Reference:
            Clopper and Pearson (1934), The use of confidence or fiducial limits.
        """
        return proportion_interval(self.count, self.count * self.accuracy, level)

    def plot(self, ax: Axes | None = None, *, label: str | None = None, band: float | None = None) -> Axes:
        """Draw the reliability diagram: accuracy per bin, its gap to the confidence, and above it the counts.

        Args:
            ax: the axes to draw in; new ones if None. To compare models, give each its own.
            label: the name of the model in the legend.
            band: level of the consistency band to draw about the diagonal, such as 0.95; none if None.

        Returns:
            The axes, for titles and the like.

        Example:
            >>> import matplotlib
            >>> matplotlib.use("agg")
            >>> from lapkit.calibration import reliability_curve
            >>> curve = reliability_curve(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([1, 1, 0]))
            >>> ax = curve.plot(label="MAP", band=0.95)
            >>> ax.get_xlabel(), ax.get_ylabel()
            ('confidence', 'accuracy')
        """
        summary = f"ECE {self.ece:.3f} ({self.expected_by_chance:.3f} by chance)"
        ends = () if band is None else tuple(end.tolist() for end in self.consistency_band(band))
        return draw_reliability(
            new_axes() if ax is None else ax,
            edges=self.edges.tolist(),
            count=self.count.tolist(),
            confidence=self.confidence.tolist(),
            accuracy=self.accuracy.tolist(),
            label=label or "accuracy",
            summary=summary,
            band=ends,
        )

    @property
    def _weight(self) -> Tensor:
        # Integers over integers would come out in torch's default dtype.
        return self.count.to(torch.float64) / self.count.sum()
