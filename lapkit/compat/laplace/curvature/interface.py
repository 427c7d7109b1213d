"""The reference's names of curvature backends. There is one engine here, so a name says only which curvature.

GGN of any backend is the exact generalised Gauss-Newton matrix, or with `stochastic=True` its Monte Carlo estimate; EF
is the empirical Fisher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lapkit.curvature import GGN, Columns, EmpiricalFisher, MonteCarloGGN


class CurvatureInterface(ABC):
    """A choice of curvature."""

    @classmethod
    @abstractmethod
    def columns(cls, options: Mapping[str, Any]) -> Columns:
        """What lapkit's `curvature` argument takes.

        Args:
            options: the reference's `backend_kwargs`.
        """


class GGNInterface(CurvatureInterface):
    """The generalised Gauss-Newton matrix."""

    @classmethod
    def columns(cls, options: Mapping[str, Any]) -> Columns:
        """Exact, or sampled with `stochastic=True` and `num_samples` (or `mc_samples`).

        Args:
            options: the reference's `backend_kwargs`.

        Returns:
            The columns.

        Raises:
            TypeError: if there are other options.
        """
        left = dict(options)
        stochastic = left.pop("stochastic", False) or left.pop("fisher_type", "") == "fisher_mc"
        samples = left.pop("num_samples", left.pop("mc_samples", 1))
        _refuse(left)
        return MonteCarloGGN(samples) if stochastic else GGN()


class EFInterface(CurvatureInterface):
    """The empirical Fisher: outer products of the examples' gradients."""

    @classmethod
    def columns(cls, options: Mapping[str, Any]) -> Columns:
        """The gradients at the targets.

        Args:
            options: must be empty.

        Returns:
            The columns.

        Raises:
            TypeError: if there are options.
        """
        _refuse(options)
        return EmpiricalFisher()


class HessianInterface(CurvatureInterface):
    """The Hessian of the loss, which gives no posterior."""

    @classmethod
    def columns(cls, options: Mapping[str, Any]) -> Columns:
        """Not offered.

        Args:
            options: not read.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "The Hessian of a network's loss has negative eigenvalues unless training has converged to a minimum, and "
            "then there is no Gaussian posterior. Use a GGN backend, which is positive semi-definite. The Hessian "
            "itself is in lapkit.curvature: HessianProduct, hessian_diagonal, hessian_blocks."
        )


def _refuse(left: Mapping[str, Any]) -> None:
    """Refuse options of a backend that nothing here reads.

    Raises:
        TypeError: if there are any.
    """
    if left:
        raise TypeError(
            f"backend_kwargs {sorted(left)} have no meaning for lapkit's engine; it takes stochastic and num_samples "
            "of a GGN backend."
        )


BackPackInterface = CurvlinopsInterface = AsdlInterface = AsdfghjklInterface = CurvatureInterface
BackPackGGN = CurvlinopsGGN = AsdlGGN = AsdfghjklGGN = GGNInterface
BackPackEF = CurvlinopsEF = AsdlEF = AsdfghjklEF = EFInterface
CurvlinopsHessian = AsdlHessian = AsdfghjklHessian = HessianInterface
