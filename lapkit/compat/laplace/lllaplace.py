"""Where the reference has its classes over the last layer."""

from lapkit.compat.laplace.functional import FunctionalLLLaplace
from lapkit.compat.laplace.last_layer import DiagLLLaplace, FullLLLaplace, KronLLLaplace, LLLaplace

__all__ = ["DiagLLLaplace", "FullLLLaplace", "FunctionalLLLaplace", "KronLLLaplace", "LLLaplace"]
