"""Matrices that exist only as products: what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lapkit.curvature.products.estimators import Estimate, hutchpp_trace


class MatrixFree(ABC):
    """An immutable symmetric P x P matrix that is only multiplied by, definite or not.

    Estimators, eigensolvers and views take it as they take any object with `size`, `dtype`, `device` and `matmul`.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of rows P."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors it takes and gives."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the vectors are."""

    @abstractmethod
    def _matmul(self, vectors: Tensor) -> Tensor:
        """`A v` for vectors `(P, R)`."""

    def matmul(self, vectors: Tensor) -> Tensor:
        """`A v` for one vector `(P,)` or several `(P, R)`, which cost less together than one by one.

        Raises:
            ValueError: if the shape does not fit, or the vectors are not finite.
            TypeError: if their floating type is another one than that of the matrix.
        """
        if vectors.ndim not in (1, 2) or len(vectors) != self.size:
            raise ValueError(
                f"Expected a vector ({self.size},) or several as columns ({self.size}, R), "
                f"got shape {tuple(vectors.shape)}."
            )
        if vectors.dtype != self.dtype:
            raise TypeError(f"Expected vectors of type {self.dtype}, got {vectors.dtype}: convert them with .to().")
        # A sum, which is read in one pass, may overflow, but never is finite where a term is not.
        if not torch.isfinite(vectors.sum()) and not torch.isfinite(vectors).all():
            raise ValueError("The vectors hold NaN or infinite values.")
        if vectors.ndim == 1:
            return self._matmul(vectors[:, None])[:, 0]
        return self._matmul(vectors)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """See `matmul`."""
        return self.matmul(vectors)

    def quadratic(self, vector: Tensor) -> Tensor:
        """`v^T A v` of one vector `(P,)`."""
        return vector @ self.matmul(vector)

    def trace(self, products: int = 48, *, generator: torch.Generator | None = None) -> Estimate:
        """An estimate of the trace by Hutch++; `lapkit.curvature.products.estimators` has others.

        Raises:
            ValueError: if there are fewer than six products.
        """
        return hutchpp_trace(self, products, generator=generator)

    def to_dense(self) -> Tensor:
        """The matrix itself, `(P, P)`, by P products: for small P."""
        return self.matmul(torch.eye(self.size, dtype=self.dtype, device=self.device))
