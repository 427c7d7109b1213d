"""Blocks of the GGN within and across layers, from factored Jacobians where layers have one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.memory import chunk_length

BUDGET = 2**26  # bytes that the products of two layers' cotangents and inputs may take, for a few examples at a time


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter's Jacobian and where its weights stand among all."""

    start: int
    jacobian: LayerJacobian

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.jacobian.shape[2])

    @cached_property
    def rows(self) -> Tensor:
        """The expanded Jacobian, `(K N, P)`."""
        return self.jacobian.to_dense().flatten(0, 1)

    @cached_property
    def outer(self) -> tuple[Tensor, Tensor] | None:
        """Cotangents `(K, N, O)` and inputs `(N, I)`."""
        return self.jacobian.single_position()


def add_blocks(total: Tensor, parts: Sequence[tuple[int, LayerJacobian]]) -> None:
    """Add `sum_{k,n} J[k,n] J[k,n]^T` to a matrix over all weights, in its blocks on and above the diagonal.

    Args:
        total: `(P, P)`; what stands below the diagonal blocks afterwards has no meaning.
        parts: for each parameter where its weights begin, and its Jacobian; in ascending order.
    """
    known = [_Part(start, jacobian) for start, jacobian in parts]
    pairs = [(one, two) for i, one in enumerate(known) for two in known[i:]]
    factored = [_factors_are_cheaper(one, two) for one, two in pairs]
    if not any(factored) and sum(part.jacobian.shape[2] for part in known) == len(total):
        rows = torch.cat([part.rows for part in known], dim=1)
        total.addmm_(rows.T, rows)
        return
    for (one, two), cheaper in zip(pairs, factored, strict=True):
        block = total[one.place, two.place]
        if cheaper:
            block += _from_factors(one, two)
        else:
            block.addmm_(one.rows.T, two.rows)


def mirrored(total: Tensor, sizes: Sequence[int]) -> Tensor:
    """The symmetric matrix of which `total` has the blocks of these sizes on and above the diagonal."""
    full, start = total.clone(), 0
    for size in sizes:
        start += size
        full[start:, start - size : start] = total[start - size : start, start:].T
    return full


def _factors_are_cheaper(one: _Part, two: _Part) -> bool:
    """By counted multiplications: `N O O' (K + I I')` against `K N O I O' I'`."""
    if one.outer is None or two.outer is None:
        return False
    columns = one.jacobian.shape[0]
    inputs = one.outer[1].shape[1] * two.outer[1].shape[1]
    return columns + inputs < columns * inputs


def _from_factors(one: _Part, two: _Part) -> Tensor:
    """`sum_n (sum_k g g'^T)_n (x) (a a'^T)_n`, one product without the factor K."""
    assert one.outer is not None  # the caller has asked
    assert two.outer is not None
    (g, a), (h, b) = one.outer, two.outer
    outputs, inputs = (g.shape[2], h.shape[2]), (a.shape[1], b.shape[1])
    total = g.new_zeros(outputs[0] * outputs[1], inputs[0] * inputs[1])
    numbers = outputs[0] * outputs[1] + inputs[0] * inputs[1]
    for part in torch.arange(len(a)).split(chunk_length(len(a), numbers * g.element_size(), BUDGET)):
        here = slice(int(part[0]), int(part[-1]) + 1)
        cotangents = torch.einsum("kno,knp->nop", g[:, here], h[:, here]).flatten(1)
        total.addmm_(cotangents.T, (a[here, :, None] * b[here, None]).flatten(1))
    four = total.unflatten(1, inputs).unflatten(0, outputs)  # (O, O', I, I')
    rows = (2, 0) if one.jacobian.transposed else (0, 2)
    columns = (3, 1) if two.jacobian.transposed else (1, 3)
    return four.permute(*rows, *columns).reshape(one.jacobian.shape[2], two.jacobian.shape[2])
