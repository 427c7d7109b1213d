"""The factored Jacobian of an embedding that is also the weight of a product: language models with tied weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.jacobians.jacobian import Jacobian, LayerJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.memory import chunk_length


@dataclass(frozen=True, eq=False)
class TiedJacobian(LayerJacobian):
    """`J = J_table + J_product`: what is quadratic in J has a cross term, which needs only the rows an example reads.

    Neither a V x V matrix nor, for a cross term, a `(K, N, V D)` tensor is made.

    Args:
        table: the rows that were read, of a table of V rows and D columns.
        product: the use as a matrix of V outputs and D inputs, stored as outputs x inputs, in one group.
    """

    table: EmbeddingJacobian
    product: OuterProduct

    transposed = True  # rows, the vocabulary, come first

    @property
    def budget(self) -> int:
        """See `Jacobian.budget`."""
        return self.table.budget

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return self.table.shape

    def _read(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For a few examples at a time, the rows that they read of both Jacobians, `(K, n, S, D)`."""
        columns, examples, _ = self.shape
        positions, read, width = self.product.g.shape[2], *self.table.g.shape[2:]
        each = columns * (positions * read + 2 * read * width) * self.table.g.element_size()
        step = chunk_length(examples, each, self.table.budget)
        for start in range(0, examples, step):
            part = slice(start, min(start + step, examples))
            g, places = self.product.g[:, part, :, 0], self.table.places[part]
            index = places[None, :, None].expand(columns, -1, positions, -1)
            product = torch.einsum("knts,ntd->knsd", g.gather(3, index), self.product.a[part][:, :, 0])
            yield part, self.table.summed[:, part], product

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        return self.table.to_dense() + self.product.to_dense()

    def square_sum(self) -> Tensor:
        """Squares of both and twice their product at the rows that were read."""
        total = self.table.square_sum() + self.product.square_sum()
        for part, table, product in self._read():
            total += 2 * self.table.select(part).in_rows((table * product).sum(0))
        return total

    def square_norms(self) -> Tensor:
        """See `Jacobian.square_norms`."""
        cross = torch.cat([(table * product).sum((2, 3)) for _, table, product in self._read()], dim=1)
        return self.table.square_norms() + self.product.square_norms() + 2 * cross

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`."""
        total = self.table.weighted_gram(weights) + self.product.weighted_gram(weights)
        boxed = weights.unflatten(0, (self.table.rows, -1))
        for part, table, product in self._read():
            w = boxed[self.table.places[part]]
            cross = torch.einsum("knsd,lnsd->nkl", table * w, product)
            total[part] += cross + cross.mT
        return total

    def _gram(self, other: Jacobian | None) -> Tensor:
        """Both uses by themselves, and each with the other."""
        if other is None:
            cross = _across(self.table, self.product)
            return self.table.gram() + self.product.gram() + cross + cross.permute(2, 3, 0, 1)
        if not isinstance(other, TiedJacobian):
            return super()._gram(other)
        total = self.table.gram(other.table) + self.product.gram(other.product)
        return total + _across(self.table, other.product) + _across(other.table, self.product).permute(2, 3, 0, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        return self.table.project(vectors) + self.product.project(vectors)

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return self.table.pull_back(cotangent) + self.product.pull_back(cotangent)

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        return self.table.pull_back_all(cotangents) + self.product.pull_back_all(cotangents)

    def output_moment(self) -> Tensor:
        """Both partial traces of the block side by side, `(1, D D + V)`, positions and uses taken to be independent.

        The two uses have their roles exchanged, so that no single Kronecker product fits both, and the exact second
        moment of the product's outputs would be V x V. With `G = sum g g^T` over the columns, `M = G_table + sum |g|^2
        a a^T` and `p_v = sum_{reads of v} |g|^2 + sum g_v^2 |a|^2`, the block is kept as `diag(p / sum p) (x) M`: it
        has the trace of the sum of the uses' blocks, for each row and for each column.
        """
        a, g = self.product.a[:][:, :, 0], self.product.g[:, :, :, 0].square().sum(0)  # (N, T, D), (N, T, V)
        rows = torch.einsum("ntv,nt->v", g, a.square().sum(-1))
        rows += self.table.in_rows(torch.where((self.table.index < 0), 0, self.table.g.square().sum((0, 3)))[..., None])
        moment = self.table.output_moment()[0] + torch.einsum("nt,ntd,nte->de", g.sum(-1), a, a)
        return torch.cat([moment.flatten(), rows])[None]

    def sole_cotangent(self) -> Tensor | None:
        """None: B is shared with no other parameter."""
        return None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float]:
        """Zeros `(1, V)`: nothing but the outputs' moment is kept."""
        return self.table.g.new_zeros(1, self.table.rows), len(self.table.index)

    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`; `left` is None, since a basis that mixes rows would be V x V.

        Raises:
            ValueError: if rows are to be mixed.
        """
        if left is not None:
            raise ValueError("The rows of an embedding tied to a product keep their own basis: rotate(None, right).")
        product = self.product
        return TiedJacobian(
            EmbeddingJacobian(self.table.index, self.table.g @ right[0], self.table.rows, self.table.budget),
            OuterProduct(product.a[:] @ right[0], product.g, product.transposed, product.budget),
        )

    def select(self, part: slice) -> TiedJacobian:
        """See `LayerJacobian.select`."""
        return TiedJacobian(self.table.select(part), self.product.select(part))

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A weight of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self


def _across(table: EmbeddingJacobian, product: OuterProduct) -> Tensor:
    """Inner products of the two uses, `(K, N, L, M)`: the rows that one example reads, with all examples' products."""
    g, a = product.g[:, :, :, 0], product.a[:][:, :, 0]  # (L, M, T, V), (M, T, D)
    out = g.new_empty(*table.shape[:2], *product.shape[:2])
    for n, places in enumerate(table.places):
        inner = torch.einsum("mtd,ksd->kmts", a, table.summed[:, n])
        out[:, n] = torch.einsum("kmts,lmts->klm", inner, g[..., places])
    return out
