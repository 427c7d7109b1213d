"""Function space: the neural tangent kernel, and the Laplace approximation as a Gaussian process of gpytorch.

Only the kernel matrix itself does without gpytorch, which comes with `pip install 'lapkit[gp]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lapkit.posteriors.function_space.neural_tangent import neural_tangent_kernel

if TYPE_CHECKING:
    from lapkit.posteriors.function_space.fitting import laplace_gp
    from lapkit.posteriors.function_space.joint import JointPosterior
    from lapkit.posteriors.function_space.kernel import TangentKernel
    from lapkit.posteriors.function_space.process import LaplaceGP

__all__ = ["JointPosterior", "LaplaceGP", "TangentKernel", "laplace_gp", "neural_tangent_kernel"]

_WITH_GPYTORCH = {"JointPosterior": "joint", "LaplaceGP": "process", "TangentKernel": "kernel", "laplace_gp": "fitting"}


def __getattr__(name: str) -> Any:
    """Import what needs gpytorch when it is asked for.

    Raises:
        AttributeError: if there is no such name.
        ImportError: if gpytorch is not installed.
    """
    if name not in _WITH_GPYTORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_GPYTORCH[name]}"), name)
