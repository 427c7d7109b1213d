"""The Laplace approximation of the log marginal likelihood, a pure function of a fit and its hyper-parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.priors import GaussianPrior


def log_det_posterior(fit: Fit, likelihood: Likelihood, prior: GaussianPrior, temperature: float = 1.0) -> Tensor:
    """`log det(scale * H + diag(delta))`, as `P log(scale) + log det(H + diag(delta) / scale)`.

    In this form what a structure knows of H (its eigenvalues) serves for every scale and every scalar prior.
    """
    scale = torch.as_tensor(fit.curvature_scale(likelihood, temperature), dtype=fit.curvature.dtype)
    shift = prior.values(fit.parameters) / scale
    return fit.curvature.size * scale.log() + fit.curvature.shifted_logdet(shift, fit.parameters.sizes)


def log_det_ratio(fit: Fit, likelihood: Likelihood, prior: GaussianPrior, temperature: float = 1.0) -> Tensor:
    """`log det(scale * H + diag(delta)) - log det diag(delta)`: what the data add to the prior's log determinant.

    It is bounded by what the data can tell, whatever the number of weights: the difference of the two logarithms, each
    of which grows with that number, would lose its digits.
    """
    scale = fit.curvature_scale(likelihood, temperature)
    if isinstance(scale, Tensor):
        scale = scale.to(fit.curvature.dtype)
    return fit.curvature.logdet_ratio(prior.values(fit.parameters) / scale, fit.parameters.sizes)


def log_evidence(fit: Fit, likelihood: Likelihood, prior: GaussianPrior, temperature: float = 1.0) -> Tensor:
    """`log p(D) ~ log p(D|w*) - [(w* - m)^T P0 (w* - m) + log det P - log det P0] / 2`, in nats.

    The factors `(2 pi)^(P/2)` of the prior and of the Gaussian integral cancel.

    Args:
        fit: curvature, loss and mode w*.
        likelihood: with its noise, if it has one.
        prior: with mean m and precision P0; P is the posterior's precision.
        temperature: of the likelihood.

    Returns:
        A number in the type of the mode, differentiable in the prior precision, the noise and the temperature.

    Reference:
        MacKay, A practical Bayesian framework for backpropagation networks, 1992, eq. (2.10); Dangel, Backpropagation
        Beyond the Gradient, eq. (2.19) and (3.32).
    """
    scatter = prior.scatter(fit.parameters, fit.mean)
    complexity = scatter + log_det_ratio(fit, likelihood, prior, temperature)
    return (fit.log_likelihood(likelihood, temperature) - complexity / 2).to(fit.mean.dtype)
