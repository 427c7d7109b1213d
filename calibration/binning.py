"""Sorting confidences into bins: a binning gives the edges and each example's bin.

A new binning is one function and one line in `BINNINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Binning: TypeAlias = Literal["equal_width", "equal_mass"]

# A little more than the rounding errors of float32 on the way to a guess, and with MOST_BINS still less than a bin.
GUESS, MOST_BINS = 1e-6, 100_000
# Up to so many examples one search costs less than several operations.
FEW = 2**12


def equal_width(confidence: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bins `(m/M, (m+1)/M]`, open at the left and closed at the right; zero falls into the first.

    Confidences are compared with the edges in float32: 0.3 lies in (0.2, 0.3] whether it was given in
    float32, in float64, or came about as 1 - 0.7 = 0.30000000000000004.

    Args:
        confidence: `(N,)` float64, in [0, 1].
        bins: number of bins M.

    Returns:
        The edges `(M + 1,)` from 0 to 1, and the bin of each example `(N,)`.
    """
    edges = torch.arange(bins + 1, dtype=torch.float64, device=confidence.device) / bins
    rounded = confidence.to(torch.float32)
    if len(confidence) <= FEW:
        return edges, torch.bucketize(rounded, edges[1:-1].to(torch.float32))
    # The same, at a third of the time: a guess that is right, or one too low next to an edge.
    index = (rounded * (bins * (1 - GUESS))).ceil_().sub_(1).clamp_(0, bins - 1).to(torch.int64)
    edges_above = edges[1:].to(torch.float32)
    edges_above[-1] = torch.inf
    return edges, index.add_(rounded > edges_above[index])


def equal_mass(confidence: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bins of consecutive ranks and nearly equal counts, the larger ones first (as `numpy.array_split`).

    Equal confidences stay together, in the bin of the middle one of them: the bins do not depend on the order of the
    examples, and no bin is a draw from among equals. With few examples, or many equal ones, some bins are empty.

    Args:
        confidence: `(N,)` float64, N > 0.
        bins: number of bins M.

    Returns:
        The edges `(M + 1,)`: the smallest confidence, then the largest confidence up to each bin; and the bin of
        each example `(N,)`.
    """
    ranked, order = torch.sort(confidence)
    _, group, size = torch.unique_consecutive(ranked, return_inverse=True, return_counts=True)
    index = torch.empty_like(order)
    ends = mass_ends(len(confidence), bins).to(confidence.device)
    index[order] = torch.searchsorted(ends, middle_rank(size), right=True)[group]
    filled = torch.bincount(index, minlength=bins).cumsum(dim=0)
    return torch.cat((ranked[:1], ranked[(filled - 1).clamp(min=0)])), index


def mass_ends(count: int, bins: int) -> Tensor:
    """The rank at which each of M parts of nearly equal size ends, the larger ones first.

    Args:
        count: number of examples N.
        bins: number of bins M.

    Returns:
        `(M,)` int64, rising to N.
    """
    return mass_end(count, bins, torch.arange(1, bins + 1))


def mass_end(count: int, bins: int | Tensor, number: Tensor) -> Tensor:
    """The rank at which the first so many of M parts of nearly equal size end, the larger ones first.

    Args:
        count: number of examples N.
        bins: number of bins M, int64; several are broadcast with `number`.
        number: how many parts, int64.

    Returns:
        Ranks, int64.
    """
    return number * (count // bins) + number.clamp(max=count % bins)


def mass_bin(count: int, bins: Tensor, rank: Tensor) -> Tensor:
    """The part, from zero, that a rank falls into: the inverse of `mass_end`.

    Args:
        count: number of examples N.
        bins: numbers of bins M, int64, at most N.
        rank: int64, from zero, broadcast with `bins`.

    Returns:
        Parts, int64.
    """
    smaller, larger_bins = count // bins, count % bins
    inside = larger_bins * (smaller + 1)  # ranks of the larger parts
    return torch.where(rank < inside, rank // (smaller + 1), larger_bins + (rank - inside) // smaller)


def middle_rank(size: Tensor) -> Tensor:
    """The rank, from zero, of the middle one of each group of equals.

    Args:
        size: `(G,)` int64, the sizes of the groups in ascending order of what is ranked.

    Returns:
        `(G,)` int64.
    """
    last = size.cumsum(dim=0) - 1
    return last - size // 2


BINNINGS: Mapping[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "equal_width": equal_width,
    "equal_mass": equal_mass,
}


def assign_bins(confidence: Tensor, *, bins: int, binning: Binning) -> tuple[Tensor, Tensor]:
    """Edges and bin indices by the named binning.

    Args:
        confidence: `(N,)` float64, in [0, 1], N > 0.
        bins: number of bins M >= 1.
        binning: a key of `BINNINGS`.

    Returns:
        The edges `(M + 1,)`, and the bin of each example `(N,)`, int64 in [0, M).

    Raises:
        TypeError: `bins` is not an integer.
        ValueError: `bins` is less than one or too large, or `binning` is unknown.
    """
    check_bins(bins)
    if binning not in BINNINGS:
        raise ValueError(f"binning is {binning!r}, expected one of {', '.join(map(repr, BINNINGS))}.")
    return BINNINGS[binning](confidence, bins)


def check_bins(bins: int) -> None:
    """Refuse what is no number of bins.

    Args:
        bins: at least 1.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than one, or more than `MOST_BINS`.
    """
    if not isinstance(bins, int) or isinstance(bins, bool):
        raise TypeError(f"bins is {bins!r}, expected a number of bins. For given edges use torch.bucketize yourself.")
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1. The usual choice is 15.")
    if bins > MOST_BINS:
        raise ValueError(f"bins is {bins}, expected at most {MOST_BINS}. The usual choice is 15.")
