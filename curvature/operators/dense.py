"""A dense symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.operators.graded import (
    UNBEARABLE,
    graded_eigenvalues,
    log_det_one_plus,
    log_det_one_plus_over,
    pivoted_cholesky,
    rounding,
    without_rounding,
)
from lapkit.curvature.operators.log_det import logdet_from_one
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.operators.triangular import inverse_of_lower

NEAR = 2**23  # bytes of an expanded Jacobian that is made and read at once
MANY = 500  # columns; of more, small eigenvalues beside large ones are not worth the time of Jacobi's method
GRADED = 1e10  # a quotient of curvatures of weights beyond which they are
FEW = 4  # rows of a Jacobian for which a matrix of as many times more rows is not inverted


@final
@dataclass(frozen=True, eq=False)
class Dense(SymmetricOperator):
    """A matrix `(P, P)`; the inverse root is that of its Cholesky factor, `R = L^{-1}`.

    Args:
        matrix: symmetric, `(P, P)`.
        source: the operator that this one was converted from, with which it shares the eigenvalues.
        memo: the first log determinant asked for, by the number that was added to the diagonal.

    Example:
        >>> import torch
        >>> float(Dense(torch.ones(2, 2)).shift(1.0).logdet())
        1.0986
    """

    matrix: Tensor
    source: Dense | None = field(default=None, repr=False)
    memo: dict[float, float] = field(default_factory=dict, repr=False, init=False)

    @property
    def size(self) -> int:
        """The number of weights P."""
        return len(self.matrix)

    @property
    def _entries(self) -> Tensor:
        return self.matrix

    @cached_property
    def cholesky(self) -> Tensor:
        """The lower Cholesky factor.

        Raises:
            ValueError: if the matrix is not positive definite in its precision.
        """
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        if failed.any():
            raise ValueError(
                "The precision matrix is not positive definite: its smallest eigenvalue is lost in round-off. "
                "Use a larger prior precision, or a model in float64."
            )
        return factor

    @cached_property
    def inverse_cholesky(self) -> Tensor:
        """`R = L^{-1}`, lower triangular, without derivatives."""
        return inverse_of_lower(self.cholesky)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The spectrum, ascending; computed once, whatever the number of shifts tried."""
        return self.spectrum.to(self.matrix)

    @cached_property
    def spectrum(self) -> Tensor:
        """The eigenvalues in float64, which operators of another type or device share, without round-off."""
        if self.source is not None:
            return self.source.spectrum.to(self.device)
        with torch.inference_mode(False):  # as all that is kept: gradients may be asked for later
            core = torch.from_numpy(self._core())
            rank = int(core.diagonal().count_nonzero())
            sizes = self.matrix.diagonal()[self.matrix.diagonal() > 0]
            if 0 < rank <= MANY and sizes.max() > GRADED * sizes.min():
                values = graded_eigenvalues(pivoted_cholesky(self.matrix, self._rounding)).to(self.device)
            else:
                values = torch.linalg.eigvalsh(core[:rank, :rank].to(self.device)).clamp_min(0)
            return torch.cat([values.new_zeros(self.size - rank), values])

    def _core(self) -> np.ndarray:
        """A matrix for the caller to overwrite, with those eigenvalues that are more than round-off."""
        return without_rounding(self.matrix, self._rounding)

    @property
    def _rounding(self) -> float:
        """Of the type that the matrix was made in, relative to the diagonal."""
        return rounding(self.size, torch.finfo((self.source or self).dtype).eps)

    def diagonal(self) -> Tensor:
        """See `SymmetricOperator.diagonal`."""
        return self.matrix.diagonal()

    def inverse_diagonal(self) -> Tensor:
        """See `SymmetricOperator.inverse_diagonal`."""
        return torch.cholesky_inverse(self.cholesky).diagonal()

    def logdet(self) -> Tensor:
        """Twice the sum of the logarithms of the Cholesky factor's diagonal."""
        return 2 * self.cholesky.diagonal().log().sum()

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        """O(P) for a single number, once the eigenvalues are known."""
        if delta.ndim == 0:
            return (self.eigenvalues + delta).log().sum()
        return self._shift(delta).logdet()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        """`log det(I + D^{-1/2} A D^{-1/2})`, whose eigenvalues are at least one however far the shifts are apart."""
        delta = delta.double()  # in float64 the quotient of a large entry and a tiny shift is finite, and its gradient
        if self.matrix.requires_grad:
            ratio = _scaled_ratio(self.matrix.double(), delta.expand(self.size))
        elif delta.ndim:
            ratio = self._ratio_of_several(delta)
        elif not self._loses(delta):
            ratio = self._ratio_of_one(delta)
        elif delta.reciprocal().isfinite():
            ratio = self._ratio_of_several(delta.expand(self.size))
        else:
            ratio = log_det_ratio_of(self.spectrum, delta)
        return ratio.to(self.dtype)

    def _loses(self, delta: Tensor) -> bool:
        """Whether too few digits of a shift are left in the sum."""
        return bool((self.matrix.diagonal().double() >= UNBEARABLE * delta).any())

    def _ratio_of_one(self, delta: Tensor) -> Tensor:
        """For the first number asked for, by a Cholesky factor; others by the eigenvalues, which take four times that.

        One number is often asked for again, and is kept.
        """
        shared, number = self.source or self, float(delta.detach())
        if number in shared.memo and not delta.requires_grad:
            return torch.tensor(shared.memo[number], dtype=torch.float64, device=self.device)
        if not (shared.memo or delta.requires_grad or "spectrum" in vars(shared)):
            found = log_det_one_plus_over(shared._core(), number)
            if found is not None:
                shared.memo[number] = found
                return torch.tensor(found, dtype=torch.float64, device=self.device)
        return log_det_ratio_of(self.spectrum, delta)

    def _ratio_of_several(self, delta: Tensor) -> Tensor:
        """For a number for each weight, by elimination where the identity would be lost in the sum."""
        kept, few = self._certain
        if self._loses(delta):
            given = (self.source or self).matrix.to(self.device)
            return log_det_one_plus(delta.reciprocal(), kept if few else pivoted_cholesky(given, self._rounding))
        if few:
            return logdet_from_one(_plus_one(kept.mT @ (kept / delta[:, None])))
        return _scaled_ratio(kept, delta)

    @cached_property
    def _certain(self) -> tuple[Tensor, bool]:
        """Without round-off, in float64: columns `V` with `V V^T` where they are few, or the matrix; and whether."""
        if self.source is not None:
            kept, few = self.source._certain
            return kept.to(self.device), few
        with torch.inference_mode(False):
            columns = pivoted_cholesky(self.matrix, self._rounding)
            rank = columns.shape[1]
            if 2 * rank < self.size:
                return columns, True
            return self.matrix.double() if rank == self.size else columns @ columns.mT, False

    def scale(self, factor: Tensor | float) -> Dense:
        """See `SymmetricOperator.scale`."""
        return Dense(self.matrix * factor)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """`|L^{-1} J^T|^2`, for as many examples at a time as leave little beside the matrix itself."""
        columns, examples, size = jacobian.shape
        step = chunk_length(examples, columns * size * self.matrix.element_size(), NEAR)
        parts = [slice(start, min(start + step, examples)) for start in range(0, examples, step)]
        few = FEW * columns * examples < size and "inverse_cholesky" not in vars(self)
        halves = self._by_solving if few or self.cholesky.requires_grad else self._by_inverse
        return torch.cat([_gram(halves(jacobian.select(part))) for part in parts])

    def _by_solving(self, jacobian: Jacobian) -> Tensor:
        """`J L^{-T}`, `(N, K, P)`, by the expanded Jacobian."""
        rows = jacobian.to_dense().transpose(0, 1)
        half = torch.linalg.solve_triangular(self.cholesky, rows.flatten(0, 1).T, upper=False).T
        return half.unflatten(0, rows.shape[:2])

    def _by_inverse(self, jacobian: Jacobian) -> Tensor:
        """The same by products of the Jacobian's factors with `L^{-1}`: for a layer, K times fewer."""
        return jacobian.project(self.inverse_cholesky.T).transpose(0, 1)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(function(self.matrix), self.source or self)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        return Dense(self.matrix + other.matrix) if isinstance(other, Dense) else super()._add(other)

    def _shift(self, delta: Tensor) -> Dense:
        return Dense(self.matrix.diagonal_scatter(self.matrix.diagonal() + delta))

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, vectors, upper=False)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky.T, vectors, upper=True)


def _scaled_ratio(matrix: Tensor, delta: Tensor) -> Tensor:
    """`log det(I + D^{-1/2} A D^{-1/2})` by a Cholesky factor; delta `(P,)`."""
    root = delta.rsqrt()
    return logdet_from_one(_plus_one(root[:, None] * matrix * root))


def _plus_one(matrix: Tensor) -> Tensor:
    """`I + A`, in the place of A."""
    matrix.diagonal().add_(1)
    return matrix


def _gram(half: Tensor) -> Tensor:
    """Products of the rows of each example, `(N, K, P)` to `(N, K, K)`."""
    return half @ half.mT
