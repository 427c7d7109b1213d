"""Rows of a network's Jacobian, kept in factored form, and their inner products under a prior over the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from lapkit.curvature.jacobians.inner_products import filled
from lapkit.curvature.jacobians.jacobian import DenseJacobian, Jacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.memory import chunk_length

SMALL = 2**27  # bytes of rows that are expanded once for products with others that are expanded


@dataclass(frozen=True, eq=False)
class TangentRows:
    """The rows `J[n,k]` of one or several Jacobians over the same weights: by pieces, example by example, by column.

    Inner products are those of functions under a prior with independent weights, `J diag(variance) J'^T`. The variance
    is one number `(1,)`, one for each parameter tensor `(L,)`, or one for each weight `(P,)`; results are
    differentiable in it. Only for the last is the Jacobian expanded, some examples at a time.

    Args:
        pieces: with a part for each parameter.
    """

    pieces: tuple[NetworkJacobian, ...]

    def __len__(self) -> int:
        """Their number R."""
        return sum(columns * examples for columns, examples, _ in (piece.shape for piece in self.pieces))

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each parameter."""
        return self.pieces[0].sizes

    def inner_products(self, other: TangentRows | None, variance: Tensor) -> Tensor:
        """`J diag(variance) J'^T` with other rows, `(R, R')`; with themselves where None is given.

        Args:
            other: rows over the same weights.
            variance: of the weights under the prior, `(1,)`, `(L,)` or `(P,)`.
        """
        if other is not None and self._expanded and 8 * len(other) * sum(self.sizes) <= SMALL:
            return (self.to_dense() * self._of_weights(variance)) @ other._dense.T
        products = (
            self._products(index, other, None if part.ndim == 0 else part) * (part if part.ndim == 0 else 1)
            for index, part in enumerate(self._split(variance))
        )
        return reduce(torch.add, products)

    def gram(self, variance: Tensor) -> Tensor:
        """`inner_products` with themselves, `(R, R)`; what does not depend on the variance is kept for the next."""
        if variance.numel() == 1:
            return variance.reshape(()) * self._whole
        if variance.numel() == len(self.sizes):
            return torch.einsum("l,lrs->rs", variance, self._by_parameter)
        return self.inner_products(None, variance)

    def blocks(self, variance: Tensor) -> Tensor:
        """`J_n diag(variance) J_n^T` of the K rows of each example, `(N, K, K)`."""
        parts = self._split(variance)
        return torch.cat([_blocks(piece, parts) for piece in self.pieces])

    def grouped(self, count: int, variance: Tensor) -> Tensor:
        """The Gram matrices of as many groups of examples in a row, of equal size, `(count, n, n)`."""
        size = sum(piece.shape[1] for piece in self.pieces) // count
        if size == 1:
            return self.blocks(variance)
        if self._expanded:
            rows = self.to_dense().unflatten(0, (count, -1))
            return (rows * self._of_weights(variance)) @ rows.mT
        groups = (self.examples(index * size, (index + 1) * size) for index in range(count))
        return torch.stack([group.inner_products(None, variance) for group in groups])

    def matched(self, other: TangentRows, variance: Tensor) -> Tensor:
        """The inner products of rows with those of the same place alone, `(R,)`."""
        return (self.to_dense() * self._of_weights(variance) * other.to_dense()).sum(-1)

    def to_dense(self) -> Tensor:
        """The rows themselves, `(R, P)`."""
        return torch.cat([piece.to_dense().transpose(0, 1).flatten(0, 1) for piece in self.pieces])

    def examples(self, start: int, stop: int) -> TangentRows:
        """Those of some of the examples, counted through the pieces."""
        chosen, begin = [], 0
        for piece in self.pieces:
            end = begin + piece.shape[1]
            if start < end and begin < stop:
                chosen.append(piece.select(slice(max(start, begin) - begin, min(stop, end) - begin)))
            begin = end
        return TangentRows(tuple(chosen))

    def _split(self, variance: Tensor) -> list[Tensor]:
        """The variance of each parameter: a number `()`, or one for each of its weights `(P_l,)`.

        Raises:
            ValueError: if its length is none of the three.
        """
        if variance.numel() == 1:
            return [variance.reshape(())] * len(self.sizes)
        if variance.numel() == len(self.sizes):
            return list(variance.unbind())
        if variance.numel() == sum(self.sizes):
            return list(variance.split(self.sizes))
        raise ValueError(
            f"Expected 1 prior variance, {len(self.sizes)} (one for each parameter tensor) or {sum(self.sizes)} (one "
            f"for each weight), got {variance.numel()}."
        )

    def _of_weights(self, variance: Tensor) -> Tensor:
        """The variance of each weight, `(P,)`."""
        return torch.cat([part.expand(size) for part, size in zip(self._split(variance), self.sizes, strict=True)])

    @property
    def _expanded(self) -> bool:
        """Whether the Jacobian is expanded already, as it is where it has a graph."""
        return all(isinstance(part, DenseJacobian) for piece in self.pieces for part in piece.parts)

    @cached_property
    def _dense(self) -> Tensor:
        """`to_dense`, kept."""
        return self.to_dense()

    @cached_property
    def _whole(self) -> Tensor:
        """The Gram matrix `(R, R)` of a unit prior."""
        return reduce(torch.add, (self._products(index, None, None) for index in range(len(self.sizes))))

    @cached_property
    def _by_parameter(self) -> Tensor:
        """That of each parameter, `(L, R, R)`."""
        return torch.stack([self._products(index, None, None) for index in range(len(self.sizes))])

    def _products(self, index: int, other: TangentRows | None, weights: Tensor | None) -> Tensor:
        """The inner products `(R, R')` of one parameter's part; with themselves, half of them are computed."""
        second = self if other is None else other
        lines: list[list[Tensor]] = []
        for i, one in enumerate(self.pieces):
            line = [lines[j][i].T for j in range(i)] if other is None else []
            for two in second.pieces[len(line) :]:
                left, right = one.parts[index], two.parts[index]
                product = _gram(left, right) if weights is None else _weighted(left, right, weights)  # (K, N, L, M)
                line.append(product.permute(1, 0, 3, 2).flatten(2).flatten(0, 1))
            lines.append(line)
        return torch.cat([torch.cat(line, dim=1) for line in lines])


