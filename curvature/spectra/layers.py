"""Weight and bias of a layer together: they are sent the same cotangent, whose inner products are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct

Add = Callable[[list[str], list[LayerJacobian]], None]


class Layers:
    """Holds a Jacobian back until the next one shows whether the two share their cotangent.

    Args:
        add: called with the names and Jacobians of a layer.
        label_of: the group of each parameter; a layer does not reach beyond one.
    """

    def __init__(self, add: Add, label_of: Callable[[str], str]) -> None:
        self.add, self.label_of = add, label_of
        self.names: list[str] = []
        self.held: list[LayerJacobian] = []

    def __call__(self, name: str, jacobian: LayerJacobian) -> None:
        """Take one parameter's Jacobian."""
        if self.held and not self._continued(name, jacobian):
            self.flush()
        self.names.append(name)
        self.held.append(jacobian)

    def _continued(self, name: str, jacobian: LayerJacobian) -> bool:
        return self.label_of(name) == self.label_of(self.names[0]) and joined([self.held[0], jacobian]) is not None

    def flush(self) -> None:
        """Give on what is held."""
        if self.held:
            names, held = self.names, self.held
            self.names, self.held = [], []
            self.add(names, held)


def joined(jacobians: Sequence[LayerJacobian]) -> OuterProduct | None:
    """`g (x) [a, b, ...]` of Jacobians `g (x) a`, `g (x) b`, ..., or None if they are no such."""
    outer = [jacobian.single_position() for jacobian in jacobians]
    factors = [pair for pair in outer if pair is not None]
    if len(factors) < len(outer) or not all(_same_memory(factors[0][0], g) for g, _ in factors):
        return None
    g, inputs = factors[0][0], torch.cat([a for _, a in factors], dim=1)
    return OuterProduct(inputs[:, None, None], g[:, :, None, None], budget=min(j.budget for j in jacobians))


def inner_products(one: Sequence[LayerJacobian], other: Sequence[LayerJacobian] | None = None) -> Tensor:
    """Those over all parameters of a layer, `(K, N, L, M)`, with the same parameters' Jacobians of another batch.

    Args:
        one: a Jacobian for each parameter.
        other: likewise; the same by default.
    """
    first = joined(one) if len(one) > 1 else None
    if other is None:
        return first.gram() if first is not None else reduce(torch.add, (jacobian.gram() for jacobian in one))
    second = joined(other) if first is not None else None
    if first is not None and second is not None:
        return first.gram(second)
    return reduce(torch.add, (a.gram(b) for a, b in zip(one, other, strict=True)))


def _same_memory(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()
