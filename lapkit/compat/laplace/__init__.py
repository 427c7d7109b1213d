"""The public names of laplace-torch 0.3 on lapkit: write `from lapkit.compat.laplace import` for `from laplace import`.

Nothing is computed here; every object holds the `lapkit.Laplace` that does, as `la.laplace`. Where numbers or behaviour
differ on purpose, docs/coming-from-laplace-torch.md says so and why.
"""

from lapkit.compat.laplace.base import BaseLaplace
from lapkit.compat.laplace.functional import ELLA, BaseFunctionalLaplace, FunctionalLaplace, FunctionalLLLaplace, VaLLA
from lapkit.compat.laplace.laplace import Laplace
from lapkit.compat.laplace.last_layer import DiagLLLaplace, FullLLLaplace, KronLLLaplace, LLLaplace
from lapkit.compat.laplace.marglik_training import marglik_training
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace
from lapkit.compat.laplace.utils.enums import (
    FunctionalApproximation,
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from lapkit.compat.laplace.weights import DiagLaplace, FullLaplace, KronLaplace, LowRankLaplace

__all__ = [
    "ELLA",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FullSubnetLaplace",
    "FunctionalApproximation",
    "FunctionalLLLaplace",
    "FunctionalLaplace",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "LowRankLaplace",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
    "VaLLA",
    "marglik_training",
]
