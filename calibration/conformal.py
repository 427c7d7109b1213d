"""Split conformal prediction: sets of classes and intervals of targets that hold the truth as often as asked.

The guarantee is for a new example exchangeable with the n held-out ones, on average over both, whatever the model:

    coverage <= P(y in set) <= coverage + 1 / (n + 1)    (the second if scores have no ties)

It is not one for each input, nor for data from elsewhere. `coverage` is the probability asked for, 1 - alpha.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.forecast_inputs import Prediction, as_columns, as_forecast, as_level, as_targets, positive_std
from lapkit.calibration.inputs import Array, as_labels, as_probabilities
from lapkit.calibration.prediction_intervals import Bounds
from lapkit.calibration.recalibration import Recalibration

SetScore: TypeAlias = Literal["threshold", "adaptive"]


def threshold_scores(p: Tensor, penalty: float, rank: int) -> Tensor:
    """`1 - p_k` of each class, `(N, C)` (LAC, THR): the smallest sets on average."""
    return 1 - p


def adaptive_scores(p: Tensor, penalty: float, rank: int) -> Tensor:
    """The probability of all classes down to this one, `(N, C)` (APS), with a penalty for long sets (RAPS).

    sum_{j: p_j >= p_k} p_j + penalty max(0, place_k - rank)
    """
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    place = torch.arange(1, p.shape[1] + 1, device=p.device)
    total = ordered.cumsum(1) + penalty * (place - rank).clamp(min=0)
    return torch.empty_like(total).scatter(1, order, total)


SCORES: Mapping[str, Callable[[Tensor, float, int], Tensor]] = {
    "threshold": threshold_scores,
    "adaptive": adaptive_scores,
}


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformalSets(Recalibration):
    """Sets of classes of which one is right with the probability asked for.

    Attributes:
        threshold: the largest score of a class that belongs to the set.
        coverage: asked for.
        score: "threshold" or "adaptive".
        penalty: of "adaptive", for each class beyond `rank`.
        rank: of "adaptive".

    Example:
        >>> p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
        >>> sets = ConformalSets.fit(p, torch.tensor([0, 1, 1, 2]), coverage=0.8)
        >>> sets(torch.tensor([[0.55, 0.45, 0.0]]))
        tensor([[ True,  True, False]])

    Reference:
        Vovk, Gammerman and Shafer (2005); threshold: Sadinle, Lei and Wasserman (2019); adaptive: Romano, Sesia and
        Candes (2020), without randomisation; penalty: Angelopoulos, Bates, Malik and Jordan (2021).
    """

    threshold: float
    coverage: float
    score: SetScore = "threshold"
    penalty: float = 0.0
    rank: int = 1

    @classmethod
    def fit(
        cls,
        probabilities: Array,
        labels: Array,
        *,
        coverage: float = 0.9,
        score: SetScore = "threshold",
        penalty: float = 0.0,
        rank: int = 1,
    ) -> ConformalSets:
        """The conformal quantile of the held-out labels' scores.

        Args:
            probabilities: `(N, C)`, or `(N,)` of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).
            coverage: in (0, 1).
            score: "threshold" (LAC, THR), small sets; "adaptive" (APS), sets that grow where the network is unsure.
            penalty: of "adaptive": for each class beyond the first `rank` (RAPS), against long sets.
            rank: of "adaptive".

        Returns:
            The rule for sets; it warns where there are too few examples, and then every class belongs to every set.

        Raises:
            ValueError: if the score is unknown or the penalty negative.
        """
        if score not in SCORES or penalty < 0:
            raise ValueError(
                f"score is {score!r} and penalty {penalty}, expected {' or '.join(map(repr, SCORES))} and at least 0."
            )
        p = as_probabilities(probabilities)
        scores = SCORES[score](p, penalty, rank).gather(1, as_labels(labels, p)[:, None])
        return cls(float(conformal_quantile(scores, coverage)), coverage, score, penalty, rank)

    def __call__(self, probabilities: Array) -> Tensor:
        """Which classes belong to the sets.

        Args:
            probabilities: as for `fit`.

        Returns:
            `(N, C)`, boolean; a set may be empty under "threshold", which says that no class is usual there.
        """
        p = as_probabilities(probabilities)
        return SCORES[self.score](p, self.penalty, self.rank) <= self.threshold


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformalIntervals(Recalibration):
    """Intervals that hold the target with the probability asked for, around predictions of any kind.

        absolute:    E[y] -+ t;    normalised:  E[y] -+ t Std[y];    of intervals (CQR):  [lower - t, upper + t]

    Attributes:
        margin: t, `(K,)`; in units of the targets, or of standard deviations if normalised.
        coverage: asked for, of each of the K targets by itself.
        normalised: intervals grow with the predicted standard deviation.

    Example:
        >>> y = torch.tensor([1.0, -2.0, 3.0, 0.5])
        >>> intervals = ConformalIntervals.fit((torch.zeros(4), 1.0), y, coverage=0.6, normalised=False)
        >>> intervals((torch.tensor([10.0]), 1.0))
        (tensor([[8.]], dtype=torch.float64), tensor([[12.]], dtype=torch.float64))

    Reference:
        Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), Distribution-free predictive inference for regression,
        sections 2.2 and 5.2.
    """

    margin: Tensor
    coverage: float
    normalised: bool = True

    @classmethod
    def fit(
        cls, prediction: Prediction, targets: Array, *, coverage: float = 0.9, normalised: bool = True
    ) -> ConformalIntervals:
        """The conformal quantile of the held-out errors.

        Args:
            prediction: of held-out examples, of any form.
            targets: `(N,)` or `(N, K)`.
            coverage: in (0, 1).
            normalised: errors in units of the predicted standard deviation; otherwise in those of the targets.

        Returns:
            The rule for intervals; it warns where there are too few examples, and then they are the whole line.
        """
        forecast = as_forecast(prediction)
        error = (as_targets(targets, forecast) - forecast.mean).abs()
        scale = positive_std(forecast) if normalised else 1.0
        return cls(conformal_quantile(error / scale, coverage), coverage, normalised)

    def __call__(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Lower and upper ends.

        Args:
            prediction: of any form.

        Returns:
            `(N, K)` each, float64.
        """
        forecast = as_forecast(prediction)
        margin = self.margin.to(forecast.mean.device).expand_as(forecast.mean)
        margin = margin * positive_std(forecast) if self.normalised else margin
        return forecast.mean - margin, forecast.mean + margin


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformalBounds(Recalibration):
    """Intervals made wider or narrower until they hold the target with the probability asked for (CQR).

    Attributes:
        margin: t, `(K,)`, by which both ends go out; negative ones go in.
        coverage: asked for, of each of the K targets by itself.

    Reference:
        Romano, Patterson and Candes (2019), Conformalized quantile regression, equations 6 to 8.
    """

    margin: Tensor
    coverage: float

    @classmethod
    def fit(cls, bounds: Bounds, targets: Array, *, coverage: float = 0.9) -> ConformalBounds:
        """The conformal quantile of how far held-out targets lie outside.

            max( lower - y, y - upper )

        Args:
            bounds: lower and upper ends, `(N,)` or `(N, K)` each, of held-out examples: two quantiles.
            targets: `(N,)` or `(N, K)`.
            coverage: in (0, 1).

        Returns:
            The rule for intervals; it warns where there are too few examples, and then they are the whole line.
        """
        lower = as_columns(bounds[0], "lower ends")
        upper = as_columns(bounds[1], "upper ends", lower, "lower ends")
        y = as_columns(targets, "targets", lower, "lower ends")
        return cls(conformal_quantile(torch.maximum(lower - y, y - upper), coverage), coverage)

    def __call__(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """Lower and upper ends; where they would cross, both are the middle.

        Args:
            bounds: lower and upper ends.

        Returns:
            `(N, K)` each, float64.
        """
        lower = as_columns(bounds[0], "lower ends")
        upper = as_columns(bounds[1], "upper ends", lower, "lower ends")
        margin = self.margin.to(lower.device)
        middle = (lower + upper) / 2
        return torch.minimum(lower - margin, middle), torch.maximum(upper + margin, middle)


def conformal_quantile(scores: Tensor, coverage: float) -> Tensor:
    """The score of rank `ceil((n + 1) coverage)` among n, by which one more falls below with at least that probability.

    Warns where the rank is above n, and gives infinity.

    Args:
        scores: `(n, K)`.
        coverage: in (0, 1).

    Returns:
        `(K,)`.

    Reference:
        Papadopoulos, Proedrou, Vovk and Gammerman (2002), Inductive confidence machines for regression.
    """
    count = len(scores)
    # (n + 1) coverage of 9.000000000000002 is 9.
    rank = math.ceil(round((count + 1) * as_level(coverage, "coverage"), 9))
    if rank > count:
        warnings.warn(
            f"{count} held-out examples are too few for a coverage of {coverage:g}: at least "
            f"{math.ceil(round(coverage / (1 - coverage), 9))} are needed. The sets or intervals hold everything.",
            stacklevel=3,
        )
        return torch.full_like(scores[0], math.inf)
    return scores.sort(dim=0).values[rank - 1]
