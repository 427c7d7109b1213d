"""Whether a network is still the one it was."""

from __future__ import annotations

import torch
from torch import nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> list[int]:
    """One number for each parameter and buffer, in which training shows: of weights, and of running statistics.

    The bits are summed as integers, whose sum does not depend on the order, so not on threads and devices either.

    Args:
        model: the network.

    Returns:
        The sums, parameters first.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> before = fingerprint(net)
        >>> _ = net.bias.data.add_(1)
        >>> [now == then for now, then in zip(fingerprint(net), before)]
        [True, False]
    """
    real = [torch.view_as_real(p) if p.is_complex() else p for p in (*model.parameters(), *model.buffers())]
    return [int(p.detach().view(_INTEGERS[p.element_size()]).sum()) for p in real]
