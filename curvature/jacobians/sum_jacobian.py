"""A parameter that is used in several ways: Jacobians of different factored forms, added up before any square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lapkit.curvature.jacobians.embedding import EmbeddingJacobian, read_together
from lapkit.curvature.jacobians.jacobian import DENSE_LIMIT, DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct, concatenated
from lapkit.curvature.jacobians.routed import RoutedJacobian, gathered
from lapkit.curvature.jacobians.tied import TiedJacobian
from lapkit.curvature.memory import chunk_length


def combined(uses: Sequence[LayerJacobian]) -> LayerJacobian:
    """The Jacobian of a parameter that is used several times: uses are summed before anything is squared.

    Uses of one form are put side by side; what is expanded anyway takes the others in; an embedding tied to a product
    and the remaining mixtures have forms of their own.

    Args:
        uses: at least one, for the same columns and examples.

    Returns:
        Their sum.
    """
    if len(uses) == 1:
        return uses[0]
    products: dict[object, list[OuterProduct]] = {}
    for use in uses:
        if isinstance(use, OuterProduct):
            products.setdefault((use.a.shape[2:], use.g.shape[3:], use.transposed), []).append(use)
    parts: list[OuterProduct | EmbeddingJacobian | RoutedJacobian] = [concatenated(same) for same in products.values()]
    for transposed in (False, True):
        routed = [use for use in uses if isinstance(use, RoutedJacobian) and use.transposed == transposed]
        parts += [gathered(routed)] if routed else []
    tables = [use for use in uses if isinstance(use, EmbeddingJacobian)]
    if tables:
        parts.append(read_together(tables))
    others = [use for use in uses if not isinstance(use, OuterProduct | EmbeddingJacobian | RoutedJacobian)]
    if others:
        return DenseJacobian(_added(use.to_dense() for use in (*others, *parts)))
    if len(parts) == 1:
        return parts[0]
    first, last = parts[0], parts[-1]
    if (
        len(parts) == 2
        and isinstance(first, OuterProduct)
        and isinstance(last, EmbeddingJacobian)
        and _tied(first, last)
    ):
        return TiedJacobian(last, first)
    return SumJacobian(tuple(parts))


def _tied(product: OuterProduct, table: EmbeddingJacobian) -> bool:
    """Whether the rows of a table are the outputs of a product."""
    return product.a.shape[2] == 1 and not product.transposed and product.g.shape[4] == table.rows


def _added(tensors: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


@dataclass(frozen=True, eq=False)
class SumJacobian(LayerJacobian):
    """`J = sum_i J_i`: linear operations part by part; for quadratic ones J is expanded for a few examples at a time.

    Args:
        parts: Jacobians of the same weights.
    """

    parts: tuple[OuterProduct | EmbeddingJacobian | RoutedJacobian, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return self.parts[0].shape

    @property
    def budget(self) -> int:
        """See `Jacobian.budget`."""
        return self.parts[0].budget

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        return _added([part.to_dense() for part in self.parts])

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The expanded Jacobian `(K, n, P)` of a few examples at a time, three times inside the budget."""
        columns, examples, size = self.shape
        each = 3 * columns * size * self.parts[0].g.element_size()
        step = chunk_length(examples, each, self.budget)
        for start in range(0, examples, step):
            part = slice(start, min(start + step, examples))
            yield part, self.select(part).to_dense()

    def square_sum(self) -> Tensor:
        """See `Jacobian.square_sum`."""
        return _added([dense.square().sum((0, 1)) for _, dense in self._chunks()])

    def square_norms(self) -> Tensor:
        """See `Jacobian.square_norms`."""
        return torch.cat([dense.square().sum(2) for _, dense in self._chunks()], dim=1)

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`."""
        return torch.cat([DenseJacobian(dense).weighted_gram(weights) for _, dense in self._chunks()])

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        return _added([part.project(vectors) for part in self.parts])

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return _added([part.pull_back(cotangent) for part in self.parts])

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        return _added([part.pull_back_all(cotangents) for part in self.parts])

    def block(self) -> Tensor:
        """See `Jacobian.block`."""
        return _added([DenseJacobian(dense).block() for _, dense in self._chunks()])

    def output_moment(self) -> Tensor:
        """As for `DenseJacobian`: the exact block, or its diagonal for more than `DENSE_LIMIT` weights."""
        return self.square_sum()[:, None, None] if self.shape[2] > DENSE_LIMIT else self.block()[None]

    def sole_cotangent(self) -> Tensor | None:
        """None: B is shared with no other parameter."""
        return None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float]:
        """Ones: nothing but the outputs' moment is kept."""
        _, examples, size = self.shape
        groups = size if size > DENSE_LIMIT else 1
        count = examples if weights is None else float(weights.sum())
        return self.parts[0].g.new_full((groups, 1, 1), count), count

    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`."""
        return combined([part.rotate(left, right) for part in self.parts])

    def select(self, part: slice) -> SumJacobian:
        """See `LayerJacobian.select`."""
        return SumJacobian(tuple(p.select(part) for p in self.parts))

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A weight of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self
