"""Split conformal prediction: sets of classes that hold the truth as often as asked; intervals are in a file beside.

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

from lapkit.calibration.forecast_inputs import as_level
from lapkit.calibration.inputs import Array, as_labels, as_probabilities
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
