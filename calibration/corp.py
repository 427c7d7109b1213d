"""The CORP decomposition: where a score comes from, by isotonic regression, without bins.

Probabilities of several classes are decomposed class by class and summed, as `brier` is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.classwise import ClassEventMetric
from lapkit.calibration.inputs import Array
from lapkit.calibration.pairs import Ranked, event

Score: TypeAlias = Literal["brier", "log"]


@final
@dataclass(frozen=True)
class ScoreDecomposition:
    """A mean score as `miscalibration - discrimination + uncertainty`, in the units of the score.

    Attributes:
        miscalibration: what the best monotone recalibration would save; 0 for a calibrated forecast.
        discrimination: what the recalibrated forecast saves against the base rate; higher is better.
        uncertainty: the score of the base rate as the only forecast: a property of the data alone.
    """

    miscalibration: float
    discrimination: float
    uncertainty: float

    @property
    def score(self) -> float:
        """The mean score of the forecasts, `miscalibration - discrimination + uncertainty`."""
        return self.miscalibration - self.discrimination + self.uncertainty


def squared_error(p: Tensor, y: Tensor) -> Tensor:
    """The Brier score of one column, `(p - y)^2`."""
    return (p - y).square()


def log_loss(p: Tensor, y: Tensor) -> Tensor:
    """The logarithmic score of one column in nats, `-y log p - (1 - y) log(1 - p)`."""
    return -torch.xlogy(y, p) - torch.xlogy(1 - y, 1 - p)


SCORES: dict[Score, Callable[[Tensor, Tensor], Tensor]] = {"brier": squared_error, "log": log_loss}


@final
@dataclass(frozen=True)
class Corp:
    """The CORP decomposition of pairs of forecast and outcome; in batches `Ranked(Corp(), event)`.

    Args:
        score: "brier", `(p - y)^2`; or "log", in nats.

    Raises:
        ValueError: the score is unknown.
    """

    score: Score = "brier"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, expected one of {', '.join(map(repr, SCORES))}.")

    def __call__(self, probability: Tensor, outcome: Tensor) -> ScoreDecomposition:
        """The decomposition.

        Args:
            probability: `(N,)` float64.
            outcome: `(N,)` float64, ones and zeros.

        Returns:
            The parts; a log score of infinity is all miscalibration.
        """
        # Half a second of imports, for this function alone.
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(probability.cpu().numpy(), outcome.cpu().numpy())
        recalibrated = torch.from_numpy(fitted).to(probability)
        base_rate = outcome.mean().expand_as(outcome)
        given, best, climate = (
            SCORES[self.score](p, outcome).mean().item() for p in (probability, recalibrated, base_rate)
        )
        return ScoreDecomposition(given - best, climate - best, climate)


@final
@dataclass(frozen=True)
class ClasswiseCorp(ClassEventMetric[ScoreDecomposition]):
    """The CORP decomposition of the Brier score over all classes: it keeps all probabilities."""

    def finish(self, summary: Tensor) -> ScoreDecomposition:
        """The sum of the classes' decompositions; see `Metric.finish`.

        Args:
            summary: `(N, 2, C)`.

        Returns:
            The parts.
        """
        parts = [Corp()(p, y) for p, y in summary.permute(2, 1, 0).contiguous()]
        return ScoreDecomposition(
            sum(part.miscalibration for part in parts),
            sum(part.discrimination for part in parts),
            sum(part.uncertainty for part in parts),
        )


def brier_decomposition(probabilities: Array, labels: Array) -> ScoreDecomposition:
    """Miscalibration, discrimination and uncertainty of the Brier score, by isotonic regression (CORP).

        MCB = S(p) - S(pbar),    DSC = S(ybar) - S(pbar),    UNC = S(ybar),    S(p) = MCB - DSC + UNC

    with `pbar` the isotonic recalibration of each class's probabilities and `ybar` the classes' frequencies. The sum
    over classes, so that `score` is `brier(probabilities, labels)`; recalibrated classes need not sum to one. In
    batches: `ClasswiseCorp()`, which keeps all probabilities.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The parts.

    Example:
        >>> parts = brier_decomposition(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 0, 1]))
        >>> parts.miscalibration, parts.discrimination, parts.uncertainty
        (0.12, 0.25, 0.5)

    Reference:
        Dimitriadis, Gneiting and Jordan (2021), Stable reliability diagrams for probabilistic classifiers, equation 2.
    """
    return ClasswiseCorp()(probabilities, labels)


def event_score_decomposition(probabilities: Array, occurred: Array, *, score: Score = "brier") -> ScoreDecomposition:
    """Miscalibration, discrimination and uncertainty of an event's probabilities, by isotonic regression (CORP).

    As `brier_decomposition`, of the one-column score `1/N sum_n (p_n - y_n)^2` (half of `brier`), or of the logarithmic
    one. In batches: `Ranked(Corp(score), event)`. A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N,)` probabilities of the event.
        occurred: `(N,)` whether it occurred: booleans, or integers 0 and 1.
        score: "brier", or "log", in nats.

    Returns:
        The parts.

    Reference:
        Dimitriadis, Gneiting and Jordan (2021), equation 2.
    """
    return Ranked(Corp(score), event)(probabilities, occurred)
