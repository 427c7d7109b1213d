"""Where the reference has its classes over all weights and over functions."""

from lapkit.compat.laplace.base import BaseLaplace
from lapkit.compat.laplace.functional import ELLA, BaseFunctionalLaplace, FunctionalLaplace, VaLLA
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.weights import DiagLaplace, FullLaplace, KronLaplace, LowRankLaplace

__all__ = [
    "ELLA",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "DiagLaplace",
    "FullLaplace",
    "FunctionalLaplace",
    "KronLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
    "VaLLA",
]
