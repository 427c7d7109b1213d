"""Calibration of predictive distributions of real targets, by the probability integral transform (PIT) `F_n(y_n)`.

It is uniform if and only if quantiles come true as often as they say. Intervals, quantiles and histograms of it follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lapkit.calibration.forecast_inputs import Prediction, as_forecast, as_targets
from lapkit.calibration.inputs import Array, as_tensor
from lapkit.calibration.metrics import RowMetric, SumMetric
from lapkit.calibration.regression_diagrams import draw_pit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pit(prediction: Prediction, targets: Array) -> Tensor:
    """The probability integral transform of each target.

        u_n = F_n(y_n)

    Args:
        prediction: of any form; of samples it is the rank among them, see `Samples.cdf`.
        targets: `(N,)` or `(N, K)`.

    Returns:
        In the shape of the targets, in [0, 1], float64.

    Example:
        >>> pit((torch.zeros(2), 1.0), torch.tensor([0.0, 1.96]))
        tensor([0.5000, 0.9750], dtype=torch.float64)

    Reference:
        Dawid (1984), Present position and potential developments: the prequential approach.
    """
    forecast = as_forecast(prediction)
    return forecast.cdf(as_targets(targets, forecast)).reshape(as_tensor(targets).shape)


@final
@dataclass(frozen=True)
class PITDistance(RowMetric[float]):
    """The distance of the PIT from uniform, see `pit_distance`; keeps one number for each target."""

    def summarise(self, predictions: Prediction, targets: Array) -> Tensor:
        """The PIT of a batch; see `Metric.summarise`.

        Args:
            predictions: of any form.
            targets: `(N,)` or `(N, K)`.

        Returns:
            `(N, K)`.
        """
        u = pit(predictions, targets)
        return u.reshape(len(u), -1)

    def finish(self, summary: Tensor) -> float:
        """The distance; see `Metric.finish`.

        Args:
            summary: the PIT of all examples.

        Returns:
            The Kolmogorov-Smirnov statistic.
        """
        u = summary.flatten().sort().values
        rank = torch.arange(len(u), dtype=u.dtype, device=u.device)
        return float(torch.maximum(u - rank / len(u), (rank + 1) / len(u) - u).max())


def pit_distance(prediction: Prediction, targets: Array) -> float:
    """Kolmogorov-Smirnov distance of the PIT from uniform: the largest error of any quantile's frequency.

        max_u | 1/N #{n: F_n(y_n) <= u} - u |

    By chance about `0.87 / sqrt(N)` for a calibrated prediction, and above `1.36 / sqrt(N)` one time in twenty.

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`, all targets counting alike.

    Returns:
        The distance, in [0, 1].

    Example:
        >>> pit_distance((torch.zeros(3), 1.0), torch.tensor([-0.67, 0.0, 0.67]))
        0.251
    """
    return PITDistance()(prediction, targets)


@final
@dataclass(frozen=True, eq=False)
class PITHistogram:
    """How often the PIT fell into each of M equal parts of [0, 1]: flat if calibrated, U-shaped if overconfident.

    Attributes:
        count: `(M,)` targets in each part.
    """

    count: Tensor

    @property
    def band(self) -> tuple[int, int]:
        """Counts between which a bar of a calibrated prediction lies 95 times in 100 (binomial)."""
        # Slow to import, for this property alone.
        from scipy.stats import binom

        low, high = binom.interval(0.95, int(self.count.sum()), 1 / len(self.count))
        return int(low), int(high)

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draw the bars, and the band that they keep to if calibrated.

        Args:
            ax: the axes to draw in; new ones if None.
            label: the name of the model, for the legend.

        Returns:
            The axes.
        """
        return draw_pit(ax, count=self.count.tolist(), band=self.band, label=label)


@final
@dataclass(frozen=True)
class PITCounts(SumMetric[PITHistogram]):
    """The histogram of the PIT, see `pit_histogram`.

    Args:
        bins: M.
    """

    bins: int = 10

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins is {self.bins}, expected at least 1.")

    def summarise(self, predictions: Prediction, targets: Array) -> Tensor:
        """Counts of a batch; see `Metric.summarise`.

        Args:
            predictions: of any form.
            targets: `(N,)` or `(N, K)`.

        Returns:
            `(M,)`.
        """
        place = (pit(predictions, targets).flatten() * self.bins).long().clamp(max=self.bins - 1)
        return torch.bincount(place, minlength=self.bins).double()

    def finish(self, summary: Tensor) -> PITHistogram:
        """The histogram; see `Metric.finish`.

        Args:
            summary: counts.

        Returns:
            The histogram.
        """
        return PITHistogram(summary.long())


def pit_histogram(prediction: Prediction, targets: Array, *, bins: int = 10) -> PITHistogram:
    """The histogram of the PIT.

        count_m = #{n: floor(M F_n(y_n)) = m}

    Args:
        prediction: of any form.
        targets: `(N,)` or `(N, K)`, all targets counting alike.
        bins: M.

    Returns:
        The histogram, which can be drawn.

    Example:
        >>> pit_histogram((torch.zeros(4), 1.0), torch.tensor([-2.0, -0.1, 0.1, 2.0]), bins=2).count
        tensor([2, 2])

    Reference:
        Gneiting, Balabdaoui and Raftery (2007), section 3.1; Diebold, Gunther and Tay (1998).
    """
    return PITCounts(bins)(prediction, targets)
