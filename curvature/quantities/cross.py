"""Blocks of the GGN within and across layers, from factored Jacobians where layers have one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.memory import chunk_length

NEAR = 2**24  # bytes of products that are read again at once: measured, on a CPU
STRIPES = 8  # of the upper triangle, of which 9/16 of the matrix are computed
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


class OwnBlock:
    """`sum_n (sum_k g g^T)_n (x) (a a^T)_n`, the block of a layer with one position, a quarter of its entries.

    Both factors are symmetric: pairs of outputs are kept once, and of pairs of inputs stripes of the upper triangle.
    The matrix is put together at the end, not for each batch.

    Args:
        outputs: O.
        inputs: I.
        transposed: whether the weight is stored as inputs x outputs.
        like: for type and place.
    """

    def __init__(self, outputs: int, inputs: int, *, transposed: bool, like: Tensor) -> None:
        self.outputs, self.inputs, self.transposed = outputs, inputs, transposed
        self.pairs = torch.triu_indices(outputs, outputs, device=like.device).unbind()
        width = max(-(-inputs // STRIPES), 8)
        self.starts = range(0, inputs, width)
        self.stripes = [
            like.new_zeros(len(self.pairs[0]), min(width, inputs - start) * (inputs - start)) for start in self.starts
        ]

    def add(self, g: Tensor, a: Tensor) -> None:
        """Some columns of a batch: cotangents `(K, N, O)` and inputs `(N, I)`."""
        one, two = self.pairs
        numbers = self.outputs**2 + max(stripe.shape[1] for stripe in self.stripes)
        step = chunk_length(len(a), numbers * g.element_size(), NEAR)
        for cotangents, inputs in zip(g.split(step, dim=1), a.split(step), strict=True):
            products = torch.einsum("kno,knp->nop", cotangents, cotangents)[:, one, two]
            for start, stripe in zip(self.starts, self.stripes, strict=True):
                width = stripe.shape[1] // (self.inputs - start)
                outer = inputs[:, start : start + width, None] * inputs[:, None, start:]
                stripe.addmm_(products.T, outer.flatten(1))

    def add_to(self, block: Tensor) -> None:
        """Add it in place to a matrix `(O I, O I)`, weights in the order in which they are stored."""
        shape = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        boxed = block.unflatten(1, shape).unflatten(0, shape)
        four = boxed.permute(1, 3, 0, 2) if self.transposed else boxed.permute(0, 2, 1, 3)  # (O, O, I, I)
        one, two = self.pairs
        apart = one != two
        for start, stripe in zip(self.starts, self.stripes, strict=True):
            found = stripe.unflatten(1, (-1, self.inputs - start))
            here = slice(start, start + found.shape[1])
            for row, column, part in ((one, two, found), (two[apart], one[apart], found[apart])):
                four[row, column, here, start:] += part
                four[row, column, here.stop :, here] += part[:, :, found.shape[1] :].mT


OwnBlocks = dict[int, OwnBlock]  # by where the parameters' weights begin


def add_blocks(total: Tensor, parts: Sequence[tuple[int, LayerJacobian]], own: OwnBlocks | None = None) -> None:
    """Add `sum_{k,n} J[k,n] J[k,n]^T` to a matrix over all weights, in its blocks on and above the diagonal.

    Args:
        total: `(P, P)`; what stands below the diagonal blocks afterwards has no meaning.
        parts: for each parameter where its weights begin, and its Jacobian; in ascending order.
        own: blocks on the diagonal that are kept apart where that is cheaper, and come to the total by `mirrored`.
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
        if cheaper and one is two and own is not None:
            _add_own(own, one, total)
        elif cheaper:
            block += _from_factors(one, two)
        else:
            block.addmm_(one.rows.T, two.rows)


def _add_own(own: OwnBlocks, part: _Part, like: Tensor) -> None:
    """Add the block of one parameter to those that are kept apart."""
    assert part.outer is not None  # the caller has asked
    g, a = part.outer
    if part.start not in own:
        own[part.start] = OwnBlock(g.shape[2], a.shape[1], transposed=part.jacobian.transposed, like=like)
    own[part.start].add(g, a)


def mirrored(total: Tensor, sizes: Sequence[int], own: OwnBlocks | None = None) -> Tensor:
    """The symmetric matrix of which `total` has the blocks of these sizes on and above the diagonal.

    Args:
        total: `(P, P)`.
        sizes: of the blocks.
        own: blocks that were kept apart.
    """
    full, start = total.clone(), 0
    for begin, block in (own or {}).items():
        place = slice(begin, begin + block.outputs * block.inputs)
        block.add_to(full[place, place])
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
