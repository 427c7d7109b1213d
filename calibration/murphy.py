"""Murphy's decomposition of the Brier score by bins, with what the bins hide.

Probabilities of several classes are decomposed class by class and summed, as `brier` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lapkit.calibration.binning import check_bins
from lapkit.calibration.classwise import class_bins, class_events
from lapkit.calibration.inputs import Array
from lapkit.calibration.metrics import SumMetric


@final
@dataclass(frozen=True)
class MurphyDecomposition:
    """The mean Brier score by bins, `REL - RES + UNC + WBV - WBC`, exactly.

    Attributes:
        reliability: REL, `sum_m w_m (acc_m - conf_m)^2`.
        resolution: RES, `sum_m w_m (acc_m - ybar)^2`; higher is better.
        uncertainty: UNC, `ybar (1 - ybar)`.
        within_bin_variance: WBV, `1/N sum_m sum_n (p_n - conf_m)^2`.
        within_bin_covariance: WBC, `2/N sum_m sum_n (y_n - acc_m) (p_n - conf_m)`.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin_variance: float
    within_bin_covariance: float

    @property
    def score(self) -> float:
        """The mean Brier score of the forecasts."""
        within = self.within_bin_variance - self.within_bin_covariance
        return self.reliability - self.resolution + self.uncertainty + within


@final
@dataclass(frozen=True)
class Murphy(SumMetric[MurphyDecomposition]):
    """Murphy's decomposition of the Brier score over all classes, from sums per class and bin of equal width.

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
            `(5, C, M)` float64: number, and sums of p, y, p^2 and p y.
        """
        p, y = class_events(predictions, targets)
        classes, index = p.shape[1], class_bins(p, self.bins)
        sums = [
            torch.bincount(index, weights=values.reshape(-1), minlength=self.bins * classes)
            for values in (torch.ones_like(p), p, y, p.square(), p * y)
        ]
        return torch.stack(sums).reshape(5, classes, self.bins)

    def finish(self, summary: Tensor) -> MurphyDecomposition:
        """The sum of the classes' decompositions; see `Metric.finish`.

        Args:
            summary: `(5, C, M)` sums.

        Returns:
            The parts.
        """
        count, p, y, square, product = summary
        examples = count[0].sum()
        filled = count.clamp(min=1)
        base_rate = y.sum(dim=1, keepdim=True) / examples
        parts = (
            (p - y).square() / filled,
            count * (y / filled - base_rate).square(),
            count * base_rate * (1 - base_rate),
            square - p.square() / filled,
            2 * (product - p * y / filled),
        )
        return MurphyDecomposition(*(part.sum().item() / examples.item() for part in parts))


def murphy_decomposition(probabilities: Array, labels: Array, *, bins: int = 15) -> MurphyDecomposition:
    """Reliability, resolution and uncertainty of the Brier score by bins of equal width, and what lies within bins.

        S = REL - RES + UNC + WBV - WBC

    exactly; the first three alone miss the score unless the forecasts within a bin are equal. The sum over classes, so
    that `score` is `brier(probabilities, labels)`. In batches: `Murphy(bins)`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.

    Returns:
        The parts.

    Reference:
        Murphy (1973), A new vector partition of the probability score; Stephenson, Coelho and Jolliffe (2008), Two
        extra components in the Brier score decomposition, equation 10.
    """
    return Murphy(bins)(probabilities, labels)
