"""The reference's classes for the last layer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lapkit.compat.laplace.options import BACKEND, KEYS, PRIOR, whole
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.weights import DiagLaplace, FullLaplace, KronLaplace

_FIRST = (*PRIOR, "enable_backprop", "feature_reduction", *KEYS, "backend", "last_layer_name")


class LLLaplace(ParametricLaplace):
    """The weights of the last layer alone: of the one with a given name, or of the last that is executed."""

    subset = "last_layer"
    order: ClassVar[tuple[str, ...]] = (*_FIRST, *BACKEND[1:])

    def _weights(self) -> dict[str, Any]:
        return {"subset_of_weights": self.subset, "last_layer_name": self.options.last_layer_name}

    def functional_variance_fast(self, X: Any) -> tuple[Tensor, Tensor]:
        """Mean and variances of the outputs, both `(N, C)`."""
        f = self.laplace.function_distribution(whole(X))
        return f.mean, f.variance


class FullLLLaplace(LLLaplace, FullLaplace):
    """The full matrix over the last layer."""


class KronLLLaplace(LLLaplace, KronLaplace):
    """Kronecker products over the last layer."""

    order: ClassVar[tuple[str, ...]] = (*_FIRST, "damping", *BACKEND[1:])


class DiagLLLaplace(LLLaplace, DiagLaplace):
    """The diagonal over the last layer."""
