"""The reference's helpers that scripts import by name."""

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
from lapkit.compat.laplace.utils.feature_extractor import FeatureReduction
from lapkit.compat.laplace.utils.matrix import Kron, KronDecomposed
from lapkit.compat.laplace.utils.metrics import RunningNLLMetric
from lapkit.compat.laplace.utils.subnetmask import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    RandomSubnetMask,
    SubnetMask,
)
from lapkit.compat.laplace.utils.utils import block_diag, get_nll, kron, parameters_per_layer

__all__ = [
    "FeatureReduction",
    "FunctionalApproximation",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "Likelihood",
    "LinkApprox",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "PredType",
    "PriorStructure",
    "RandomSubnetMask",
    "RunningNLLMetric",
    "SubnetMask",
    "SubsetOfWeights",
    "TuningMethod",
    "block_diag",
    "get_nll",
    "kron",
    "parameters_per_layer",
]
