"""The reference's names of options. Each member is the plain string that lapkit takes."""

from __future__ import annotations

from enum import Enum
from typing import NoReturn


class Option(str, Enum):
    """A string with a fixed set of values.

    Example:
        >>> HessianStructure("kron") == "kron" == HessianStructure.KRON
        True
    """

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        """Say what there is.

        Raises:
            ValueError: always.
        """
        names = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"{value!r} is no {cls.__name__}. Choose one of {names}.")


class SubsetOfWeights(Option):
    """Which weights are random."""

    ALL = "all"
    LAST_LAYER = "last_layer"
    SUBNETWORK = "subnetwork"


class HessianStructure(Option):
    """What is kept of the curvature."""

    FULL = "full"
    KRON = "kron"
    DIAG = "diag"
    LOWRANK = "lowrank"
    GP = "gp"


class FunctionalApproximation(Option):
    """How a posterior over functions is approximated."""

    SOD = "sod"
    NYSTROM = "nystrom"
    VARIATIONAL = "variational"


class Likelihood(Option):
    """The distribution of targets given outputs."""

    REGRESSION = "regression"
    CLASSIFICATION = "classification"
    REWARD_MODELING = "reward_modeling"


class PredType(Option):
    """What is drawn or integrated: the linearised network, the network itself, or a Gaussian process."""

    GLM = "glm"
    NN = "nn"
    GP = "gp"


class LinkApprox(Option):
    """From Gaussian logits to probabilities."""

    MC = "mc"
    PROBIT = "probit"
    BRIDGE = "bridge"
    BRIDGE_NORM = "bridge_norm"


class TuningMethod(Option):
    """How the prior precision is chosen."""

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"


class PriorStructure(Option):
    """How many prior precisions there are: one, one for each weight, or one for each parameter tensor."""

    SCALAR = "scalar"
    DIAG = "diag"
    LAYERWISE = "layerwise"
