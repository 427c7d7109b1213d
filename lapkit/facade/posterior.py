"""The Gaussian over the weights, its hyper-parameters, and their evidence."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature import Likelihood, SymmetricOperator
from lapkit.facade.fitting import Fitting
from lapkit.posteriors import (
    Fit,
    GaussianPosterior,
    GaussianPrior,
    laplace_posterior,
    log_det_posterior,
    log_det_ratio,
    log_evidence,
)


class Posterior(Fitting):
    """What fit, prior, noise and temperature make together; asking does not change anything."""

    _fit: Fit | None = None  # before the constructor sets likelihood and temperature
    _likelihood: Likelihood
    _temperature: float

    @property
    def likelihood(self) -> Likelihood:
        """Of the targets. After a fit only its noise can be set, as the curvature is that of this likelihood."""
        return self._likelihood

    @likelihood.setter
    def likelihood(self, value: Likelihood) -> None:
        if not isinstance(value, Likelihood):
            raise TypeError(
                f"Expected a Likelihood object, such as lapkit.curvature.Categorical(), got {type(value).__name__} "
                f"{value!r:.80}. Names are for the constructor."
            )
        if self._fit is not None and not same_but_noise(value, self._likelihood_of_fit):
            raise ValueError(
                f"The curvature is that of {self._likelihood_of_fit}, which was fitted; got {value}. Make another "
                "Laplace with this likelihood and fit it. The size of the noise alone is set by la.sigma_noise."
            )
        self._likelihood = value

    @property
    def temperature(self) -> float:
        """Of the likelihood, `p(y|f)^(1/T)`."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if isinstance(value, str | bool) or (torch.is_tensor(value) and value.numel() != 1) or not 0 < value < math.inf:
            raise ValueError(f"The temperature must be positive and finite, got {value!r}.")
        self._temperature = value

    @property
    def posterior(self) -> GaussianPosterior:
        """The Gaussian over the fitted weights."""
        given = (self.fitted, self.likelihood, self.prior, self.temperature)
        if any(torch.is_tensor(x) and x.requires_grad for x in self._numbers()):
            return laplace_posterior(*given)  # whose graph is for one use
        if self._posterior is None or any(old is not new for old, new in zip(self._posterior[0], given, strict=True)):
            self._posterior = given, laplace_posterior(*given)
        return self._posterior[1]

    def _numbers(self) -> tuple[Any, ...]:
        """What the posterior depends on and a gradient may be asked for."""
        return self.prior.precision, self.prior.mean, self.likelihood.precision, self.temperature

    @property
    def posterior_precision(self) -> SymmetricOperator:
        """`scale * H + diag(prior precision)`."""
        return self.posterior.precision

    @property
    def prior_precision(self) -> Tensor:
        """The prior precision: one number, one for each parameter tensor, or one for each weight."""
        return torch.as_tensor(self.prior.precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and not value.requires_grad:
            value = value.clone()  # what is done to it in place later on is no assignment
        prior = GaussianPrior(value, self.prior.mean)
        if self._fit is not None:
            prior.shift(self._fit.parameters)
        self.prior = prior

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise; one where the likelihood has none.

        Of a `PerOutputGaussian` it is the factor of all its noises, which alone can be set after a fit.
        """
        return torch.as_tensor(self.likelihood.precision) ** -0.5

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._likelihood = self.likelihood.with_noise(value)

    @property
    def n_params(self) -> int:
        """Number of random weights."""
        return self.fitted.parameters.numel

    @property
    def mean(self) -> Tensor:
        """The weights at the MAP estimate, `(P,)`."""
        return self.fitted.mean

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights, `(S, P)`."""
        return self.posterior.sample(n_samples, generator)

    def log_prob(self, weights: Tensor, normalized: bool = True) -> Tensor:
        """The posterior's log density at weights `(P,)`, or at several `(S, P)`; see `GaussianPosterior.log_prob`."""
        return self.posterior.log_prob(weights, normalized)

    def square_norm(self, weights: Tensor) -> Tensor:
        """`(w - w*)^T P (w - w*)` with the posterior precision P, at weights `(P,)`, or at several `(S, P)`."""
        return self.posterior.square_norm(weights)

    @property
    def posterior_variance(self) -> Tensor:
        """Marginal variances of the weights, `(P,)`."""
        return self.posterior.variance

    @property
    def posterior_covariance(self) -> Tensor:
        """The whole matrix `P^{-1}`, `(P, P)`."""
        return self.posterior.covariance

    @property
    def posterior_scale(self) -> Tensor:
        """`S` with `S S^T = P^{-1}`, `(P, P)`; for "diag" the standard deviations, `(P,)`."""
        return self.posterior.scale

    # -- evidence

    @property
    def log_likelihood(self) -> Tensor:
        """`(1 / T) sum_n log p(y_n | f_n)` at the MAP estimate."""
        return self.fitted.log_likelihood(self.likelihood, self.temperature)

    @property
    def scatter(self) -> Tensor:
        """`(w* - m)^T P0 (w* - m)` with the prior's mean m and precision P0."""
        return self.prior.scatter(self.fitted.parameters, self.fitted.mean)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """`log det` of the posterior precision."""
        return log_det_posterior(self.fitted, self.likelihood, self.prior, self.temperature)

    @property
    def log_det_prior_precision(self) -> Tensor:
        """`log det` of the prior precision."""
        return self.prior.logdet(self.fitted.parameters)

    @property
    def log_det_ratio(self) -> Tensor:
        """`log det` of the posterior precision minus that of the prior precision."""
        return log_det_ratio(self.fitted, self.likelihood, self.prior, self.temperature)

    def log_marginal_likelihood(
        self, prior_precision: float | Tensor | None = None, sigma_noise: float | Tensor | None = None
    ) -> Tensor:
        """The Laplace approximation of the log evidence, in nats; asking does not change anything.

        Args:
            prior_precision: evaluate there instead of at the current one; the result is differentiable in it.
            sigma_noise: likewise.

        Returns:
            A number.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if a value is not positive or has a wrong length, there is no noise, or the evidence is not
                finite.
        """
        prior = self.prior if prior_precision is None else GaussianPrior(prior_precision, self.prior.mean)
        likelihood = self.likelihood if sigma_noise is None else self.likelihood.with_noise(sigma_noise)
        found = log_evidence(self.fitted, likelihood, prior, self.temperature)
        if not math.isfinite(found.detach()):
            raise ValueError(
                f"The evidence is {float(found.detach())}: prior precision, noise or temperature are so extreme that "
                f"their quotients leave the range of {found.dtype}. Take others, or a model in float64."
            )
        return found


def same_but_noise(one: Likelihood, two: Likelihood) -> bool:
    """Whether two likelihoods have one loss, so that a fit of the one is a fit of the other."""
    if one is two or type(one) is not type(two):
        return one is two
    if not is_dataclass(one) or not is_dataclass(two):
        return False
    with suppress(ValueError):  # where there is no noise
        one, two = one.with_noise(1.0), two.with_noise(1.0)
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
