"""The reference's classes for single weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lapkit.compat.laplace.options import BACKEND, PRIOR
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.weights import DiagLaplace, FullLaplace
from lapkit.curvature import Parameters

__all__ = ["DiagSubnetLaplace", "FullSubnetLaplace", "SubnetLaplace"]


class SubnetLaplace(ParametricLaplace):
    """Chosen weights alone; the prior is over them, and has their number where it has one for each."""

    subset = "subnetwork"
    order: ClassVar[tuple[str, ...]] = ("subnetwork_indices", *PRIOR, *BACKEND)

    def _weights(self) -> dict[str, Any]:
        """The indices.

        Raises:
            TypeError: if there are none.
        """
        if self.options.subnetwork_indices is None:
            raise TypeError(f"{type(self).__name__} needs subnetwork_indices, such as those of a mask's select().")
        return {"subset_of_weights": self.subset, "subnetwork": self.options.subnetwork_indices}

    @property
    def mean(self) -> Tensor:
        """All weights that require gradients at the MAP estimate, `(P,)`."""
        return Parameters.of(self.model).vector().detach()

    @property
    def mean_subnet(self) -> Tensor:
        """The chosen weights at the MAP estimate, `(Q,)`."""
        return self.laplace.mean

    @property
    def n_params(self) -> int:
        """How many weights require gradients, P."""
        return Parameters.of(self.model).numel

    @property
    def n_params_subnet(self) -> int:
        """How many are random, Q."""
        return self.parameters.numel

    def square_norm(self, value: Tensor) -> Tensor:
        """`(value - mean_subnet)^T P (value - mean_subnet)` of chosen weights `(Q,)`."""
        return self.laplace.square_norm(value)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the chosen weights with all other weights at their values, `(S, P)`."""
        return self.assemble_full_samples(self.laplace.sample(n_samples, generator))

    def assemble_full_samples(self, subnet_samples: Tensor) -> Tensor:
        """Samples `(S, Q)` of the chosen weights with all other weights at their values, `(S, P)`."""
        samples = self.mean.expand(len(subnet_samples), -1).clone()
        places = torch.as_tensor(self.options.subnetwork_indices, device=samples.device)
        samples[:, places.sort().values] = subnet_samples
        return samples


class FullSubnetLaplace(SubnetLaplace, FullLaplace):
    """The full matrix over chosen weights."""


class DiagSubnetLaplace(SubnetLaplace, DiagLaplace):
    """The diagonal over chosen weights."""
