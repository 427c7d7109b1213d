"""Which structure: the form in which `sum_n J_n^T S_n S_n^T J_n` is kept.

Quantities add up over columns, batches and machines. Several ride one backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.block_diagonal import BlockDiagonal
from lapkit.curvature.dense import Dense
from lapkit.curvature.diagonal import Diagonal
from lapkit.curvature.jacobians import LayerJacobian
from lapkit.curvature.kronecker_product import KroneckerProduct
from lapkit.curvature.memory import default_budget
from lapkit.curvature.operator import SymmetricOperator
from lapkit.curvature.parameters import Parameters


class Quantity(ABC):
    """A sum over the data of something made of the layers' Jacobians.

    Args:
        parameters: the weights, whose order the result follows.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    @abstractmethod
    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """Take one parameter's Jacobian for a chunk of columns.

        Args:
            name: the parameter.
            jacobian: for some of the columns of one batch.
            first: whether it is the first chunk of columns of this batch.
        """

    @abstractmethod
    def result(self) -> SymmetricOperator:
        """The sum so far."""

    def end_columns(self) -> None:  # noqa: B027 (most quantities have nothing left to do)
        """Called after each chunk of columns, when every parameter's Jacobian has been seen."""


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add in place; the first value is copied, since two parameters may have been handed the same.

    Raises:
        ValueError: if the shape differs from that of earlier batches; it must not be broadcast.
    """
    if name in sums:
        if sums[name].shape != value.shape:
            raise ValueError(
                f"Parameter {name!r} is used in another way in this batch than before: its curvature has the form "
                f"{tuple(value.shape)} after {tuple(sums[name].shape)}. Use batches that take the same path through "
                "the model, or a structure without Kronecker factors."
            )
        sums[name] += value
    else:
        sums[name] = value.clone()


def _same_memory(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()


@final
class GGNDiagonal(Quantity):
    """`diag(H)`.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, table 5.1 (DiagGGN).
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        _add(self.sums, name, jacobian.square_sum())

    def result(self) -> Diagonal:
        """One value for each weight."""
        sizes = dict(zip(self.parameters.names, self.parameters.sizes, strict=True))
        like = next(iter(self.sums.values()))
        return Diagonal(torch.cat([self.sums.get(n, like.new_zeros(sizes[n])) for n in sizes]))


@final
class GGNBlocks(Quantity):
    """The exact diagonal block of each parameter."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        _add(self.sums, name, jacobian.block())

    def result(self) -> BlockDiagonal:
        """One dense block for each parameter."""
        sizes = dict(zip(self.parameters.names, self.parameters.sizes, strict=True))
        like = next(iter(self.sums.values()))
        return BlockDiagonal(tuple(Dense(self.sums.get(n, like.new_zeros(s, s)).clone()) for n, s in sizes.items()))


@final
class GGNDense(Quantity):
    """The full matrix, across layers.

    Raises:
        ValueError: if it would not fit into the memory that is free.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        needed = parameters.numel**2 * max(parameters.dtype.itemsize, 4)
        if needed > 4 * default_budget(parameters.device):
            raise ValueError(
                f"The full matrix over {parameters.numel} weights would take {needed / 2**30:.1f} GiB, more than is "
                "free. Choose hessian_structure='kron' or 'diag', or fewer weights (subset_of_weights='last_layer')."
            )
        self.total: Tensor | None = None
        self.rows: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.rows[name] = jacobian.to_dense()

    def end_columns(self) -> None:
        """Multiply what the layers have left."""
        like = next(iter(self.rows.values()))
        sizes = zip(self.parameters.names, self.parameters.sizes, strict=True)
        parts = [self.rows.get(n, like.new_zeros(*like.shape[:2], s)) for n, s in sizes]
        rows = torch.cat(parts, dim=-1).flatten(0, 1)
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.T, rows)
        self.rows = {}

    def result(self) -> Dense:
        """The matrix.

        Raises:
            ValueError: if nothing was seen.
        """
        if self.total is None:
            raise ValueError("No data has been seen.")
        return Dense(self.total.clone())


@final
class GGNKronecker(Quantity):
    """KFAC in the expand setting, `B (x) A` for each weight; exact blocks for biases and other small parameters.

    With sums over examples n and the T positions t that share a weight: `B = sum g g^T`, `A = (sum a a^T) / (N T)`.
    For convolutions this keeps the trace of the product near that of the exact block; without the division by T it
    would be tens to hundreds of times too large.

    Reference:
        Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, 2016; Eschenhagen
        et al., Kronecker-factored approximate curvature for modern neural network architectures, 2023 (expand).
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.transposed: dict[str, bool] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`; inputs are the same for all columns and count once."""
        _add(self.outputs, name, self._output_moment(jacobian))
        if first:
            moment, count = jacobian.input_moment()
            _add(self.inputs, name, moment)
            self.counts[name] = self.counts.get(name, 0) + count
            self.transposed[name] = jacobian.transposed

    def _output_moment(self, jacobian: LayerJacobian) -> Tensor:
        """Weight and bias of a layer are sent the same cotangent, one after the other: its moment is computed once."""
        cotangent = jacobian.sole_cotangent()
        if cotangent is None:
            return jacobian.output_moment()
        if self._last is None or not _same_memory(self._last[0], cotangent):
            self._last = cotangent, jacobian.output_moment()
        return self._last[1]

    def end_columns(self) -> None:
        """Let go of the cotangent."""
        self._last = None

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The two factors of one parameter's block, rows of the weight first: `(G, R, R)` and `(G, C, C)`."""
        b, a = self.outputs[name].clone(), self.inputs[name] / self.counts[name]
        return (a, b) if self.transposed[name] else (b, a)

    def result(self) -> BlockDiagonal:
        """One Kronecker block for each parameter."""
        return BlockDiagonal(
            tuple(self._block(n, s) for n, s in zip(self.parameters.names, self.parameters.sizes, strict=True))
        )

    def _block(self, name: str, size: int) -> SymmetricOperator:
        if name not in self.outputs:
            return Diagonal(next(iter(self.outputs.values())).new_zeros(size))
        return KroneckerProduct(*self.factors(name))
