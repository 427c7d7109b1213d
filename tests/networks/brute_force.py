"""Jacobians and gradients by a loop over examples and outputs: a batch of one, one `autograd.grad` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rows(x: Any, part: slice) -> Any:
    """Some examples of a batch; the first axis of every tensor is the example's."""
    if isinstance(x, Tensor):
        return x[part]
    if isinstance(x, Mapping):
        return {key: rows(value, part) for key, value in x.items()}
    return tuple(rows(value, part) for value in x)


def gradient(output: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Of one number in all weights, (P,)."""
    gradients = torch.autograd.grad(output, weights, retain_graph=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradients])


def jacobian(
    model: nn.Module,
    x: Any,
    examples: int,
    outputs: Callable[[nn.Module, Any], Tensor],
    cut: Callable[[Any, slice], Any] = rows,
) -> tuple[Tensor, Tensor]:
    """Outputs `(N, *, C)` and `d f(x_n) / d theta`, `(N, *, C, P)`.

    Args:
        model: in eval mode; weights that require gradients count.
        x: a batch.
        examples: how many there are.
        outputs: `(model, x) -> (N, *, C)`.
        cut: makes some of the examples a batch.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    values, derivatives = [], []
    for n in range(examples):
        f = outputs(model, cut(x, slice(n, n + 1)))
        assert len(f) == 1
        values.append(f[0].detach())
        each = torch.stack([gradient(entry, weights) for entry in f.reshape(-1)])
        derivatives.append(each.reshape(*f.shape[1:], -1))
    return torch.stack(values), torch.stack(derivatives)
