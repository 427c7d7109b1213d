"""Lower bounds on the log evidence from mini-batches."""

from __future__ import annotations

from torch import Tensor

from lapkit.curvature import BlockDiagonal, Kronecker, KroneckerProduct
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.posteriors.evidence import log_det_ratio
from lapkit.posteriors.fit import Fit
from lapkit.posteriors.priors import GaussianPrior


def evidence_lower_bound(
    batch: Fit, likelihood: Likelihood, prior: GaussianPrior, examples: float, temperature: float = 1.0
) -> Tensor:
    """`(N / M) [log p(B|w) - log det(I + P0^{-1} H_B) / 2] - (w - m)^T P0 (w - m) / 2` of a batch B.

    For a batch of M of N examples. A draw of it costs one batch, and its mean over the batches of a partition into
    equal parts, or over batches drawn at random, is not above `log_evidence` of all examples; it is equal for the batch
    of all. For `log det(I + A + B) <= log det(I + A) + log det(I + B)` (Fischer's inequality, for matrices over the
    data). Note where `N / M` stands: inside the logarithm it would make an upper bound, by Jensen's inequality.

    Args:
        batch: the fit of a batch alone, `laplace.fit([batch]).fitted`, with a structure in which the curvatures of
            batches add up: diagonal, block-diagonal, dense, or low-rank with all its columns.
        likelihood: with its noise, if it has one.
        prior: over the weights.
        examples: N, or the sum of the weights of all examples.
        temperature: of the likelihood.

    Returns:
        A number, differentiable in prior precision, noise and temperature. To tune them, climb its mean over batches.

    Raises:
        TypeError: if the curvatures of batches do not add up, as those of Kronecker structures do not.
        ValueError: if the batch has no examples, or more than there are.

    Reference:
        Immer et al., Stochastic marginal likelihood gradients using neural tangent kernels, 2023.
    """
    if not 0 < batch.count <= examples:
        raise ValueError(f"A batch of {batch.count:g} examples was given, of {examples:g} in all.")
    _check_additive(batch)
    times = examples / batch.count
    ratio = log_det_ratio(batch, likelihood, prior, temperature)
    scatter = prior.scatter(batch.parameters, batch.mean)
    return times * (batch.log_likelihood(likelihood, temperature) - ratio / 2) - scatter / 2


def _check_additive(batch: Fit) -> None:
    """The inequality is one about sums of curvatures.

    Raises:
        TypeError: if the curvature has Kronecker blocks.
    """
    curvature = batch.curvature
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    if any(isinstance(block, Kronecker | KroneckerProduct) for block in blocks):
        raise TypeError(
            "Kronecker factors of batches do not add up to those of all examples, so that nothing bounds the evidence. "
            "Fit the batch with hessian_structure 'diag', 'blockdiag', 'full' or 'lowrank'."
        )
