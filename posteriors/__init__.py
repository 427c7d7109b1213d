"""Gaussian posteriors over weights, their evidence, and what they predict."""

from lapkit.posteriors.bridge import laplace_bridge
from lapkit.posteriors.evidence import log_det_posterior, log_det_ratio, log_evidence
from lapkit.posteriors.evidence_bounds import evidence_lower_bound
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.functions import (
    FunctionDistribution,
    from_jacobian,
    jointly_linearized,
    linearized,
    linearized_pieces,
)
from lapkit.posteriors.gaussian import GaussianPosterior, laplace_posterior
from lapkit.posteriors.information import (
    Uncertainty,
    uncertainty,
    uncertainty_of_dirichlet,
    uncertainty_of_logit,
    uncertainty_of_samples,
)
from lapkit.posteriors.input_gradients import differentiable_joint, differentiable_linearized, differentiable_samples
from lapkit.posteriors.links import LINKS, Link, closed_form, monte_carlo, quasi_monte_carlo
from lapkit.posteriors.pathwise import function_samples, matheron_samples, sample_then_optimize
from lapkit.posteriors.predictives import class_distribution, dirichlet, mean_outputs, predictive
from lapkit.posteriors.priors import GaussianPrior
from lapkit.posteriors.quadrature import expected_entropy, expected_normal_cdf, expected_sigmoid
from lapkit.posteriors.weight_samples import mean_of, network_outputs, sampled_moments, sampled_outputs

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
    "differentiable_joint",
    "differentiable_linearized",
    "differentiable_samples",
    "dirichlet",
    "evidence_lower_bound",
    "expected_entropy",
    "expected_normal_cdf",
    "expected_sigmoid",
    "from_jacobian",
    "function_samples",
    "jointly_linearized",
    "laplace_bridge",
    "laplace_posterior",
    "linearized",
    "linearized_pieces",
    "log_det_posterior",
    "log_det_ratio",
    "log_evidence",
    "matheron_samples",
    "mean_of",
    "mean_outputs",
    "monte_carlo",
    "network_outputs",
    "predictive",
    "quasi_monte_carlo",
    "sample_then_optimize",
    "sampled_moments",
    "sampled_outputs",
    "uncertainty",
    "uncertainty_of_dirichlet",
    "uncertainty_of_logit",
    "uncertainty_of_samples",
]
