"""The reference's helpers that scripts call; what torch has by itself is torch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

kron = torch.kron


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of these blocks."""
    return torch.block_diag(*blocks)


def parameters_per_layer(model: nn.Module) -> list[int]:
    """How many weights each parameter tensor has."""
    return [p.numel() for p in model.parameters()]


def get_nll(out_dist: Tensor, targets: Tensor) -> Tensor:
    """The mean negative log likelihood of classes `(N,)` under probabilities `(N, C)`."""
    return F.nll_loss(out_dist.log(), targets)
