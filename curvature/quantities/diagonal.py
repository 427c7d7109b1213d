"""The diagonal of the curvature."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import CurvatureSum


@final
class DiagonalSum(CurvatureSum):
    """`diag(H)`, one tensor `value/NAME` in the shape of each parameter."""

    main: ClassVar[str] = "value"

    def operator(self) -> Diagonal:
        """One value for each weight."""
        return Diagonal(torch.cat([t.flatten() for t in self.part("value").values()]))


@final
class GGNDiagonal(Quantity):
    """`diag(H)`; the result has one tensor in the shape of each parameter.

    Args:
        parameters: the weights.
        columns: which curvature H is, if not that of the call.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, table 5.1 (DiagGGN).
    """

    def __init__(self, parameters: Parameters, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        key = f"value/{name}"
        if key not in self.sums:
            like = summable(self.parameters.tensors[0].detach())
            self.sums[key] = like.new_zeros(jacobian.shape[2])
        jacobian.add_square_sum(self.sums[key])

    def result(self) -> DiagonalSum:
        """See `Quantity.result`."""
        like = summable(self.parameters.tensors[0].detach())
        values = {n: self.sums.get(f"value/{n}", like.new_zeros(shape)) for n, shape in self.shapes.items()}
        tensors = {f"value/{n}": v.clone().reshape(self.shapes[n]) for n, v in values.items()}
        return DiagonalSum(self.shapes, tensors, self.count, self.about)
