"""Detection: does the uncertainty tell inputs from outside the training distribution from those inside?

Scores are high out of distribution. With few examples of one kind AUPR depends on how many there are of each; AUROC and
the false positive rate do not. In batches: `Ranked(ranked_auroc, flagged)` and the like, of scores and a flag for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.event_inputs import as_scores
from lapkit.calibration.inputs import Array

Positive: TypeAlias = Literal["out", "in"]


def auroc(in_distribution: Array, out_of_distribution: Array) -> float:
    """Area under the ROC curve; out-of-distribution examples are the positive class and should score higher.

        P(s_out > s_in) + 1/2 P(s_out = s_in)

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        in_distribution: `(N,)` scores of examples from the training distribution; higher means more
            out-of-distribution, as do `entropy` and one minus the top probability.
        out_of_distribution: `(M,)` scores of examples from outside.

    Returns:
        The area: 1 for perfect separation, 1/2 for chance, 0 for perfect separation the wrong way round. It is the
        same with the other class as positive and the other sign of the scores.

    Example:
        >>> auroc(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.5, 0.9]))
        0.9167

    Reference:
        Hanley and McNeil (1982), The meaning and use of the area under a ROC curve; as an out-of-distribution
        score: Hendrycks and Gimpel (2017), A baseline for detecting misclassified and out-of-distribution
        examples.
    """
    return ranked_auroc(*_joined(in_distribution, out_of_distribution))


def aupr(in_distribution: Array, out_of_distribution: Array, *, positive: Positive = "out") -> float:
    """Area under the precision-recall curve as the average precision: a sum of steps, never of trapezoids.

        sum_t (recall_t - recall_{t-1}) precision_t

    At chance it is the share of the positive class, so it is to be read beside that share.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        in_distribution: `(N,)` scores, higher means more out-of-distribution.
        out_of_distribution: `(M,)` scores of examples from outside.
        positive: "out" to detect examples from outside by high scores (AUPR-out), or "in" to detect those from inside
            by low ones (AUPR-in).

    Returns:
        The area, in (0, 1].

    Raises:
        ValueError: `positive` is unknown.

    Example:
        >>> inside, outside = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.4, 0.9])
        >>> aupr(inside, outside), aupr(inside, outside, positive="in")
        (0.8333, 0.9167)

    Reference:
        Hendrycks and Gimpel (2017), section 2; Davis and Goadrich (2006), The relationship between precision-recall
        and ROC curves (why not trapezoids).
    """
    return AveragePrecision(positive)(*_joined(in_distribution, out_of_distribution))


def fpr_at_tpr(
    in_distribution: Array, out_of_distribution: Array, *, tpr: float = 0.95, positive: Positive = "in"
) -> float:
    """The false positive rate at the strictest threshold that finds enough of the positive class: FPR95.

    With `positive="in"`, as the literature has it, the threshold keeps 95 % of the examples from inside, and the rate
    is the share of those from outside that are taken for inside as well. With "out" it is the share of false alarms at
    the threshold that finds 95 % of the examples from outside. Equal scores fall on one side together.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        in_distribution: `(N,)` scores, higher means more out-of-distribution.
        out_of_distribution: `(M,)` scores of examples from outside.
        tpr: the share of the positive class to find, at least, in (0, 1].
        positive: "in" or "out".

    Returns:
        The rate, in [0, 1]; lower is better.

    Raises:
        ValueError: `tpr` is not in (0, 1], or `positive` is unknown.

    Example:
        >>> inside, outside = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.4, 0.9])
        >>> fpr_at_tpr(inside, outside), fpr_at_tpr(inside, outside, positive="out")
        (0.5, 0.333)

    Reference:
        Liang, Li and Srikant (2018), Enhancing the reliability of out-of-distribution image detection, section 4.3.
    """
    return FalsePositiveRate(tpr, positive)(*_joined(in_distribution, out_of_distribution))


def ranked_auroc(scores: Tensor, outside: Tensor) -> float:
    """`auroc` of scores and flags.

    Args:
        scores: `(N,)` float64.
        outside: `(N,)` float64, ones and zeros, of both kinds.

    Returns:
        The area.

    Raises:
        ValueError: all examples are of one kind.
    """
    # Half a second of imports, for scikit-learn's functions alone.
    from sklearn.metrics import roc_auc_score

    _check_kinds(outside)
    return float(roc_auc_score(outside.cpu().numpy(), scores.cpu().numpy()))


@final
@dataclass(frozen=True)
class AveragePrecision:
    """`aupr` of scores and flags.

    Args:
        positive: "out" or "in".

    Raises:
        ValueError: `positive` is unknown.
    """

    positive: Positive = "out"

    def __post_init__(self) -> None:
        _check_positive(self.positive)

    def __call__(self, scores: Tensor, outside: Tensor) -> float:
        """The area.

        Args:
            scores: `(N,)` float64.
            outside: `(N,)` float64, ones and zeros, of both kinds.

        Returns:
            The average precision.

        Raises:
            ValueError: all examples are of one kind.
        """
        from sklearn.metrics import average_precision_score

        _check_kinds(outside)
        score, positive = _oriented(scores, outside, self.positive)
        return float(average_precision_score(positive.cpu().numpy(), score.cpu().numpy()))


@final
@dataclass(frozen=True)
class FalsePositiveRate:
    """`fpr_at_tpr` of scores and flags.

    Args:
        tpr: the share of the positive class to find, at least, in (0, 1].
        positive: "in" or "out".

    Raises:
        ValueError: `tpr` is not in (0, 1], or `positive` is unknown.
    """

    tpr: float = 0.95
    positive: Positive = "in"

    def __post_init__(self) -> None:
        _check_positive(self.positive)
        if not 0 < self.tpr <= 1:
            raise ValueError(f"tpr is {self.tpr}, expected a share in (0, 1], such as 0.95.")

    def __call__(self, scores: Tensor, outside: Tensor) -> float:
        """The rate.

        Args:
            scores: `(N,)` float64.
            outside: `(N,)` float64, ones and zeros, of both kinds.

        Returns:
            The false positive rate.

        Raises:
            ValueError: all examples are of one kind.
        """
        _check_kinds(outside)
        score, positive = _oriented(scores, outside, self.positive)
        found = score[positive > 0].sort(descending=True).values
        # The small number keeps 0.95 * 20 from being a little more than 19.
        threshold = found[max(math.ceil(self.tpr * len(found) - 1e-9), 1) - 1]
        return (score[positive == 0] >= threshold).to(torch.float64).mean().item()


def _joined(in_distribution: Array, out_of_distribution: Array) -> tuple[Tensor, Tensor]:
    inside = as_scores(in_distribution, "in_distribution")
    outside = as_scores(out_of_distribution, "out_of_distribution").to(inside.device)
    return torch.cat((inside, outside)), torch.cat((torch.zeros_like(inside), torch.ones_like(outside)))


def _oriented(scores: Tensor, outside: Tensor, positive: Positive) -> tuple[Tensor, Tensor]:
    """Scores that are high for the positive class, and flags of it."""
    return {"out": (scores, outside), "in": (-scores, 1 - outside)}[positive]


def _check_positive(positive: str) -> None:
    if positive not in {"out", "in"}:
        raise ValueError(f"positive is {positive!r}, expected 'out' or 'in', for out of or in distribution.")


def _check_kinds(outside: Tensor) -> None:
    low, high = outside.min(), outside.max()
    if low == high:
        kind = "outside" if high > 0 else "inside"
        raise ValueError(f"All examples are from {kind}, expected some from inside and some from outside.")
