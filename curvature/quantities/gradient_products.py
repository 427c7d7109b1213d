"""Inner products of each example's gradient: with given vectors, with the mean, with one another."""

from __future__ import annotations

from itertools import accumulate, combinations_with_replacement
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import LossGradient
from lapkit.curvature.jacobians.conversion import mapped
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import PerExample


class ExampleDots(PerExample):
    """Inner products of each gradient with R vectors: `dot` of shape `(N, R)`."""


class MeanDots(PerExample):
    """Inner products of each gradient with the mean gradient: `dot` of shape `(N,)`."""

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Not possible.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Inner products with two different mean gradients do not merge. Sum the gradients first (GradientSum), "
            "then take GradientDots with that vector on each part of the data."
        )


class GramMatrix(PerExample):
    """Inner products of all gradients, `matrix` of shape `(N, N)`."""

    def matrix(self) -> Tensor:
        """`g_n . g_m`, `(N, N)`."""
        return self.tensors["matrix"]

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Not possible.

        Raises:
            TypeError: always.
        """
        raise TypeError("Gram matrices lack the products between their examples: compute one over all the data.")


class _Factored(Quantity):
    """Keeps the gradients of all batches in factored form: N (I + O) numbers for a linear layer instead of N I O."""

    columns = LossGradient()

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.batches: list[tuple[int, dict[str, LayerJacobian]]] = []

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        super().begin_batch(examples, weights)
        self.batches.append((examples, {}))

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.batches[-1][1][name] = copied(jacobian)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of the type in which sums are kept."""
        return summable(self.parameters.tensors[0].detach()).new_zeros(shape)


@final
class GradientDots(_Factored):
    """`g_n . v` of each example, for given vectors or the mean gradient over all the data.

    For the mean the factored gradients of all examples are kept until the end; for given vectors nothing is.

    Args:
        parameters: the weights.
        vectors: `(P, R)` or `(P,)` in flat order; None stands for the mean gradient.

    Raises:
        ValueError: if the vectors have another length than there are weights.
    """

    def __init__(self, parameters: Parameters, vectors: Tensor | None = None) -> None:
        super().__init__(parameters)
        self.vectors = None if vectors is None else vectors.detach().reshape(len(vectors), -1)
        if self.vectors is not None and len(self.vectors) != parameters.numel:
            raise ValueError(
                f"Vectors over {parameters.numel} weights have the shape ({parameters.numel},) or "
                f"({parameters.numel}, R), got {tuple(self.vectors.shape)}."
            )
        self.dots: list[Tensor] = []

    def _projected(self, vectors: Tensor, kept: dict[str, LayerJacobian], examples: int) -> Tensor:
        pieces = dict(zip(self.parameters.names, vectors.split(list(self.parameters.sizes)), strict=True))
        total = self.zeros(examples, vectors.shape[1])
        for name, jacobian in kept.items():
            total += jacobian.project(pieces[name].to(total))[0]
        return total

    def end_batch(self) -> None:
        """Project on given vectors, and forget."""
        if self.vectors is not None:
            examples, kept = self.batches.pop()
            self.dots.append(self._projected(self.vectors, kept, examples))

    def result(self) -> ExampleDots | MeanDots:
        """See `Quantity.result`."""
        if self.vectors is not None:
            dots = torch.cat(self.dots) if self.dots else self.zeros(0)
            return ExampleDots(self.shapes, {"dot": dots}, self.count, self.about)
        sums = dict.fromkeys(self.shapes, self.zeros())
        for examples, kept in self.batches:
            for name, jacobian in kept.items():
                sums[name] = sums[name] + jacobian.pull_back(self.zeros(1, examples) + 1)
        sizes = zip(self.parameters.names, self.parameters.sizes, strict=True)
        mean = torch.cat([sums[n].expand(size) for n, size in sizes])[:, None] / max(self.count, 1)
        each = [self._projected(mean, kept, examples)[:, 0] for examples, kept in self.batches]
        return MeanDots(self.shapes, {"dot": torch.cat(each) if each else self.zeros(0)}, self.count, self.about)


@final
class GradientGram(_Factored):
    """`g_n . g_m` of all pairs of examples, `(N, N)`: the uncentred covariance seen from the other side.

    Its non-zero eigenvalues, divided by N, are those of the uncentred covariance of the gradients.
    """

    def result(self) -> GramMatrix:
        """See `Quantity.result`."""
        matrix = self.zeros(self.count, self.count)
        ends = list(accumulate(examples for examples, _ in self.batches))
        places = [slice(end - examples, end) for end, (examples, _) in zip(ends, self.batches, strict=True)]
        kept = [(place, jacobians) for place, (_, jacobians) in zip(places, self.batches, strict=True)]
        for (rows, one), (columns, two) in combinations_with_replacement(kept, 2):
            for name in one.keys() & two.keys():
                matrix[rows, columns] += inner_products(one[name], two[name])
        return GramMatrix(self.shapes, {"matrix": matrix.triu() + matrix.triu(1).T}, self.count, self.about)


def copied(value: LayerJacobian) -> LayerJacobian:
    """A Jacobian with memory of its own: data loaders may fill the same tensors with the next batch."""
    return mapped(value, Tensor.clone)


def inner_products(one: LayerJacobian, two: LayerJacobian, budget: int = 2**28) -> Tensor:
    """`J_n . J_m` of the first columns of two batches, `(N, M)`; a product of two small ones for one position.

    Args:
        one: of N examples.
        two: of M examples, for the same parameter.
        budget: bytes that an expanded Jacobian may take; of one example at a time if need be.

    Returns:
        All pairs.
    """
    if isinstance(one, OuterProduct) and isinstance(two, OuterProduct) and one.a.shape[1] == two.a.shape[1] == 1:
        a = torch.einsum("ngi,mgi->gnm", one.a[:][:, 0], two.a[:][:, 0])
        return (a * torch.einsum("ngo,mgo->gnm", one.g[0, :, 0], two.g[0, :, 0])).sum(0)
    _, examples, size = one.shape
    step = chunk_length(examples, 8 * size, budget)
    if 8 * size * two.shape[1] <= budget:
        two = DenseJacobian(two.to_dense())
    parts = (one.select(slice(start, start + step)) for start in range(0, examples, step))
    return torch.cat([two.project(part.to_dense()[0].T)[0].T for part in parts])
