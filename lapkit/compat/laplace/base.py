"""The reference's classes as doors to `lapkit.Laplace`: arguments and results translated, nothing computed."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lapkit
from lapkit.compat.laplace.differentiable import DifferentiableLaplace
from lapkit.compat.laplace.options import BACKEND, KEYS, PRIOR, Options
from lapkit.compat.laplace.utils.enums import Likelihood
from lapkit.posteriors import GaussianPrior


class BaseLaplace(ABC):
    """A Laplace approximation with the attributes and methods of laplace-torch.

    Args:
        model: trained; it is not copied, and after every call it is what it was.
        likelihood: "classification", "regression" or "reward_modeling".
        args: in the order of `order`.
        named: by name.

    Attributes:
        laplace: the `lapkit.Laplace` behind, which can more.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if a value is not possible, or is not offered.
    """

    subset: ClassVar[str] = "all"
    structure: ClassVar[str]
    order: ClassVar[tuple[str, ...]] = (*PRIOR, "enable_backprop", *KEYS, *BACKEND)
    laplace: lapkit.Laplace

    def __init__(self, model: nn.Module, likelihood: str, *args: Any, **named: Any) -> None:
        # lightning-uq-box makes a second object from attributes with the names of this function's variables: it has
        # those of the hyper-parameters, and no others that are attributes too.
        self.options = Options.read(type(self).__name__, self.order, args, named)
        sigma_noise, prior_precision = number(self.options.sigma_noise), self.options.prior_precision
        prior_mean, temperature = self.options.prior_mean, self.options.temperature
        self.likelihood = Likelihood(likelihood)
        kind = DifferentiableLaplace if self.options.enable_backprop else lapkit.Laplace
        self.laplace = kind(
            model,
            self.likelihood.value,
            hessian_structure=self.structure,
            **self._weights(),
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            curvature=self.options.columns,
        )

    def _weights(self) -> dict[str, Any]:
        """Arguments of `lapkit.Laplace` that say which weights are random."""
        return {"subset_of_weights": self.subset}

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        return self.laplace.model

    # -- hyper-parameters

    @property
    def prior_precision(self) -> Tensor:
        """A vector: of one number, one for each parameter tensor, or one for each weight."""
        return self.laplace.prior_precision.reshape(-1)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self.laplace.prior_precision = value

    @property
    def prior_mean(self) -> Tensor:
        """A number, or one for each weight."""
        return torch.as_tensor(self.laplace.prior.mean)

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        self.laplace.prior = GaussianPrior(self.laplace.prior.precision, value)

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise; one for classes."""
        return self.laplace.sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self.laplace.sigma_noise = number(value)

    @property
    def temperature(self) -> float:
        """Of the likelihood."""
        return self.laplace.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.laplace.temperature = value


def number(value: float | Tensor) -> Tensor:
    """One number, whatever axes it has.

    Raises:
        ValueError: if there are several.
    """
    value = torch.as_tensor(value)
    if value.numel() != 1:
        raise ValueError(f"sigma_noise is one number, got shape {tuple(value.shape)}.")
    return value.reshape(())