def _gram(one: Jacobian, two: Jacobian) -> Tensor:
    """`Jacobian.gram`; where one is expanded, since it has a graph, the other is not."""
    if isinstance(one, DenseJacobian) and one.values.requires_grad and one is not two:
        return two.project(one.values.flatten(0, 1).T).permute(2, 0, 1).unflatten(0, one.shape[:2])
    return one.gram(two)


def _weighted(one: Jacobian, two: Jacobian, weights: Tensor) -> Tensor:
    """`J diag(weights) J'^T` of the expanded Jacobians of some examples of both at a time, `(K, N, L, M)`."""

    def block(first: slice, second: slice) -> Tensor:
        left, right = one.select(first).to_dense(), two.select(second).to_dense()
        product = (left * weights).flatten(0, 1) @ right.flatten(0, 1).T
        return product.unflatten(1, right.shape[:2]).unflatten(0, left.shape[:2])

    each = 8 * (2 * one.shape[0] + two.shape[0]) * len(weights)
    step = chunk_length(max(one.shape[1], two.shape[1]), each, min(one.budget, two.budget))
    return filled(block, one.shape[1], None if one is two else two.shape[1], step)


def _blocks(piece: NetworkJacobian, parts: list[Tensor]) -> Tensor:
    """`TangentRows.blocks` of one piece."""

    def each() -> Iterator[Tensor]:
        for jacobian, part in zip(piece.parts, parts, strict=True):
            if part.ndim:
                yield jacobian.weighted_gram(part)
            else:
                yield part * jacobian.weighted_gram(part.detach().new_ones(jacobian.shape[2]))

    return reduce(torch.add, each())
