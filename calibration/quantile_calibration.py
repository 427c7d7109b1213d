"""Do quantiles and intervals hold the target as often as they say, and are errors as large as the spread says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lapkit.calibration.binning import Binning, assign_bins
from lapkit.calibration.forecast_inputs import Prediction, as_forecast, as_targets, positive_std
from lapkit.calibration.inputs import Array
from lapkit.calibration.metrics import RowMetric, SumMetric
from lapkit.calibration.pit import pit
from lapkit.calibration.regression_diagrams import draw_calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Levels of the quantiles and intervals that are checked.
LEVELS = tuple(i / 20 for i in range(1, 20))


@final
@dataclass(frozen=True, eq=False)
class CalibrationCurve:
    """How often quantiles, or central intervals, held the target, against how often they should.

    Attributes:
        level: `(L,)` the probabilities that were asked for.
        observed: `(L,)` the frequencies that were found.
    """

    level: Tensor
    observed: Tensor

    @property
    def mean_error(self) -> float:
        """Mean absolute difference over the levels (quantile calibration error); other levels, another error."""
        return float((self.observed - self.level).abs().mean())

    @property
    def rms_error(self) -> float:
        """Root mean squared difference over the levels."""
        return float((self.observed - self.level).square().mean().sqrt())

    @property
    def area(self) -> float:
        """The area between the curve, joined by straight lines, and the diagonal (miscalibration area)."""
        gap, width = self.observed - self.level, self.level.diff()
        left, right = gap[:-1], gap[1:]
        total = left.abs() + right.abs()
        # Two triangles where the curve crosses the diagonal, else a trapezium.
        crossing = (left.square() + right.square()) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return float((width * torch.where(left * right < 0, crossing, total) / 2).sum())

    @property
    def max_error(self) -> float:
        """Largest difference at a level."""
        return float((self.observed - self.level).abs().max())

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draw observed over expected frequencies; the diagonal is calibrated.

        Args:
            ax: the axes to draw in, several curves in one if need be; new ones if None.
            label: the name of the model, for the legend.

        Returns:
            The axes.
        """
        return draw_calibration(ax, level=self.level.tolist(), observed=self.observed.tolist(), label=label)


@final
@dataclass(frozen=True)
class CalibrationCounts(SumMetric[CalibrationCurve]):
    """The calibration of quantiles or of central intervals, see `calibration_curve`.

    Args:
        levels: ascending, each in [0, 1].
        intervals: of central intervals; otherwise of quantiles.
    """

    levels: tuple[float, ...] = LEVELS
    intervals: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        inside = self.levels and all(0 <= level <= 1 for level in self.levels)
        if not inside or list(self.levels) != sorted(self.levels):
            raise ValueError(f"levels are {self.levels}, expected ascending numbers in [0, 1].")

    def summarise(self, predictions: Prediction, targets: Array) -> Tensor:
        """Counts of a batch; see `Metric.summarise`.

        Args:
            predictions: of any form.
            targets: `(N,)` or `(N, K)`.

        Returns:
            `(L + 1,)`: how many at or below each level, and of how many.
        """
        u = pit(predictions, targets).flatten()
        u = (2 * u - 1).abs() if self.intervals else u
        level = torch.tensor(self.levels, dtype=u.dtype, device=u.device)
        below = torch.searchsorted(u.sort().values, level, right=True)
        return torch.cat((below, below.new_tensor([len(u)]))).double()

    def finish(self, summary: Tensor) -> CalibrationCurve:
        """The curve; see `Metric.finish`.

        Args:
            summary: counts.

        Returns:
            The curve.
        """
        level = torch.tensor(self.levels, dtype=summary.dtype, device=summary.device)
        return CalibrationCurve(level, summary[:-1] / summary[-1])


def calibration_curve(
    prediction: Prediction, targets: Array, *, levels: Sequence[float] = LEVELS, intervals: bool = False
) -> CalibrationCurve:
    """How often quantiles or central intervals of given probabilities held the target.

        quantiles: 1/N #{n: F_n(y_n) <= p};    intervals: 1/N #{n: |2 F_n(y_n) - 1| <= p}

    Intervals that are too narrow give a curve below the diagonal. Errors of a curve depend on its levels: those of
    different levels do not compare.

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`, all targets counting alike.
        levels: the probabilities p, ascending.
        intervals: check central intervals; otherwise quantiles.

    Returns:
        The curve, with its mean error and area; it can be drawn.

    Example:
        >>> curve = calibration_curve((torch.zeros(2), 1.0), torch.tensor([-0.1, 2.0]), levels=[0.25, 0.5, 0.75])
        >>> curve.observed
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
        >>> curve.mean_error
        0.167

    Reference:
        Kuleshov, Fenner and Ermon (2018), Accurate uncertainties for deep learning using calibrated regression,
        section 3.
    """
    return CalibrationCounts(tuple(levels), intervals=intervals)(prediction, targets)


