"""Dense matrices: the block of each parameter, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, final

from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.memory import available
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.cross import OwnBlocks, add_blocks, mirrored
from lapkit.curvature.quantities.quantity import Quantity, add_to
from lapkit.curvature.quantities.results import CurvatureSum


@final
class BlockSum(CurvatureSum):
    """The diagonal blocks of H, one matrix `block/NAME` for each parameter."""

    main: ClassVar[str] = "block"

    def operator(self) -> BlockDiagonal:
        """One dense block for each parameter, which shares the tensors of this sum."""
        return BlockDiagonal(tuple(Dense(block) for block in self.part("block").values()))


@final
class GGNBlocks(Quantity):
    """The exact diagonal block of each parameter; the result has one matrix for each.

    Args:
        parameters: the weights.
        columns: which curvature H is, if not that of the call.

    Raises:
        ValueError: if they would not fit into the memory that is free.
    """

    def __init__(self, parameters: Parameters, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        check_matrices_fit(parameters, parameters.sizes, "The blocks")
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        add_to(self.sums, f"block/{name}", jacobian.block())

    def result(self) -> BlockSum:
        """See `Quantity.result`."""
        like = summable(self.parameters.tensors[0].detach())
        sizes = zip(self.parameters.names, self.parameters.sizes, strict=True)
        blocks = {f"block/{n}": self.sums.get(f"block/{n}", like.new_zeros(size, size)) for n, size in sizes}
        return BlockSum(self.shapes, {k: b.clone() for k, b in blocks.items()}, self.count, self.about)


@final
class DenseSum(CurvatureSum):
    """H itself, one tensor `matrix`."""

    def operator(self) -> Dense:
        """The matrix, which shares the tensor of this sum."""
        return Dense(self.tensors["matrix"])


@final
class GGNDense(Quantity):
    """The full matrix, across layers.

    Args:
        parameters: the weights.
        columns: which curvature H is, if not that of the call.

    Raises:
        ValueError: if it would not fit into the memory that is free.
    """

    def __init__(self, parameters: Parameters, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        check_matrices_fit(parameters, [parameters.numel], "The full matrix")
        self.total: Tensor | None = None
        self.own: OwnBlocks = {}
        self.jacobians: dict[str, LayerJacobian] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.jacobians[name] = jacobian

    def end_columns(self) -> None:
        """Multiply what the layers have left."""
        size, like = self.parameters.numel, summable(self.parameters.tensors[0].detach())
        if self.total is None:
            self.total = like.new_zeros(size, size)
        starts = accumulate((0, *self.parameters.sizes))
        places = zip(self.parameters.names, starts, strict=False)
        add_blocks(self.total, [(start, self.jacobians[n]) for n, start in places if n in self.jacobians], self.own)
        self.jacobians = {}

    def result(self) -> DenseSum:
        """See `Quantity.result`."""
        size, like = self.parameters.numel, summable(self.parameters.tensors[0].detach())
        if self.total is None:
            return DenseSum(self.shapes, {"matrix": like.new_zeros(size, size)}, self.count, self.about)
        total = mirrored(self.total, self.parameters.sizes, self.own)
        return DenseSum(self.shapes, {"matrix": total}, self.count, self.about)


def check_matrices_fit(parameters: Parameters, sizes: Sequence[int], what: str) -> None:
    """Refuse dense matrices over weights that are too many.

    Args:
        parameters: the weights.
        sizes: how many of them each matrix is over.
        what: the matrices are, for the message.

    Raises:
        ValueError: if they and their factors would not fit into the memory that is free.
    """
    needed = sum(size**2 for size in sizes) * max(parameters.dtype.itemsize, 4)
    free = available(parameters.device)
    if 3 * needed > free:  # precision and factor, or a copy in float64
        raise ValueError(
            f"{what} over {parameters.numel} weights would take {needed / 2**30:.1f} GiB, and twice as much to be "
            f"factored: more than the {free / 2**30:.1f} GiB that are free. Choose a smaller structure "
            "(GGNKronecker or GGNDiagonal; hessian_structure='kron' or 'diag' of Laplace), or fewer weights "
            "(parameters=[...]; subset_of_weights='last_layer' of Laplace)."
        )
