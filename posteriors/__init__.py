"""Gaussian posteriors over weights, their evidence, and what they predict."""

from lapkit.posteriors.evidence import log_det_posterior, log_evidence
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.functions import FunctionDistribution, linearized
from lapkit.posteriors.gaussian import GaussianPosterior, laplace_posterior
from lapkit.posteriors.links import closed_form, monte_carlo
from lapkit.posteriors.priors import GaussianPrior

__all__ = [
    "Fit",
    "FunctionDistribution",
    "GaussianPosterior",
    "GaussianPrior",
    "closed_form",
    "laplace_posterior",
    "linearized",
    "log_det_posterior",
    "log_evidence",
    "monte_carlo",
]
