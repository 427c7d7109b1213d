"""The factored Jacobian of a weight, `J[k,n] = sum_t g[k,n,t] (x) a[n,t]`, expanded only where no contraction does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians.inner_products import WRITTEN, over_pairs
from lapkit.curvature.jacobians.jacobian import DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.jacobians.moments import add_moments, mirrored, second_moment
from lapkit.curvature.jacobians.patches import Patches
from lapkit.curvature.memory import chunk_length

# On a CPU an intermediate that is read again at once is best kept within the cache; measured, two to four times faster.
CACHE = 2**21
FEW = 16  # vectors; for more of them it is read again so often that small pieces cost more than they save


@dataclass(frozen=True, eq=False)
class OuterProduct(LayerJacobian):
    """A weight that multiplies: linear maps and convolutions, over T shared positions and G groups.

    Two routes lead to most results when T > 1: through the expanded Jacobian of a chunk of examples, or through
    products of pairs of positions, which leave the columns for last. The cheaper one is taken, by counted
    multiplications.

    Args:
        a: what went in, `(N, T, G, I)`, or something that cuts it out for a few examples at a time.
        g: what came back, `(K, N, T, G, O)`.
        transposed: whether the weight is stored as inputs x outputs instead of outputs x inputs.
        budget: bytes that an intermediate may take.
        rows: how many of the N T rows are more than padding; all by default.
    """

    a: Tensor | Patches
    g: Tensor
    transposed: bool = False
    budget: int = 2**28
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        groups, inputs = self.a.shape[2:]
        return self.g.shape[0], self.g.shape[1], groups * self.g.shape[-1] * inputs

    def as_vector(self, matrix: Tensor) -> Tensor:
        """Matrices in the flat order of the weight.

        Args:
            matrix: `(*, G, O, I)`.

        Returns:
            `(*, P)`.
        """
        return (matrix.mT if self.transposed else matrix).flatten(-3)

    def _as_matrix(self, vector: Tensor) -> Tensor:
        """`(P, *)` as `(G, O, I, *)`."""
        groups, inputs, outputs = *self.a.shape[2:], self.g.shape[-1]
        if self.transposed:
            return vector.unflatten(0, (groups, inputs, outputs)).transpose(1, 2)
        return vector.unflatten(0, (groups, outputs, inputs))

    @property
    def input_count(self) -> int:
        """How many rows went in: examples times positions, without padding."""
        return self.a.shape[0] * self.a.shape[1] if self.rows is None else self.rows

    @property
    def _whole(self) -> Tensor:
        """What went in, all of it."""
        return self.a if isinstance(self.a, Tensor) else self.a[:]

    def parts(self, numbers: int, *, cached: bool = True, most: int | None = None) -> Iterator[slice]:
        """Slices of examples, of which an intermediate stays inside the budget.

        Args:
            numbers: how many the intermediate has for each example.
            cached: on a CPU, keep it within the processor's cache as well.
            most: examples in a slice.

        Yields:
            Consecutive slices, at least one example each.
        """
        examples = self.a.shape[0]
        limit = min(self.budget, CACHE) if cached and self.g.device.type == "cpu" else self.budget
        step = min(chunk_length(examples, numbers * self.g.element_size(), limit), most or examples)
        yield from (slice(start, min(start + step, examples)) for start in range(0, examples, step))

    def _expanded(self, extra: int = 1, beside: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples of the expanded Jacobian, `(n, G, K, O, I)`, each `extra` times inside the budget.

        Beside so many vectors it may take as much memory as they do, and is best not in small pieces.
        """
        columns, _, size = self.shape
        most = max(beside // columns, 1) if beside else None
        for part in self.parts(extra * columns * size, cached=not beside, most=most):
            a = self.a[part].permute(0, 2, 1, 3)  # (n, G, T, I)
            yield part, (self._rows_of(part) @ a).unflatten(2, (columns, -1))

    def _rows_of(self, part: slice) -> Tensor:
        """Cotangents of some examples as `(n, G, K O, T)`; what are neighbours in memory stays so, copied faster."""
        g = self.g[:, part]
        if g.stride(-1) == 1:
            return g.permute(1, 3, 2, 0, 4).flatten(3, 4).mT
        return g.permute(1, 3, 0, 4, 2).flatten(2, 3)

    def _pairs(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of examples of the products of inputs at pairs of positions, `(n, G, T, T, I)`."""
        _, positions, groups, inputs = self.a.shape
        for part in self.parts(positions**2 * groups * inputs):
            a = self.a[part].transpose(1, 2)  # (n, G, T, I)
            yield part, a[:, :, :, None] * a[:, :, None]

    def _pairs_are_cheaper(self, per_pair: float, per_column: float) -> bool:
        """Whether `T^2 per_pair` beats the expansion's `T K O I` and what follows it for each column."""
        positions, inputs = self.a.shape[1], self.a.shape[3]
        columns, outputs = self.g.shape[0], self.g.shape[-1]
        return positions**2 * per_pair < columns * outputs * inputs * (positions + per_column)

    def to_dense(self) -> Tensor:
        """See `Jacobian.to_dense`."""
        expanded = torch.einsum("kntgo,ntgi->kngoi", self.g, self._whole)
        return self.as_vector(expanded)

    def square_sum(self) -> Tensor:
        """`(sum_k g^2)^T a^2` for one position: the columns never enter the matrix product."""
        if self.a.shape[1] == 1:
            total = self.g.new_zeros(self.shape[2])
            self.add_square_sum(total)
            return total
        inputs, columns, outputs = self.a.shape[3], self.g.shape[0], self.g.shape[-1]
        total = self.g.new_zeros(self.a.shape[2], outputs, inputs)
        if self._pairs_are_cheaper(outputs * (columns + inputs), 1):
            for part, pairs in self._pairs():
                g = self.g[:, part]
                products = torch.einsum("knsgo,kntgo->gonst", g, g)
                total += products.flatten(2) @ pairs.permute(1, 0, 2, 3, 4).flatten(1, 3)
        else:
            for _, expanded in self._expanded():
                total += expanded.square_().sum((0, 2))
        return self.as_vector(total)

    def add_square_sum(self, total: Tensor) -> None:
        """See `LayerJacobian.add_square_sum`; for one position the product is added as it is made."""
        if self.a.shape[1] != 1:
            super().add_square_sum(total)
            return
        g, a = self.g[:, :, 0].square().sum(0), self._whole[:, 0].square()
        rows, columns = (a, g) if self.transposed else (g, a)
        matrices = total.view(rows.shape[1], rows.shape[2], columns.shape[2])
        matrices.baddbmm_(rows.permute(1, 2, 0), columns.transpose(0, 1))

    def squares(self) -> Tensor:
        """`(sum_k g^2) (x) a^2` for one position; else from the expanded Jacobian, a few examples at a time."""
        if self.a.shape[1] == 1:
            g, a = self.g[:, :, 0].square().sum(0), self._whole[:, 0].square()
            return self.as_vector(torch.einsum("ngo,ngi->ngoi", g, a))
        return torch.cat([self.as_vector(expanded.square_().sum(2)) for _, expanded in self._expanded()])

    def square_norms(self) -> Tensor:
        """`|g|^2 |a|^2` for one position; else products of pairs of positions, or the expanded Jacobian."""
        columns, examples, _ = self.shape
        positions, groups, inputs = self.a.shape[1:]
        if positions == 1:
            return (self.g[:, :, 0].square().sum(-1) * self._whole[:, 0].square().sum(-1)).sum(-1)
        out = self.g.new_empty(columns, examples)
        outputs = self.g.shape[-1]
        if positions * (inputs + columns * outputs) < columns * outputs * inputs:
            for part in self.parts((1 + columns) * groups * positions**2):
                a, g = self.a[part].transpose(1, 2), self.g[:, part].transpose(2, 3)  # (n, G, T, I), (K, n, G, T, O)
                out[:, part] = ((g @ g.mT) * (a @ a.mT)).sum((2, 3, 4)).clamp_min(0)
            return out
        for part, expanded in self._expanded():
            out[:, part] = expanded.square_().sum((1, 3, 4)).T
        return out

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """`sum_o g_k g_l (sum_i w_oi a_i^2)` for one position: O(N I O + N K^2 O) instead of O(N K^2 I O)."""
        w = self._as_matrix(weights)
        if self.a.shape[1] == 1:
            scale = torch.einsum("ngi,goi->ngo", self._whole[:, 0].square(), w).flatten(1)
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

    def _gram(self, other: Jacobian | None) -> Tensor:
        """The Hadamard product of two small Gram matrices for one position and one group.

        With more, the sum of such products over pairs of positions, or the expanded Jacobian, some outputs at a time.

        Reference:
            Dangel et al., ViViT, 2022, appendix C.1.
        """
        second = self if other is None else other
        if not isinstance(second, OuterProduct) or self._form != second._form:
            return super()._gram(other)
        same = other is None
        if self.a.shape[1] == second.a.shape[1] == self.a.shape[2] == 1:
            (a, g), (b, h) = ((j._whole[:, 0, 0], j.g[:, :, 0, 0]) for j in (self, second))
            return torch.einsum("kno,lmo->knlm", g, h).mul_((a @ b.T)[None, :, None, :])
        (columns, examples, _), (others, paired, _) = self.shape, second.shape
        (positions, _, inputs), outputs = self.a.shape[1:], self.g.shape[-1]
        rows, products = columns * examples * positions, columns * examples * others * paired
        expanded = rows if same else rows + others * paired * second.a.shape[1]
        by_pairs = positions * second.a.shape[1] * (products * (outputs + WRITTEN) + examples * paired * inputs)
        by_rows = outputs * inputs * (expanded + products)
        chosen = None if same else second
        return self._gram_of_pairs(chosen) if by_pairs < by_rows else self._gram_of_rows(chosen)

    @property
    def _form(self) -> tuple[object, ...]:
        """What two Jacobians have in common that see a weight as the same matrices."""
        return (*self.a.shape[2:], *self.g.shape[3:], self.transposed)

    def _gram_of_pairs(self, other: OuterProduct | None = None) -> Tensor:
        """`sum_{s,t} (g_s . g_t) (a_s . a_t)`, for some examples with some others at a time."""
        second = self if other is None else other

        def inner(one: slice, two: slice) -> Tensor:
            a, b = (j.a[part].permute(2, 0, 1, 3) for j, part in ((self, one), (second, two)))  # (G, n, T, I)
            return (a.flatten(1, 2) @ b.flatten(1, 2).mT).unflatten(2, b.shape[1:3]).unflatten(1, a.shape[1:3])

        return over_pairs(self.g, None if other is None else other.g, inner, self.budget)

    def _gram_of_rows(self, other: OuterProduct | None = None) -> Tensor:
        """From the expanded Jacobians, of which some outputs at a time are made."""
        second = self if other is None else other
        held = self.shape[0] * self.shape[1] + (0 if other is None else second.shape[0] * second.shape[1])
        out = self.g.new_zeros(self.shape[0] * self.shape[1], second.shape[0] * second.shape[1])
        groups, inputs = self.a.shape[2:]
        step = chunk_length(self.g.shape[-1], 2 * held * groups * inputs * self.g.element_size(), self.budget)
        for start in range(0, self.g.shape[-1], step):
            rows = self._rows_of_outputs(slice(start, start + step))
            out += rows @ (rows if other is None else other._rows_of_outputs(slice(start, start + step))).T
        return out.unflatten(1, second.shape[:2]).unflatten(0, self.shape[:2])

    def _rows_of_outputs(self, outputs: slice) -> Tensor:
        """The expanded Jacobian in the weights of some outputs, `(K N, G o I)`."""
        g = self.g[..., outputs]
        parts = self.parts(self.a.shape[1:].numel() + len(g) * g.shape[3:].numel() * self.a.shape[3], cached=False)
        pieces = [torch.einsum("kntgo,ntgi->kngoi", g[:, part], self.a[part]) for part in parts]
        return torch.cat(pieces, dim=1).flatten(2).flatten(0, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        matrix = self._as_matrix(vectors)  # (G, O, I, R)
        if self.a.shape[1] == 1 and self._factors_are_cheaper(vectors.shape[1]):
            return self._project_position(matrix)
        out = self.g.new_empty(*self.shape[:2], vectors.shape[1])
        if not self._factors_are_cheaper(vectors.shape[1]):
            for part, expanded in self._expanded(beside=vectors.shape[1]):
                out[:, part] = torch.einsum("ngkoi,goir->knr", expanded, matrix)
            return out
        numbers = self.a.shape[1] * matrix[:, :, 0].numel()
        for part in self.parts(numbers, cached=vectors.shape[1] < FEW):
            mapped = torch.einsum("ntgi,goir->ntgor", self.a[part], matrix)
            out[:, part] = torch.einsum("kntgo,ntgor->knr", self.g[:, part], mapped)
        return out

    def _project_position(self, matrix: Tensor) -> Tensor:
        """For one position: the vectors `(G, O, I, R)` are multiplied as they stand, in whatever order."""
        a, g = self._whole[:, 0].transpose(0, 1), self.g[:, :, 0].flatten(2).transpose(0, 1)  # (G, N, I), (N, K, G O)
        found = []
        for part in self.parts(matrix[:, :, 0].numel(), cached=matrix.shape[3] < FEW):
            mapped = (a[:, None, part] @ matrix).flatten(0, 1)  # (G O, n, R)
            found.append(g[part] @ mapped.transpose(0, 1))
        return (torch.cat(found) if len(found) > 1 else found[0]).transpose(0, 1)

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        g = torch.einsum("kn,kntgo->ntgo", cotangent, self.g)
        total = self.g.new_zeros(g.shape[2], g.shape[3], self.a.shape[3])
        for part in self.parts(self.a.shape[1:].numel(), cached=False):
            total += torch.einsum("ntgo,ntgi->goi", g[part], self.a[part])
        return self.as_vector(total)

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        total = self.g.new_zeros(cotangents.shape[2], self.a.shape[2], self.g.shape[-1], self.a.shape[3])
        if self._factors_are_cheaper(len(total)):
            for part in self.parts(self.a.shape[1] * total[:, :, :, 0].numel(), cached=False):
                g = torch.einsum("knr,kntgo->rntgo", cotangents[:, part], self.g[:, part])
                total += torch.einsum("rntgo,ntgi->rgoi", g, self.a[part])
        else:
            for part, expanded in self._expanded(beside=len(total)):
                total += torch.einsum("knr,ngkoi->rgoi", cotangents[:, part], expanded)
        return self.as_vector(total).T

    def _factors_are_cheaper(self, vectors: int) -> bool:
        """Whether R products with the factors, `R T (K + I)`, beat the expansion `K T I` and `R K I` after it."""
        columns, positions, inputs = self.g.shape[0], self.a.shape[1], self.a.shape[3]
        return positions * vectors * (columns + inputs) <= columns * inputs * (positions + vectors)

    def block(self) -> Tensor:
        """One product without the factor K for one position: `sum_n (g g^T)_n (x) (a a^T)_n`."""
        if self.a.shape[1:3] != (1, 1) or self.g.shape[0] == 1:
            return super().block()
        a, g = self._whole[:, 0, 0], self.g[:, :, 0, 0]
        outer_g = torch.einsum("kno,knp->nop", g, g).flatten(1)
        outer_a = (a[:, :, None] * a[:, None]).flatten(1)
        outputs, inputs = g.shape[-1], a.shape[-1]
        four = (outer_g.T @ outer_a).unflatten(1, (inputs, inputs)).unflatten(0, (outputs, outputs))
        order = (2, 0, 3, 1) if self.transposed else (0, 2, 1, 3)
        return four.permute(order).reshape(outputs * inputs, outputs * inputs)

    def output_moment(self) -> Tensor:
        """KFAC's B in the expand setting, positions counted as examples."""
        positions, groups, outputs = self.g.shape[2:]
        if self.g.stride(2) != 1 or positions == 1:
            return second_moment(self.g.flatten(0, 2))
        total = self.g.new_zeros(groups, outputs, outputs)
        for part in self.parts(positions * groups * outputs):
            for g in self.g[:, part]:
                add_moments(total, g)
        return mirrored(total)

    def single_position(self) -> tuple[Tensor, Tensor] | None:
        """Both factors, where there is one position and one group."""
        return (self.g[:, :, 0, 0], self._whole[:, 0, 0]) if self.a.shape[1:3] == (1, 1) else None

    def sole_cotangent(self) -> Tensor | None:
        """The cotangent, where there is one position and one group."""
        return self.g[:, :, 0, 0] if self.a.shape[1:3] == (1, 1) else None

    def sole_input(self) -> Tensor | None:
        """What went in, where there is one position and one group, and no padding."""
        return self._whole[:, 0, 0] if self.a.shape[1:3] == (1, 1) and self.rows is None else None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float]:
        """KFAC's A, before it is divided by the number of examples and positions.

        Raises:
            ValueError: if weighted examples have positions that are only padding.
        """
        examples, positions, groups, inputs = self.a.shape
        if weights is not None:
            self._check_unpadded("of weighted examples")
        total = self.g.new_zeros(groups, inputs, inputs)
        patches = self.a if isinstance(self.a, Patches) else None
        for part in self.parts(positions * groups * inputs, cached=patches is not None):
            a = self.a[part] if patches is None else patches.rows(part)
            add_moments(total, a if weights is None else a * weights[part, None, None, None].to(a).sqrt())
        total = mirrored(total) if patches is None else patches.in_order(mirrored(total))
        count = float(examples if weights is None else weights.sum())
        return total, positions * count if self.rows is None else self.rows

    def reduced(self) -> OuterProduct:
        """See `LayerJacobian.reduced`; several uses of one weight count as positions of one.

        Raises:
            ValueError: if some positions are only padding.
        """
        self._check_unpadded("in the reduce setting")
        means = [self.a[part].mean(1, keepdim=True) for part in self.parts(self.a.shape[1:].numel(), cached=False)]
        return OuterProduct(torch.cat(means), self.g.sum(2, keepdim=True), self.transposed, self.budget)

    def _check_unpadded(self, what: str) -> None:
        """Refuse examples of different numbers of positions.

        Raises:
            ValueError: if some positions are only padding.
        """
        if self.rows is not None:
            raise ValueError(
                f"The data route examples to this weight differently often: Kronecker factors {what} are not defined. "
                "Use the expand setting without weights, or another structure."
            )

    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """See `LayerJacobian.rotate`: each factor is rotated by itself, or their product where that is less work."""
        output, incoming = (right, left) if self.transposed else (left, right)
        positions, groups, inputs = self.a.shape[1:]
        columns, outputs = self.g.shape[0], self.g.shape[-1]
        exact = left is not None and incoming is not None and (len(left), incoming.shape[1]) != (groups, inputs)
        # Both at once: the first is for an exact block, where the fit found no factors.
        if exact or positions * (inputs**2 + columns * outputs**2) > columns * outputs * inputs * (outputs + inputs):
            return DenseJacobian(self.to_dense()).rotate(left, right)
        a = self._whole if incoming is None else torch.einsum("ntgi,gij->ntgj", self._whole, incoming)
        g = self.g if output is None else torch.einsum("kntgo,gop->kntgp", self.g, output)
        return OuterProduct(a, g, self.transposed, self.budget, self.rows)

    def select(self, part: slice) -> OuterProduct:
        """See `LayerJacobian.select`."""
        return OuterProduct(self.a[part], self.g[:, part], self.transposed, self.budget)

    def at(self, places: Tensor) -> DenseJacobian:
        """See `LayerJacobian.at`: products of the entries that meet in these weights, where that is less to write."""
        positions, groups, inputs = self.a.shape[1:]
        if positions * len(places) > self.shape[2]:
            return super().at(places)
        rows = inputs if not self.transposed else self.g.shape[-1]  # numbers in a row of the stored matrix
        group, row, column = places // (self.shape[2] // groups), places // rows, places % rows
        row = row % (self.shape[2] // groups // rows)
        output, incoming = (column, row) if self.transposed else (row, column)
        found = []
        for part in self.parts((self.g.shape[0] + 2) * positions * len(places)):
            products = self.g[:, part][..., group, output] * self.a[part][..., group, incoming]  # (K, n, T, S)
            found.append(products.sum(2))
        return DenseJacobian(torch.cat(found, dim=1))

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """Itself: one parameter is not cut.

        Raises:
            ValueError: if another size is asked for.
        """
        if list(sizes) != [self.shape[2]]:
            raise ValueError(f"A weight of {self.shape[2]} entries cannot be cut into {list(sizes)}.")
        yield self


def concatenated(parts: Sequence[OuterProduct]) -> OuterProduct:
    """Several uses of one weight as one, positions side by side: sums are taken before anything is squared."""
    first = parts[0]
    return OuterProduct(
        torch.cat([p._whole for p in parts], dim=1),
        torch.cat([p.g for p in parts], dim=2),
        first.transposed,
        first.budget,
        None if all(p.rows is None for p in parts) else sum(p.input_count for p in parts),
    )
