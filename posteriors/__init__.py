"""Gaussian posteriors over weights, their evidence, and what they predict."""

from lapkit.posteriors.bridge import laplace_bridge
from lapkit.posteriors.evidence import log_det_posterior, log_det_ratio, log_evidence
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.functions import FunctionDistribution, linearized
from lapkit.posteriors.gaussian import GaussianPosterior, laplace_posterior
from lapkit.posteriors.information import (
    Uncertainty,
    uncertainty,
    uncertainty_of_dirichlet,
    uncertainty_of_logit,
    uncertainty_of_samples,
)
from lapkit.posteriors.links import LINKS, Link, closed_form, monte_carlo, quasi_monte_carlo
from lapkit.posteriors.pathwise import function_samples, matheron_samples, sample_then_optimize
from lapkit.posteriors.predictives import class_distribution, dirichlet, predictive
from lapkit.posteriors.priors import GaussianPrior
from lapkit.posteriors.quadrature import expected_entropy, expected_normal_cdf, expected_sigmoid

__all__ = [
    "LINKS",
    "Fit",
    "FunctionDistribution",
    "GaussianPosterior",
    "GaussianPrior",
    "Link",
    "Uncertainty",
    "class_distribution",
    "closed_form",
    "dirichlet",
    "expected_entropy",
    "expected_normal_cdf",
    "expected_sigmoid",
    "function_samples",
    "laplace_bridge",
    "laplace_posterior",
    "linearized",
    "log_det_posterior",
    "log_det_ratio",
    "log_evidence",
    "matheron_samples",
    "monte_carlo",
    "predictive",
    "quasi_monte_carlo",
    "sample_then_optimize",
    "uncertainty",
    "uncertainty_of_dirichlet",
    "uncertainty_of_logit",
    "uncertainty_of_samples",
]
