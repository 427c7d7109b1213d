"""Calibration errors of the top label that choose their bins, or make good for what chance adds."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.calibration.binning import MOST_BINS, Binning, mass_bin, mass_end, middle_rank
from lapkit.calibration.inputs import Array
from lapkit.calibration.pairs import Ranked
from lapkit.calibration.reliability import EqualMass, reliability_curve

# Differences of accuracies below this are rounding.
ROUNDING = 1e-12
# How many bins are looked at together, of several numbers of bins.
TABLE = 2**18


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
    hits, examples = torch.bincount(group, weights=outcome), len(confidence)
    # Where groups are in order, one to a bin, so are all unions of neighbours.
    if not ((hits / size).diff() < -ROUNDING).any():
        return examples
    groups, first, several = _Groups(size, hits), 2, 8
    while first <= examples:
        bins = torch.arange(first, min(first + several, examples + 1), device=size.device)
        falls, width = groups.falls(bins)
        if falls.any():
            return first - 1 + int(falls.long().argmax())
        first, several = first + len(bins), max(1, min(2 * several, TABLE // width))
    return examples


class _Groups:
    """Examples of equal confidence, in ascending order, and whether accuracy rises over bins of them.

    Bins below the first hit have accuracy 0 and those above the last miss accuracy 1, so that it can only fall between
    bins with groups of the range in the middle: few, where confidence tells right from wrong.

    Args:
        size: `(G,)` int64.
        hits: `(G,)` float64, how many came true of each; not in order.
    """

    def __init__(self, size: Tensor, hits: Tensor) -> None:
        self.examples, self.middle = int(size.sum()), middle_rank(size)
        self.counted, self.came_true = (torch.cat((v.new_zeros(1), v.cumsum(dim=0))) for v in (size, hits))
        self.range = self.middle[torch.cat(((hits > 0).nonzero()[0], (hits < size).nonzero()[-1]))]

    def falls(self, bins: Tensor) -> tuple[Tensor, int]:
        """Whether accuracy falls from a bin to the next, for several numbers of bins, and how many were looked at.

        Args:
            bins: numbers of bins, `(B,)` int64.

        Returns:
            `(B,)` Boolean, and the largest number of bins in the range.
        """
        lowest, highest = mass_bin(self.examples, bins[:, None], self.range).unbind(1)
        width = int((highest - lowest).max()) + 1
        number = lowest[:, None] + torch.arange(width + 1, device=bins.device)  # bins below each boundary
        ranks = mass_end(self.examples, bins[:, None], torch.minimum(number, highest[:, None] + 1))
        ends = torch.searchsorted(self.middle, ranks)
        count, true = self.counted[ends].diff(), self.came_true[ends].diff()
        accuracy = torch.where(count > 0, true / count, -torch.inf)  # an empty bin is passed over
        so_far = accuracy.cummax(dim=1).values
        return ((accuracy[:, 1:] < so_far[:, :-1] - ROUNDING) & (count[:, 1:] > 0)).any(dim=1), width
