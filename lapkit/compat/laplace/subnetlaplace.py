"""The reference's classes for single weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lapkit.compat.laplace.baselaplace import DiagLaplace, FullLaplace
from lapkit.compat.laplace.options import BACKEND, PRIOR
from lapkit.compat.laplace.parametric import ParametricLaplace
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
    def mean_subnet(self) -> Tensor:
        """The chosen weights at the MAP estimate."""
        return self.mean

    @property
    def n_params_subnet(self) -> int:
        """How many there are."""
        return self.n_params

    def assemble_full_samples(self, subnet_samples: Tensor) -> Tensor:
        """Samples `(S, Q)` of the chosen weights with all other weights at their values, `(S, P)`."""
        everything = Parameters.of(self.model).vector().detach()
        samples = everything.expand(len(subnet_samples), -1).clone()
        places = torch.as_tensor(self.options.subnetwork_indices, device=samples.device)
        samples[:, places.sort().values] = subnet_samples
        return samples


class FullSubnetLaplace(SubnetLaplace, FullLaplace):
    """The full matrix over chosen weights."""


class DiagSubnetLaplace(SubnetLaplace, DiagLaplace):
    """The diagonal over chosen weights."""
