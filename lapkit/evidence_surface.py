"""The log evidence over the logarithms of hyper-parameters: what is climbed to choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Gamma

from lapkit.curvature import Likelihood
from lapkit.curvature.operators.log_det_ratio import effective_number, log_det_ratio_of
from lapkit.posteriors import Fit, GaussianPrior, log_det_ratio


@dataclass(frozen=True, eq=False)
class EvidenceSurface:
    """The log evidence over the logarithms of prior precisions, one for each group of weights, and of the noise.

    For a fixed mode it is concave: the log likelihood and the scatter are minus an exponential of a logarithm each, and
    the log determinant of a sum of exponentials times positive matrices is convex. All ways up lead to one top.

    Args:
        fit: curvature, loss and mode, in float64.
        likelihood: of the targets.
        mean: of the prior.
        groups: sizes of the groups of consecutive weights.
        tune_noise: the last logarithm is that of a Gaussian likelihood's noise.
        temperature: of the likelihood.
        hyper_prior: over each precision.
        eigenvalues: of the curvature, in float64, where they are known and there is one group: then nothing else of
            the curvature is looked at, which may be in any type.
        tick: called at each evaluation that takes a determinant, to show progress.
    """

    fit: Fit
    likelihood: Likelihood
    mean: Tensor | float
    groups: tuple[int, ...]
    tune_noise: bool = False
    temperature: float = 1.0
    hyper_prior: Gamma | None = None
    eigenvalues: Tensor | None = None
    tick: Callable[[], object] | None = None

    @cached_property
    def squares(self) -> Tensor:
        """`|w - m|^2` of each group, `(G,)`."""
        mean = self.mean
        centre = mean if isinstance(mean, float) else GaussianPrior(1.0, mean).centre(self.fit.parameters).double()
        return self.total((self.fit.mean - centre).square())

    @cached_property
    def sizes(self) -> Tensor:
        """How many weights each group has, `(G,)`."""
        return torch.tensor(self.groups, device=self.fit.mean.device)

    @cached_property
    def owner(self) -> Tensor:
        """The group of each weight, `(P,)`."""
        return torch.arange(len(self.groups), device=self.fit.mean.device).repeat_interleave(self.sizes)

    @property
    def gamma(self) -> tuple[float, float]:
        """Shape and rate of the hyper-prior's slope in a log precision; zero where there is none."""
        if self.hyper_prior is None:
            return 0.0, 0.0
        return float(self.hyper_prior.concentration), float(self.hyper_prior.rate)

    def total(self, values: Tensor) -> Tensor:
        """Sums over groups of values `(P,)`."""
        if len(self.groups) == len(values):
            return values
        if len(self.groups) == 1:
            return values.sum().reshape(1)
        return torch.zeros(len(self.groups), dtype=values.dtype, device=values.device).index_add(0, self.owner, values)

    def precision(self, logs: Tensor) -> Tensor:
        """The prior precision in the shape in which a curvature can use it best: `()`, `(L,)` or `(P,)`."""
        values = logs[: len(self.groups)].exp()
        if len(values) == 1:
            return values.reshape(())
        return values if self.groups == self.fit.parameters.sizes else values[self.owner]

    def noise(self, logs: Tensor) -> Likelihood:
        """The likelihood, with the noise of this point."""
        return self.likelihood.with_noise(logs[-1].exp()) if self.tune_noise else self.likelihood

    def complexity(self, logs: Tensor) -> Tensor:
        """`log det P - log det P0`."""
        if self.eigenvalues is not None:
            return log_det_ratio_of(self.eigenvalues, self.shift(logs))
        if self.tick is not None:
            self.tick()
        prior = GaussianPrior(self.precision(logs))
        return log_det_ratio(self.fit, self.noise(logs), prior, self.temperature)

    def shift(self, logs: Tensor) -> Tensor:
        """One precision over what the curvature is multiplied by."""
        return (logs[0] - self.log_scale(logs)).exp()

    def log_scale(self, logs: Tensor) -> Tensor:
        """The logarithm of what the curvature is multiplied by."""
        scale = self.fit.curvature_scale(self.noise(logs), self.temperature)
        return torch.as_tensor(scale, dtype=logs.dtype, device=logs.device).log()

    def hyper(self, logs: Tensor) -> Tensor:
        """The log density of the hyper-prior over log precisions, without its constant."""
        shape, rate = self.gamma
        own = logs[: len(self.groups)]
        return (shape * own - rate * own.exp()).sum()

    def fit_to_data(self, logs: Tensor) -> Tensor:
        """The log likelihood minus the half of the scatter: the log evidence without the complexity."""
        misfit = self.fit.log_likelihood(self.noise(logs), self.temperature)
        return misfit - (logs[: len(self.groups)].exp() * self.squares).sum() / 2

    def __call__(self, logs: Tensor) -> Tensor:
        """What is maximised: the log evidence, and the log density of the hyper-prior over log precisions.

        Raises:
            ValueError: if it is not finite.
        """
        value = self.fit_to_data(logs) - self.complexity(logs) / 2 + self.hyper(logs)
        _check_finite(value)
        return value

    def slope(self, logs: Tensor) -> tuple[float, Tensor]:
        """Value and gradient."""
        logs = logs.detach().requires_grad_()
        value = self(logs)
        (gradient,) = torch.autograd.grad(value, logs)
        return float(value.detach()), gradient

    def effective(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """MacKay's effective numbers of parameters, `gamma = n - delta tr P^{-1}` of each group, `(G,)`.

        They are minus the slopes of the log determinant's ratio in log precisions, in which no digits cancel. With them
        its slope in the log noise, which is minus twice their sum (four times for the empirical Fisher).
        """
        found = self.at(logs)
        return found.effective, found.noise_slope

    def at(self, logs: Tensor) -> Point:
        """All that is to be known of one point, for the price of its slope.

        Raises:
            ValueError: if the evidence is not finite.
        """
        if self.eigenvalues is not None and not self.tune_noise:
            return self._at_known(logs.detach(), self.eigenvalues)
        logs = logs.detach().requires_grad_()
        complexity, own = self.complexity(logs), self.fit_to_data(logs)
        (down,), (up,) = (torch.autograd.grad(value, logs) for value in (complexity, own + self.hyper(logs)))
        log_evidence = (own - complexity / 2).detach()
        _check_finite(log_evidence)
        return Point(log_evidence, up - down / 2, -down[: len(self.groups)], down[-1])

    @torch.no_grad()
    def _at_known(self, logs: Tensor, eigenvalues: Tensor) -> Point:
        """For one precision over eigenvalues, in closed form: a graph would take longer than all numbers in it.

        Raises:
            ValueError: if the evidence is not finite.
        """
        shift = self.shift(logs)
        log_evidence = self.fit_to_data(logs) - log_det_ratio_of(eigenvalues, shift) / 2
        _check_finite(log_evidence)
        effective = effective_number(eigenvalues, shift).reshape(1)
        shape, rate = self.gamma
        gradient = (effective - logs.exp() * (self.squares + 2 * rate)) / 2 + shape
        return Point(log_evidence, gradient, effective, -effective[0])


@dataclass(frozen=True)
class Point:
    """A place on the surface.

    Args:
        log_evidence: in nats, without the hyper-prior.
        gradient: of what is maximised.
        effective: numbers of parameters of each group, `(G,)`.
        noise_slope: of the log determinant's ratio in the last logarithm.
    """

    log_evidence: Tensor
    gradient: Tensor
    effective: Tensor
    noise_slope: Tensor


def _check_finite(value: Tensor) -> None:
    """Refuse what no search can climb.

    Raises:
        ValueError: if it is not finite.
    """
    if not math.isfinite(value.detach()):
        raise ValueError("The evidence is not finite: the fit holds NaN or infinite curvature.")