def quantile_calibration_error(prediction: Prediction, targets: Array, *, levels: Sequence[float] = LEVELS) -> float:
    """Mean absolute difference between how often quantiles held the target and how often they should.

        1/L sum_p | 1/N #{n: F_n(y_n) <= p} - p |

    Short for `calibration_curve(...).mean_error`.

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`, all targets counting alike.
        levels: the L probabilities p, ascending.

    Returns:
        The error, in [0, 1].

    Example:
        >>> quantile_calibration_error((torch.zeros(2), 1.0), torch.tensor([-0.1, 2.0]), levels=[0.25, 0.5, 0.75])
        0.167
    """
    return calibration_curve(prediction, targets, levels=levels).mean_error


@final
@dataclass(frozen=True)
class VarianceCalibration(RowMetric[float]):
    """Predicted variance against squared error over bins of the variance, see `variance_calibration_error`.

    Args:
        bins: M.
        binning: "equal_width", between the smallest and the largest variance; or "equal_mass".
        relative: the mean relative difference of the roots (ENCE); otherwise the weighted one of variances (UCE).
    """

    bins: int = 10
    binning: Binning = "equal_mass"
    relative: bool = True

    def summarise(self, predictions: Prediction, targets: Array) -> Tensor:
        """Variances and squared errors of a batch; see `Metric.summarise`.

        Args:
            predictions: of any form.
            targets: `(N,)` or `(N, K)`.

        Returns:
            `(N K, 2)`.
        """
        forecast = as_forecast(predictions)
        error = as_targets(targets, forecast) - forecast.mean
        variance = (positive_std(forecast) if self.relative else forecast.std).square()
        return torch.stack((variance.flatten(), error.square().flatten()), dim=1)

    def finish(self, summary: Tensor) -> float:
        """The error; see `Metric.finish`.

        Args:
            summary: variances and squared errors.

        Returns:
            The error.
        """
        low, high = summary[:, 0].aminmax()
        # Binnings are of [0, 1]; equal variances are one bin.
        place = (summary[:, 0] - low) / (high - low).clamp(min=torch.finfo(summary.dtype).tiny)
        _, index = assign_bins(place, bins=self.bins, binning=self.binning)
        count = torch.bincount(index, minlength=self.bins)
        filled = count > 0
        predicted, found = (torch.bincount(index, column, self.bins)[filled] / count[filled] for column in summary.T)
        if self.relative:
            return float(((predicted.sqrt() - found.sqrt()).abs() / predicted.sqrt()).mean())
        return float(((predicted - found).abs() * count[filled] / count.sum()).sum())


def variance_calibration_error(
    prediction: Prediction, targets: Array, *, bins: int = 10, binning: Binning = "equal_mass", relative: bool = True
) -> float:
    """Does the spread say which errors are large? Predicted variance against squared error over bins of the variance.

        relative (ENCE):  1/M sum_m | sqrt(mean var_m) - sqrt(mean err^2_m) | / sqrt(mean var_m)
        otherwise (UCE):  sum_m n_m / N | mean var_m - mean err^2_m |

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`, all targets counting alike.
        bins: M; empty ones do not count.
        binning: "equal_mass", or "equal_width" between the smallest and the largest variance: other numbers.
        relative: which of the two.

    Returns:
        The error; without unit if relative, in squared units of the targets otherwise.

    Example:
        >>> std, errors = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
        >>> variance_calibration_error((torch.zeros(4), std), errors, bins=2)
        0.25

    Reference:
        ENCE: Levi, Gispan, Giladi and Fetaya (2022), Evaluating and calibrating uncertainty prediction in regression
        tasks, equation 8; UCE: Laves, Ihler, Fast, Kahrs and Ortmaier (2020).
    """
    return VarianceCalibration(bins, binning, relative)(prediction, targets)
