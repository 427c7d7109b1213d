"""The most probable class, without the search for it: of many, `max` with indices takes longer than all else."""

from __future__ import annotations

import torch
from torch import Tensor

# Two classes can only share the maximum if it is at most one half, or a little more where rows sum to a little more.
TIES_UP_TO = 0.52
# Up to so many probabilities the number of operations is what costs, not their size.
FEW = 2**15


def top_label_outcome(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each example, and whether the first class that has it is the label.

    Args:
        rows: `(N, C)` checked probabilities.
        targets: `(N,)` checked labels.

    Returns:
        Confidences and outcomes, `(N,)` each, float64.

    Example:
        >>> rows = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])
        >>> top_label_outcome(rows, torch.tensor([0, 1, 1]))[1]
        tensor([1., 0., 1.], dtype=torch.float64)
    """
    if rows.numel() <= FEW:
        first = rows.argmax(dim=1)
        top, right = rows.gather(1, first[:, None]).squeeze(1), first == targets
    else:
        top = rows.amax(dim=1)
        right = rows.gather(1, targets[:, None]).squeeze(1) == top
        doubtful = (right & (top <= TIES_UP_TO)).nonzero().squeeze(1)
        right[doubtful] = rows[doubtful].argmax(dim=1) == targets[doubtful]
    # Rows sum to one within a tolerance only.
    return top.to(torch.float64).clamp(max=1), right.to(torch.float64)
