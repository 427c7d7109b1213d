"""The reference's way from names to a class."""

from __future__ import annotations

from typing import Any

from torch import nn

from lapkit.compat.laplace.functional import ELLA, FunctionalLaplace, FunctionalLLLaplace, VaLLA
from lapkit.compat.laplace.last_layer import DiagLLLaplace, FullLLLaplace, KronLLLaplace
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace
from lapkit.compat.laplace.utils.enums import FunctionalApproximation, HessianStructure, SubsetOfWeights
from lapkit.compat.laplace.weights import DiagLaplace, FullLaplace, KronLaplace, LowRankLaplace

CLASSES: dict[tuple[str, str], type[ParametricLaplace]] = {
    ("all", "full"): FullLaplace,
    ("all", "kron"): KronLaplace,
    ("all", "diag"): DiagLaplace,
    ("all", "lowrank"): LowRankLaplace,
    ("all", "gp"): FunctionalLaplace,
    ("last_layer", "full"): FullLLLaplace,
    ("last_layer", "kron"): KronLLLaplace,
    ("last_layer", "diag"): DiagLLLaplace,
    ("last_layer", "gp"): FunctionalLLLaplace,
    ("subnetwork", "full"): FullSubnetLaplace,
    ("subnetwork", "diag"): DiagSubnetLaplace,
}


def Laplace(
    model: nn.Module,
    likelihood: str,
    subset_of_weights: str = SubsetOfWeights.LAST_LAYER,
    hessian_structure: str = HessianStructure.KRON,
    *args: Any,
    functional_approximation: str = FunctionalApproximation.SOD,
    **kwargs: Any,
) -> ParametricLaplace:
    """A posterior of the class for these names.

    Args:
        model: trained.
        likelihood: "classification" or "regression".
        subset_of_weights: "last_layer", "all" or "subnetwork".
        hessian_structure: "kron", "diag", "full", "lowrank" or "gp".
        args: further arguments of the class.
        functional_approximation: "sod"; the others are not offered.
        kwargs: further arguments of the class.

    Returns:
        An object of the class.

    Raises:
        ValueError: if a name is unknown, or there is no such combination.

    Example:
        >>> from torch import nn
        >>> type(Laplace(nn.Linear(2, 3), "classification", "all", "full", prior_precision=2.0)).__name__
        'FullLaplace'
    """
    refused = {FunctionalApproximation.NYSTROM: ELLA, FunctionalApproximation.VARIATIONAL: VaLLA}
    approximation = FunctionalApproximation(functional_approximation)
    if approximation in refused:
        refused[approximation](model, likelihood)
    key = SubsetOfWeights(subset_of_weights).value, HessianStructure(hessian_structure).value
    if key not in CLASSES:
        raise ValueError(
            f"There is no class for {key[0]!r} weights with {key[1]!r} curvature in laplace-torch. Combinations: "
            f"{', '.join(' + '.join(k) for k in CLASSES)}. lapkit.Laplace has more."
        )
    return CLASSES[key](model, likelihood, *args, **kwargs)
