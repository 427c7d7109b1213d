"""The data as a Gaussian process sees them: whitened observations, one for each column of the likelihood's Hessian."""

from __future__ import annotations

from typing import NoReturn, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import GGN
from lapkit.curvature.jacobians.conversion import mapped, tensors
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.memory import default_budget
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.posteriors.function_space.rows import TangentRows


@final
class WhitenedObservations(Quantity):
    """The rows `S_n^T J_n` of all examples, with the columns S of the likelihood's Hessian in the outputs.

    A second-order likelihood of outputs f around f* with the Hessian `S S^T` is that of observations `S^T (f - f*)`,
    all of them zero, with independent noise of unit variance. So the softmax, whose Hessian has no inverse and is not
    diagonal, needs neither an inverse nor an approximation: R = N (C - 1) observations say it exactly.

    Jacobians are kept factored, in memory of their own. As soon as there are more rows than weights, they are turned
    into as many rows as weights with the same `sum_n J_n^T S_n S_n^T J_n`.

    Args:
        parameters: the weights.
        memory_limit: bytes that rows and their Gram matrix may take, by default half of what is free.

    Raises:
        ValueError: if the limit is not positive.

    Reference:
        Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 3.5 (where the Hessian's inverse
        is taken); Immer, Korzepa, Bauer, 2021, section 3.2.
    """

    def __init__(self, parameters: Parameters, *, memory_limit: int | None = None) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"A memory limit is at least 1 byte, got {memory_limit}.")
        super().__init__(parameters, columns=GGN())
        self.memory_limit = memory_limit or 2 * default_budget(parameters.device)
        self.pieces: list[NetworkJacobian] = []
        self._parts: dict[str, LayerJacobian] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        # Copied: what went into the first layer is the caller's own batch.
        self._parts[name] = mapped(
            jacobian, lambda t: t.to(torch.float64 if t.is_floating_point() else t.dtype, copy=True)
        )

    def end_columns(self) -> None:
        """Put the parameters side by side."""
        if not self._parts:
            return
        columns, examples, _ = next(iter(self._parts.values())).shape
        like = self.parameters.tensors[0]
        for name, size in zip(self.parameters.names, self.parameters.sizes, strict=True):
            if name not in self._parts:  # autograd knows its derivative to be zero
                self._parts[name] = DenseJacobian(like.new_zeros(columns, examples, size, dtype=torch.float64))
        self.pieces.append(NetworkJacobian(tuple(self._parts[name] for name in self.parameters.names)))
        self._parts = {}

    def end_batch(self) -> None:
        """No more rows than weights, and no more than fit.

        Raises:
            ValueError: if they do not.
        """
        if self.rows_so_far > 2 * self.parameters.numel:
            self.pieces = [self._fewest()]
        gram = 8 * self.rows_so_far**2
        needed = gram + sum(t.nbytes for piece in self.pieces for t in tensors(piece))
        if needed > self.memory_limit:
            raise ValueError(
                f"The function-space view of {self.count} examples is a matrix of {self.rows_so_far} x "
                f"{self.rows_so_far} numbers ({gram / 2**30:.3g} GiB), with factored Jacobians {needed / 2**30:.3g} "
                f"GiB, beyond the limit of {self.memory_limit / 2**30:.3g} GiB. Take a subset_of_data or fewer "
                "weights, give a larger memory_limit, or use a weight-space posterior."
            )

    @property
    def rows_so_far(self) -> int:
        """How many are kept."""
        return sum(piece.shape[0] * piece.shape[1] for piece in self.pieces)

    def rows(self) -> TangentRows:
        """What has been seen, in rows of double precision.

        Raises:
            ValueError: if that is nothing.
        """
        if not self.pieces:
            raise ValueError("No data has been seen: there are no observations.")
        pieces = [self._fewest()] if self.rows_so_far > self.parameters.numel else self.pieces
        return TangentRows(tuple(pieces))

    def result(self) -> NoReturn:
        """Not one of the results that are stored and merged.

        Raises:
            TypeError: always.
        """
        raise TypeError("Whitened observations are factored Jacobians, which have no result: take rows().")

    def _fewest(self) -> NetworkJacobian:
        """As many rows as weights, `R^T R = V^T V` with a triangular R."""
        rows: Tensor = torch.linalg.qr(TangentRows(tuple(self.pieces)).to_dense(), mode="r").R
        parts = rows[None].split(self.parameters.sizes, dim=-1)
        return NetworkJacobian(tuple(DenseJacobian(part) for part in parts))
