"""Equal scores have no order: what depends on one uses the mean over all orders of the examples that tie."""

from __future__ import annotations

import torch
from torch import Tensor


def average_over_ties(score: Tensor, outcome: Tensor) -> Tensor:
    """Each outcome replaced by the mean of those with the same score, its expectation over orders of the ties.

    A softmax in float32 saturates at 1.0, so that ties are common, and their order is that of the data set.

    Args:
        score: `(N,)` finite.
        outcome: `(N,)` float64.

    Returns:
        The means `(N,)`, in the order given.

    Example:
        >>> score = torch.tensor([0.5, 1.0, 1.0])
        >>> average_over_ties(score, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    _, group, count = torch.unique(score, return_inverse=True, return_counts=True)
    return (torch.bincount(group, weights=outcome) / count)[group]
