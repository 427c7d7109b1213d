"""Symmetric positive semi-definite matrices over the weights, in whatever form is small: curvatures and precisions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian


class SymmetricOperator(ABC):
    """An immutable symmetric matrix `A` of size P x P.

    Methods that need an inverse want `A` positive definite, which `shift` by a prior precision makes it. `R` is any
    square root of the inverse: `R^T R = A^{-1}`. `to_dense` is the oracle of every other method.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of weights P."""

    @property
    @abstractmethod
    def _entries(self) -> Tensor:
        """One of the tensors that the matrix is made of."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the entries."""
        return self._entries.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._entries.device

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal, `(P,)`."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of `A^{-1}`, `(P,)`: marginal variances."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """The logarithm of the determinant."""

    @abstractmethod
    def scale(self, factor: Tensor | float) -> SymmetricOperator:
        """`factor * A`."""

    @abstractmethod
    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """`J_n A^{-1} J_n^T` of each example, `(N, K, K)`: for a precision A, the covariance of linearised outputs."""

    def inverse_gram(self, jacobian: Jacobian) -> Tensor:
        """`J[k,n] A^{-1} J[l,m]^T` of all examples with each other, `(K, N, K, N)`: the joint covariance."""
        rows = jacobian.to_dense().flatten(0, 1)
        half = self.inverse_root(rows.T)
        return (half.T @ half).unflatten(1, jacobian.shape[:2]).unflatten(0, jacobian.shape[:2])

    @abstractmethod
    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        """The same matrix with every tensor it is made of converted."""

    @abstractmethod
    def _shift(self, delta: Tensor) -> SymmetricOperator: ...

    @abstractmethod
    def _matmul(self, vectors: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse_root(self, vectors: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor: ...

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SymmetricOperator:
        """The same operator with entries of another floating type, or on another device."""
        return self._map(lambda tensor: tensor.to(dtype=dtype, device=device))

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        """`A + B` of one structure: for curvatures, which are sums over examples, that of all examples.

        Raises:
            TypeError: if the sum does not have that structure.
            ValueError: if the sizes differ.
        """
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        if other.size != self.size:
            raise ValueError(f"Operators over {self.size} and {other.size} weights do not add up.")
        return self._add(other)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """The sum, where it has the structure of both.

        Raises:
            TypeError: if it does not.
        """
        raise TypeError(
            f"The sum of {type(self).__name__} and {type(other).__name__} has the structure of neither. Add operators "
            "of one structure."
        )

    def shift(self, delta: Tensor | float, sizes: Sequence[int] | None = None) -> SymmetricOperator:
        """`A + diag(delta)`, for one number, one for each weight, or one for each group of consecutive weights.

        Args:
            delta: a number, a tensor with one entry, or `(P,)`; with sizes also `(L,)`.
            sizes: how many weights each of L groups has.

        Returns:
            The shifted operator, differentiable in `delta`.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._shift(self._checked(delta, sizes))

    def shifted_logdet(self, delta: Tensor | float, sizes: Sequence[int] | None = None) -> Tensor:
        """`log det(A + diag(delta))`; structures that can share work between different shifts do.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._shifted_logdet(self._checked(delta, sizes))

    def logdet_ratio(self, delta: Tensor | float, sizes: Sequence[int] | None = None) -> Tensor:
        """`log det(A + diag(delta)) - log det diag(delta)`, of which few digits are lost where P is large.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._logdet_ratio(self._checked(delta, sizes))

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        return self._shift(delta).logdet()

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        return self._shifted_logdet(delta) - delta.log().expand(self.size).sum()

    def _checked(self, delta: Tensor | float, sizes: Sequence[int] | None) -> Tensor:
        """A shift as a tensor, `()` or `(P,)`, or `(L,)` for the groups that a structure has by itself.

        Raises:
            ValueError: if the shape does not fit.
        """
        delta = torch.as_tensor(delta, dtype=self.dtype, device=self.device)
        if delta.numel() == 1:
            return delta.reshape(())
        if sizes is not None and sum(sizes) == self.size and delta.shape == (len(sizes),):
            return delta if list(sizes) == self.groups else spread(delta, sizes)
        if delta.shape != (self.size,):
            raise ValueError(f"A shift has one entry or {self.size}, got shape {tuple(delta.shape)}.")
        return delta

    @property
    def groups(self) -> list[int] | None:
        """How many weights each group has, of those that a shift by one number for each leaves cheap; if any."""
        return None

    def matmul(self, vectors: Tensor) -> Tensor:
        """`A v` for one vector `(P,)` or several `(P, R)`.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._columns(self._matmul, vectors)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """`A @ v`; see `matmul`."""
        return self.matmul(vectors)

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """`R v`, where `R^T R = A^{-1}`.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._columns(self._inverse_root, vectors)

    def inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        """`R^T v`: turns standard normal numbers into draws of covariance `A^{-1}`.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._columns(self._inverse_root_transpose, vectors)

    def solve(self, vectors: Tensor) -> Tensor:
        """`A^{-1} v`.

        Raises:
            ValueError: if the shape does not fit.
        """
        return self._columns(lambda v: self._inverse_root_transpose(self._inverse_root(v)), vectors)

    def quadratic(self, vector: Tensor) -> Tensor:
        """`v^T A v`."""
        return vector @ self.matmul(vector)

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return self.diagonal().sum()

    def to_dense(self) -> Tensor:
        """The matrix itself, `(P, P)`."""
        return self.matmul(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def _columns(self, function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.size:
            raise ValueError(
                f"Expected a vector ({self.size},) or several as columns ({self.size}, R), "
                f"got shape {tuple(vectors.shape)}."
            )
        if vectors.ndim == 1:
            return function(vectors[:, None])[:, 0]
        return function(vectors)


def spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """One number for each group of consecutive weights, `(L,)`, as one for each weight, `(P,)`."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), output_size=sum(sizes))
