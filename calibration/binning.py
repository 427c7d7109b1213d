"""Sorting confidences into bins: a binning gives the edges and each example's bin.

A new binning is one function and one line in `BINNINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Binning: TypeAlias = Literal["equal_width", "equal_mass"]


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
    return edges, torch.bucketize(confidence.to(torch.float32), edges[1:-1].to(torch.float32))


def equal_mass(confidence: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bins of consecutive ranks and nearly equal counts, the larger ones first (as `numpy.array_split`).

    Equal confidences keep their order and may be parted between two bins. With fewer examples than bins the
    last bins are empty.

    Args:
        confidence: `(N,)` float64, N > 0.
        bins: number of bins M.

    Returns:
        The edges `(M + 1,)`: the smallest confidence, then the largest confidence of each bin; and the bin of
        each example `(N,)`.
    """
    ranked, order = torch.sort(confidence, stable=True)
    smaller, larger_bins = divmod(len(confidence), bins)
    number = torch.arange(bins, device=confidence.device)
    sizes = smaller + (number < larger_bins).to(torch.int64)
    index = torch.empty_like(order)
    index[order] = number.repeat_interleave(sizes)
    edges = torch.cat((ranked[:1], ranked[sizes.cumsum(dim=0) - 1]))
    return edges, index


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
        ValueError: `bins` is less than one, or `binning` is unknown.
    """
    if not isinstance(bins, int) or isinstance(bins, bool):
        raise TypeError(f"bins is {bins!r}, expected a number of bins. For given edges use torch.bucketize yourself.")
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1. The usual choice is 15.")
    if binning not in BINNINGS:
        raise ValueError(f"binning is {binning!r}, expected one of {', '.join(map(repr, BINNINGS))}.")
    return BINNINGS[binning](confidence, bins)
