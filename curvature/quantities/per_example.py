"""What is kept for each example: gradients and their norms, the GGN's diagonal and trace."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns, LossGradient
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import PerExample


class ExampleValues(PerExample):
    """Numbers for each example and weight: `value/NAME` of shape `(N, *shape)`."""

    main: ClassVar[str] = "value"

    def matrix(self) -> Tensor:
        """All weights side by side in flat order, `(N, P)`."""
        return torch.cat([t.reshape(self.count, -1) for t in self.part("value").values()], dim=1)


class ExampleNorms(PerExample):
    """Squared norms for each example and parameter: `square/NAME` of shape `(N,)`."""

    main: ClassVar[str] = "square"

    def squares(self) -> Tensor:
        """Squared norms over all weights, `(N,)`."""
        return torch.stack(list(self.part("square").values())).sum(0)

    def norms(self) -> Tensor:
        """Norms over all weights, `(N,)`."""
        return self.squares().sqrt()


class _Kept(Quantity):
    """A quantity that keeps a row of numbers for each example and parameter."""

    def __init__(self, parameters: Parameters, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        self.batches: list[tuple[int, dict[str, Tensor]]] = []

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        super().begin_batch(examples, weights)
        self.batches.append((examples, {}))

    @abstractmethod
    def rows(self, jacobian: LayerJacobian) -> Tensor:
        """What is kept, `(N, *)`; it adds up over chunks of columns."""

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        kept, rows = self.batches[-1][1], self.rows(jacobian)
        kept[name] = kept[name] + rows if name in kept else rows

    def joined(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The rows of all batches, `(N, *shape)`, zero where the outputs do not depend on the parameter."""
        like = summable(self.parameters.tensors[0].detach())
        pieces = [kept[name] if name in kept else like.new_zeros(n, *shape) for n, kept in self.batches]
        return torch.cat([piece.reshape(-1, *shape) for piece in pieces]) if pieces else like.new_zeros(0, *shape)


class _Values(_Kept):
    def result(self) -> ExampleValues:
        """See `Quantity.result`."""
        tensors = {f"value/{n}": self.joined(n, shape) for n, shape in self.shapes.items()}
        return ExampleValues(self.shapes, tensors, self.count, self.about)


class _Norms(_Kept):
    def rows(self, jacobian: LayerJacobian) -> Tensor:
        """See `_Kept.rows`."""
        return jacobian.square_norms().sum(0)

    def result(self) -> ExampleNorms:
        """See `Quantity.result`."""
        tensors = {f"square/{n}": self.joined(n, ()) for n in self.shapes}
        return ExampleNorms(self.shapes, tensors, self.count, self.about)


@final
class Gradients(_Values):
    """Each example's gradient `g_n`, without a factor 1/N.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, table 5.1 (individual gradients, there divided by N).
    """

    columns = LossGradient()

    def rows(self, jacobian: LayerJacobian) -> Tensor:
        """See `_Kept.rows`."""
        return jacobian.to_dense().sum(0)


@final
class GradientNorms(_Norms):
    """`|g_n|^2` of each example, for each parameter and in total, without expanding the gradients."""

    columns = LossGradient()


@final
class GGNDiagonals(_Values):
    """`diag(J_n^T S_n S_n^T J_n)` of each example; they sum to `GGNDiagonal`.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, section 5.2 (BatchDiagGGN, there divided by N).
    """

    def rows(self, jacobian: LayerJacobian) -> Tensor:
        """See `_Kept.rows`."""
        return jacobian.squares()


@final
class GGNTraces(_Norms):
    """`tr(J_n^T S_n S_n^T J_n)` of each example and parameter, without expanding the Jacobian."""
