"""The factored Jacobian of a stack of matrices, each of which multiplies the rows that the data send to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct


@dataclass(frozen=True, eq=False)
class RoutedJacobian(LayerJacobian):
    """Experts: `J[k,n]` of matrix e is `sum_r g[k,r] (x) a[r]` over the rows r of example n that went to e.

    Rows are kept once, in any order and number, and become an `OuterProduct` expert by expert. In a Kronecker-factored
    block every expert is a group, whose A counts its own rows.

    Args:
        a: rows that went in, `(R, I)`.
        g: what came back, `(K, R, O)`.
        owner: the example of each row, `(R,)`.
        expert: the matrix that each row was multiplied with, `(R,)`.
        examples: their number N.
        experts: how many matrices the weight has, E.
        transposed: whether they are stored as inputs x outputs instead of outputs x inputs.
        budget: bytes that an intermediate may take.
    """

    a: Tensor
    g: Tensor
    owner: Tensor
    expert: Tensor
    examples: int
    experts: int
    transposed: bool = False
    budget: int = 2**28

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return self.g.shape[0], self.examples, self.experts * self._size

    @property
    def _size(self) -> int:
        """Weights of one expert."""
        return self.a.shape[1] * self.g.shape[2]

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Each expert that was sent any rows, and which."""
        counts = torch.bincount(self.expert, minlength=self.experts).tolist()
        rows = self.expert.argsort(stable=True).split(counts)
        yield from ((e, rows[e]) for e, count in enumerate(counts) if count)

    def _product(self, rows: Tensor) -> tuple[Tensor, OuterProduct]:
        """The examples that these rows of one expert belong to, and its Jacobian for those: rows are positions."""
        examples, local = self.owner[rows].unique(return_inverse=True)
        place, positions = _places(local, len(examples))
        shape = (len(examples), positions, 1)

        def placed(t: Tensor) -> Tensor:
            """Rows `(K, R, size)` as `(K, n, T, 1, size)`, zero where an example has fewer than others."""
            out = t.new_zeros(len(t), shape[0] * shape[1], t.shape[2])
            return out.index_copy_(1, place, t).unflatten(1, shape)

        a, g = placed(self.a[rows][None])[0], placed(self.g[:, rows])
        return examples, OuterProduct(a, g, self.transposed, self.budget)

    def _products(self) -> Iterator[tuple[int, Tensor, OuterProduct]]:
        """Each expert with rows, the examples that they belong to, and its Jacobian for those."""
        yield from ((expert, *self._product(rows)) for expert, rows in self._rows())

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        out = self.g.new_zeros(*self.shape[:2], self.experts, self._size)
        for expert, examples, product in self._products():
            out[:, examples, expert] = product.to_dense()
        return out.flatten(2)

    def square_sum(self) -> Tensor:
        """See `Jacobian.square_sum`."""
        out = self.g.new_zeros(self.experts, self._size)
        for expert, _, product in self._products():
            out[expert] = product.square_sum()
        return out.flatten()

    def squares(self) -> Tensor:
        """See `Jacobian.squares`."""
        out = self.g.new_zeros(self.examples, self.experts, self._size)
        for expert, examples, product in self._products():
            out[examples, expert] = product.squares()
        return out.flatten(1)

    def square_norms(self) -> Tensor:
        """See `Jacobian.square_norms`."""
        out = self.g.new_zeros(self.shape[:2])
        for _, examples, product in self._products():
            out.index_add_(1, examples, product.square_norms())
        return out

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`."""
        columns, examples, _ = self.shape
        out, each = self.g.new_zeros(examples, columns, columns), weights.unflatten(0, (self.experts, -1))
        for expert, mine, product in self._products():
            out = out.index_add(0, mine, product.weighted_gram(each[expert]))
        return out

    def _gram(self, other: Jacobian | None) -> Tensor:
        """The sum over experts that both have rows of."""
        second = self if other is None else other
        if not isinstance(second, RoutedJacobian) or (self._form != second._form):
            return super()._gram(other)
        out = self.g.new_zeros(self.shape[0] * self.examples, second.shape[0] * second.examples)
        rows = dict(second._rows())
        for expert, mine, product in self._products():
            if expert in rows:
                theirs, paired = (mine, None) if other is None else second._product(rows[expert])
                at, to = self._flat(mine), second._flat(theirs)
                out[at[:, None], to] += product.gram(paired).flatten(2).flatten(0, 1)
        return out.unflatten(1, second.shape[:2]).unflatten(0, self.shape[:2])

    @property
    def _form(self) -> tuple[object, ...]:
        """What two Jacobians have in common that see a weight as the same matrices."""
        return self.experts, self.a.shape[1], self.g.shape[2], self.transposed

    def _flat(self, examples: Tensor) -> Tensor:
        """Where all columns of some examples stand among `(K N,)`."""
        return (self.examples * torch.arange(len(self.g), device=examples.device)[:, None] + examples).flatten()

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        out, each = self.g.new_zeros(*self.shape[:2], vectors.shape[1]), vectors.unflatten(0, (self.experts, -1))
        for expert, examples, product in self._products():
            out.index_add_(1, examples, product.project(each[expert]))
        return out

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        out = self.g.new_zeros(self.experts, self._size)
        for expert, examples, product in self._products():
            out[expert] = product.pull_back(cotangent[:, examples])
        return out.flatten()

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        out = self.g.new_zeros(self.experts, self._size, cotangents.shape[2])
        for expert, examples, product in self._products():
            out[expert] = product.pull_back_all(cotangents[:, examples])
        return out.flatten(0, 1)

    def output_moment(self) -> Tensor:
        """`(E, O, O)`, zero for an expert without rows."""
        out = self.g.new_zeros(self.experts, self.g.shape[2], self.g.shape[2])
        for expert, rows in self._rows():
            g = self.g[:, rows].flatten(0, 1)
            out[expert] = g.T @ g
        return out

    def sole_cotangent(self) -> Tensor | None:
        """None: B is shared with no other parameter."""
        return None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each expert's own `sum w a a^T` `(E, I, I)` and number of rows `(E,)`."""
        w = self.a.new_ones(self.examples) if weights is None else weights.to(self.a)
        out = self.a.new_zeros(self.experts, self.a.shape[1], self.a.shape[1])
        for expert, rows in self._rows():
            a = self.a[rows]
            out[expert] = (a * w[self.owner[rows], None]).T @ a
        counts = torch.bincount(self.expert, w[self.owner].double(), minlength=self.experts)
        return out, counts.double()

    def reduced(self) -> RoutedJacobian:
        """See `LayerJacobian.reduced`: the rows that one example sent to one expert become one."""
        pair, index = (self.expert * self.examples + self.owner).unique(return_inverse=True)
        counts = torch.bincount(index, minlength=len(pair))
        a = self.a.new_zeros(len(pair), self.a.shape[1]).index_add_(0, index, self.a) / counts[:, None]
        g = self.g.new_zeros(len(self.g), len(pair), self.g.shape[2]).index_add_(1, index, self.g)
        return replace(self, a=a, g=g, owner=pair % self.examples, expert=pair // self.examples)

    def select(self, part: slice) -> RoutedJacobian:
        """See `LayerJacobian.select`."""
        chosen = torch.arange(self.examples, device=self.owner.device)[part]
        number = torch.full((self.examples,), -1, device=self.owner.device)
        number[chosen] = torch.arange(len(chosen), device=self.owner.device)
        kept = number[self.owner] >= 0
        return replace(
            self,
            a=self.a[kept],
            g=self.g[:, kept],
            owner=number[self.owner[kept]],
            expert=self.expert[kept],
            examples=len(chosen),
        )

    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`: each expert in a basis of its own."""
        if len(right) != self.experts:
            return DenseJacobian(self.to_dense()).rotate(left, right)  # an exact block, where the fit found no factors
        output, incoming = (right, left) if self.transposed else (left, right)
        a, g = self.a.clone(), self.g.clone()
        for expert, rows in self._rows():
            if incoming is not None:
                a[rows] = self.a[rows] @ incoming[expert]
            if output is not None:
                g[:, rows] = self.g[:, rows] @ output[expert]
        return replace(self, a=a, g=g)

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A weight of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self


def gathered(parts: Sequence[RoutedJacobian]) -> RoutedJacobian:
    """Several uses of one weight as one, rows side by side: sums are taken before anything is squared."""
    return replace(
        parts[0],
        a=torch.cat([p.a for p in parts]),
        g=torch.cat([p.g for p in parts], dim=1),
        owner=torch.cat([p.owner for p in parts]),
        expert=torch.cat([p.expert for p in parts]),
    )


def _places(owner: Tensor, examples: int) -> tuple[Tensor, int]:
    """A place for each row, those of one example side by side, and how many places an example has."""
    counts = torch.bincount(owner, minlength=examples)
    order = owner.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    positions = int(counts.max())
    return owner * positions + rank, positions
