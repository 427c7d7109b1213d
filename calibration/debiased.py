"""Calibration errors of the top label that choose their bins, or make good for what chance adds."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.calibration.binning import MOST_BINS, Binning, mass_ends, middle_rank
from lapkit.calibration.inputs import Array
from lapkit.calibration.pairs import Ranked
from lapkit.calibration.reliability import EqualMass, reliability_curve

# Differences of accuracies below this are rounding.
ROUNDING = 1e-12


def debiased_calibration_error(
    probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_mass"
) -> float:
    """Root mean square calibration error of the top label, less what chance adds to its square.

        sqrt( max(0, sum_m w_m ( (acc_m - conf_m)^2 - acc_m (1 - acc_m) / (n_m - 1) )) )

    Short for `reliability_curve(...).debiased_rmsce`. A wrong dtype raises TypeError, a wrong shape or value
    ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        binning: "equal_mass" or "equal_width".

    Returns:
        The error, in [0, 1].

    Example:
        >>> p, y = torch.full((100,), 0.75), (torch.arange(100) % 5 > 0).long()
        >>> debiased_calibration_error(p, y), reliability_curve(p, y, binning="equal_mass").rmsce
        (0.0297, 0.05)

    Reference:
        Kumar, Liang and Ma (2019), Verified uncertainty calibration, definition 5.1.
    """
    return reliability_curve(probabilities, labels, bins=bins, binning=binning).debiased_rmsce


def sweep_calibration_error(probabilities: Array, labels: Array) -> float:
    """Expected calibration error of the top label, in as many bins of equal count as keep accuracy rising.

    The number of bins is the largest up to which accuracy rises with confidence in every smaller number as well:
    more bins would show noise. In batches: `Ranked(swept_error)`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The error, in [0, 1].

    Reference:
        Roelofs, Cain, Shlens and Mozer (2022), Mitigating bias in calibration error estimation, algorithm 1.
    """
    return Ranked(swept_error)(probabilities, labels)


def swept_error(confidence: Tensor, outcome: Tensor) -> float:
    """`sweep_calibration_error` of pairs.

    Args:
        confidence: `(N,)` float64, N > 0.
        outcome: `(N,)` float64, ones and zeros.

    Returns:
        The error, in [0, 1].
    """
    return EqualMass(min(monotone_bins(confidence, outcome), MOST_BINS))(confidence, outcome).ece


def monotone_bins(confidence: Tensor, outcome: Tensor) -> int:
    """The number of bins of equal count at which `sweep_calibration_error` stops.

    Args:
        confidence: `(N,)` float64, N > 0.
        outcome: `(N,)` float64, ones and zeros.

    Returns:
        From 1 to N: the largest number up to which accuracy never falls from a bin to the next.

    Example:
        >>> confidence = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
        >>> monotone_bins(confidence, torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.float64))
        4
    """
    _, group, size = torch.unique(confidence, return_inverse=True, return_counts=True)
    hits = torch.bincount(group, weights=outcome)
    middle = middle_rank(size)
    counted, came_true = (torch.cat((values.new_zeros(1), values.cumsum(dim=0))) for values in (size, hits))
    examples = len(confidence)
    # Where groups are in order, one to a bin, so are all unions of neighbours.
    if not _falls(hits / size):
        return examples
    for bins in range(2, examples + 1):
        ends = torch.searchsorted(middle, mass_ends(examples, bins).to(middle.device))
        number, true = (torch.diff(sums[ends], prepend=sums[:1]) for sums in (counted, came_true))
        if _falls((true / number)[number > 0]):
            return bins - 1
    return examples


def _falls(accuracy: Tensor) -> bool:
    return bool((accuracy.diff() < -ROUNDING).any())
