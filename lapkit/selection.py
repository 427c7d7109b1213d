"""Hyper-parameters by marginal likelihood: prior precision and observation noise that make the data most probable."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lapkit.curvature import Gaussian, Likelihood
from lapkit.posteriors import Fit, GaussianPrior, log_evidence

# Precisions outside are beyond what data of any scale can tell; the search stops there and says so.
LOG_PRECISION_BOUNDS = (math.log(1e-6), math.log(1e8))
LOG_NOISE_BOUNDS = (math.log(1e-6), math.log(1e6))
NO_PRIOR = ("no prior at all", "all weights at the prior mean")
NO_NOISE = ("no noise at all, as if the network reproduced the targets", "nothing but noise")


@dataclass(frozen=True)
class Selection:
    """The result of a search.

    Args:
        prior: with the best precision.
        likelihood: with the best noise, if that was tuned.
        log_evidence: reached, in nats.
        converged: whether the optimiser was satisfied.
        evaluations: of evidence and gradient.
    """

    prior: GaussianPrior
    likelihood: Likelihood
    log_evidence: float
    converged: bool
    evaluations: int


def maximize_evidence(
    fit: Fit,
    likelihood: Likelihood,
    prior: GaussianPrior,
    *,
    groups: int = 1,
    tune_noise: bool = False,
    temperature: float = 1.0,
    n_steps: int = 100,
) -> Selection:
    """Maximise the log evidence over the logarithms of `groups` prior precisions and, if asked, of the noise.

    L-BFGS-B with exact gradients in float64. The curvature's eigenvalues are computed once; with one precision an
    evaluation costs O(P).

    Args:
        fit: curvature, loss and mode.
        likelihood: of the targets.
        prior: where the search starts; its mean is kept.
        groups: 1, the number of parameter tensors, or the number of weights.
        tune_noise: also tune a Gaussian likelihood's noise.
        temperature: of the likelihood.
        n_steps: iterations at most.

    Returns:
        The best hyper-parameters.

    Raises:
        ValueError: if noise is to be tuned that the likelihood does not have, or the evidence is not finite.
    """
    if tune_noise and not isinstance(likelihood, Gaussian):
        raise ValueError(f"{type(likelihood).__name__} has no observation noise to tune; only a Gaussian has.")
    double = replace(fit, curvature=fit.curvature.to(torch.float64), mean=fit.mean.double(), loss=fit.loss.double())
    start = torch.as_tensor(prior.precision).detach().double().cpu().reshape(-1)
    start = (start if len(start) == groups else start.log().mean().exp().expand(groups)).log()
    bounds = [LOG_PRECISION_BOUNDS] * groups
    if tune_noise:
        noise = torch.as_tensor(likelihood.noise).detach().double().cpu().reshape(1)  # type: ignore[attr-defined]
        start, bounds = torch.cat([start, noise.log()]), [*bounds, LOG_NOISE_BOUNDS]

    def unpack(logs: Tensor) -> tuple[GaussianPrior, Likelihood]:
        chosen = Gaussian(logs[-1].exp()) if tune_noise else likelihood
        mean = prior.mean.double() if isinstance(prior.mean, Tensor) else prior.mean
        return GaussianPrior(logs[:groups].exp(), mean), chosen

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        logs = torch.tensor(point, dtype=torch.float64, device=fit.mean.device, requires_grad=True)
        prior, chosen = unpack(logs)
        value = -log_evidence(double, chosen, prior, temperature)
        if not torch.isfinite(value):
            raise ValueError("The evidence is not finite: the fit holds NaN or infinite curvature.")
        (gradient,) = torch.autograd.grad(value, logs)
        return float(value.detach()), gradient.cpu().numpy()

    found = minimize(
        objective,
        start.clamp(*LOG_PRECISION_BOUNDS).numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": n_steps, "ftol": 1e-14, "gtol": 1e-9, "maxls": 40},
    )
    if groups == 1:
        _warn_at_boundary(found.x[0], LOG_PRECISION_BOUNDS, "prior precision", NO_PRIOR)
    if tune_noise:
        _warn_at_boundary(found.x[-1], LOG_NOISE_BOUNDS, "noise", NO_NOISE)
    logs = torch.tensor(found.x, dtype=torch.float64, device=fit.mean.device)
    precision = logs[:groups].exp().to(fit.mean.dtype)
    return Selection(
        prior=GaussianPrior(precision.reshape(()) if groups == 1 else precision, prior.mean),
        likelihood=Gaussian(math.exp(found.x[-1])) if tune_noise else likelihood,
        log_evidence=-float(found.fun),
        converged=bool(found.success),
        evaluations=int(found.nfev),
    )


def _warn_at_boundary(log_value: float, bounds: tuple[float, float], what: str, meanings: tuple[str, str]) -> None:
    for bound, meaning in zip(bounds, meanings, strict=True):
        if abs(log_value - bound) < 1e-6:
            warnings.warn(
                f"The evidence is largest at the edge of the search, {what} {math.exp(bound):g}: the data speak for "
                f"{meaning}. Check that the network is trained, and the scale of the data.",
                stacklevel=4,
            )
