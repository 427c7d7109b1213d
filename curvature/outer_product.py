"""The factored Jacobian of a weight, `J[k,n] = sum_t g[k,n,t] (x) a[n,t]`, expanded only where no contraction does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians import DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.memory import chunk_length


@dataclass(frozen=True, eq=False)
class OuterProduct(LayerJacobian):
    """A weight that multiplies: linear maps and convolutions, over T shared positions and G groups.

    Two routes lead to most results when T > 1: through the expanded Jacobian of a chunk of examples, or through
    products of pairs of positions, which leave the columns for last. The cheaper one is taken, by counted
    multiplications.

    Args:
        a: what went in, `(N, T, G, I)`.
        g: what came back, `(K, N, T, G, O)`.
        transposed: whether the weight is stored as inputs x outputs instead of outputs x inputs.
        budget: bytes that an intermediate may take.
    """

    a: Tensor
    g: Tensor
    transposed: bool = False
    budget: int = 2**28

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        groups, inputs = self.a.shape[2:]
        return self.g.shape[0], self.g.shape[1], groups * self.g.shape[-1] * inputs

    def _as_vector(self, matrix: Tensor) -> Tensor:
        """`(*, G, O, I)` as the weight stores it, `(*, P)`."""
        return (matrix.mT if self.transposed else matrix).flatten(-3)

    def _as_matrix(self, vector: Tensor) -> Tensor:
        """`(P, *)` as `(G, O, I, *)`."""
        groups, inputs, outputs = *self.a.shape[2:], self.g.shape[-1]
        if self.transposed:
            return vector.unflatten(0, (groups, inputs, outputs)).transpose(1, 2)
        return vector.unflatten(0, (groups, outputs, inputs))

    def _expanded(self, extra: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples of the expanded Jacobian, `(n, G, K, O, I)`, each `extra` times inside the budget."""
        columns, examples, size = self.shape
        step = chunk_length(examples, extra * columns * size * self.g.element_size(), self.budget)
        for start in range(0, examples, step):
            part = slice(start, min(start + step, examples))
            g = self.g[:, part].permute(1, 3, 0, 4, 2).flatten(2, 3)  # (n, G, K O, T)
            a = self.a[part].permute(0, 2, 1, 3)  # (n, G, T, I)
            yield part, (g @ a).unflatten(2, (columns, -1))

    def _pairs(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples of the products of inputs at pairs of positions, `(n, G, T, T, I)`."""
        examples, positions, groups, inputs = self.a.shape
        step = chunk_length(examples, positions**2 * groups * inputs * self.a.element_size(), self.budget)
        for start in range(0, examples, step):
            part = slice(start, min(start + step, examples))
            a = self.a[part].transpose(1, 2)  # (n, G, T, I)
            yield part, a[:, :, :, None] * a[:, :, None]

    def _pairs_are_cheaper(self, per_pair: float, per_column: float) -> bool:
        """Whether `T^2 per_pair` beats the expansion's `T K O I` and what follows it for each column."""
        positions, inputs = self.a.shape[1], self.a.shape[3]
        columns, outputs = self.g.shape[0], self.g.shape[-1]
        return positions**2 * per_pair < columns * outputs * inputs * (positions + per_column)

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        expanded = torch.einsum("kntgo,ntgi->kngoi", self.g, self.a)
        return self._as_vector(expanded)

    def square_sum(self) -> Tensor:
        """`(sum_k g^2)^T a^2` for one position: the columns never enter the matrix product."""
        if self.a.shape[1] == 1:
            g, a = self.g[:, :, 0].square().sum(0), self.a[:, 0].square()
            return self._as_vector(torch.einsum("ngo,ngi->goi", g, a))
        inputs, columns, outputs = self.a.shape[3], self.g.shape[0], self.g.shape[-1]
        total = self.a.new_zeros(self.a.shape[2], outputs, inputs)
        if self._pairs_are_cheaper(outputs * (columns + inputs), 1):
            for part, pairs in self._pairs():
                g = self.g[:, part]
                products = torch.einsum("knsgo,kntgo->gonst", g, g)
                total += products.flatten(2) @ pairs.permute(1, 0, 2, 3, 4).flatten(1, 3)
        else:
            for _, expanded in self._expanded():
                total += expanded.square().sum((0, 2))
        return self._as_vector(total)

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """`sum_o g_k g_l (sum_i w_oi a_i^2)` for one position: O(N I O + N K^2 O) instead of O(N K^2 I O)."""
        w = self._as_matrix(weights)
        if self.a.shape[1] == 1:
            scale = torch.einsum("ngi,goi->ngo", self.a[:, 0].square(), w).flatten(1)
            g = self.g[:, :, 0].flatten(2).transpose(0, 1)  # (N, K, G O)
            return (g * scale[:, None]) @ g.mT
        columns, outputs, inputs = self.g.shape[0], self.g.shape[-1], self.a.shape[3]
        out = self.g.new_empty(self.g.shape[1], columns, columns)
        if self._pairs_are_cheaper(inputs + outputs * (inputs + columns + columns**2), columns):
            for part, pairs in self._pairs():
                kernel = torch.einsum("ngsti,goi->nsgto", pairs, w)
                g = self.g[:, part]
                half = torch.einsum("lntgo,nsgto->nlsgo", g, kernel).flatten(2)
                out[part] = half @ g.movedim(0, 1).flatten(2).mT
        else:
            for part, expanded in self._expanded(extra=2):
                rows = expanded.transpose(1, 2).flatten(2)  # (n, K, G O I)
                out[part] = (rows * w.flatten()) @ rows.mT
        return out

    def gram(self) -> Tensor:
        """The Hadamard product of two small Gram matrices for one position and one group.

        Reference:
            Dangel et al., ViViT, appendix C.1.
        """
        if self.a.shape[1:3] == (1, 1):
            a, g = self.a[:, 0, 0], self.g[:, :, 0, 0]
            return torch.einsum("kno,lmo->knlm", g, g) * (a @ a.T)[None, :, None, :]
        columns, examples, _ = self.shape
        rows = self.to_dense().flatten(0, 1)
        return (rows @ rows.T).reshape(columns, examples, columns, examples)

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        matrix = self._as_matrix(vectors)  # (G, O, I, R)
        return torch.einsum("kntgo,ntgor->knr", self.g, torch.einsum("ntgi,goir->ntgor", self.a, matrix))

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        g = torch.einsum("kn,kntgo->ntgo", cotangent, self.g)
        return self._as_vector(torch.einsum("ntgo,ntgi->goi", g, self.a))

    def block(self) -> Tensor:
        """One product without the factor K for one position: `sum_n (g g^T)_n (x) (a a^T)_n`."""
        if self.a.shape[1:3] != (1, 1) or self.g.shape[0] == 1:
            return super().block()
        a, g = self.a[:, 0, 0], self.g[:, :, 0, 0]
        outer_g = torch.einsum("kno,knp->nop", g, g).flatten(1)
        outer_a = (a[:, :, None] * a[:, None]).flatten(1)
        outputs, inputs = g.shape[-1], a.shape[-1]
        four = (outer_g.T @ outer_a).unflatten(1, (inputs, inputs)).unflatten(0, (outputs, outputs))
        order = (2, 0, 3, 1) if self.transposed else (0, 2, 1, 3)
        return four.permute(order).reshape(outputs * inputs, outputs * inputs)

    def output_moment(self) -> Tensor:
        """KFAC's B in the expand setting, positions counted as examples."""
        return _second_moment(self.g.flatten(0, 2))

    def sole_cotangent(self) -> Tensor | None:
        """The cotangent, where there is one position and one group."""
        return self.g[:, :, 0, 0] if self.a.shape[1:3] == (1, 1) else None

    def input_moment(self) -> tuple[Tensor, int]:
        """KFAC's A, before it is divided by the number of examples and positions."""
        return _second_moment(self.a.flatten(0, 1)), self.a.shape[0] * self.a.shape[1]

    def rotate(self, left: Tensor, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`: each factor is rotated by itself, in a basis of its own kind."""
        output, incoming = (right, left) if self.transposed else (left, right)
        groups, inputs = self.a.shape[2:]
        if (len(left), incoming.shape[1]) != (groups, inputs):  # an exact block, where the fit found no factors
            return DenseJacobian(self.to_dense()).rotate(left, right)
        a = torch.einsum("ntgi,gij->ntgj", self.a, incoming)
        g = torch.einsum("kntgo,gop->kntgp", self.g, output)
        return OuterProduct(a, g, self.transposed, self.budget)

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A weight of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self


def _second_moment(rows: Tensor) -> Tensor:
    """`sum_r x_r x_r^T` for each group, `(R, G, D) -> (G, D, D)`."""
    if rows.shape[1] == 1:
        rows = rows[:, 0]
        return (rows.T @ rows)[None]
    rows = rows.transpose(0, 1)
    return rows.mT @ rows


def concatenated(parts: Sequence[OuterProduct]) -> OuterProduct:
    """Several uses of one weight as one, positions side by side: sums are taken before anything is squared."""
    first = parts[0]
    return OuterProduct(
        torch.cat([p.a for p in parts], dim=1),
        torch.cat([p.g for p in parts], dim=2),
        first.transposed,
        first.budget,
    )
