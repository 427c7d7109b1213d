"""By what weights are ranked: the smallest score goes first. A criterion is one small function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.choices import choice
from lapkit.pruning.marginals import marginals
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.units import Units

Score = Callable[[Quadratic, Units], Tensor]
ROUNDING = 1e-3  # relative, in which the diagonals of precisions that were summed in single precision agree


@dataclass(frozen=True)
class Criterion:
    """A way to rank units.

    Args:
        score: of each unit, `(U,)`, from the quadratic model and the units; the smallest go first.
        compensates: whether it assumes that the surviving weights make up for the loss.
        removal: for criteria that assume so, the score from `w_Q^T C_QQ^{-1} w_Q`, `log det C_QQ` and what the prior
            says, where C is the covariance given what is gone already; what is removed one after the other is ranked
            by it.
        gain: whether a unit with a negative score is better gone, so that the criterion says itself when to stop.
    """

    score: Score
    compensates: bool = False
    removal: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    gain: bool = False


def magnitude_score(quadratic: Quadratic, units: Units) -> Tensor:
    """`|w_Q|`, the Euclidean norm: the usual baseline, which no curvature enters."""
    return units.total(quadratic.weights[units.members].square()).sqrt()


def obd_score(quadratic: Quadratic, units: Units) -> Tensor:
    """`sum_q H_qq w_q^2 / 2` with the curvature H of the data alone, over the temperature: optimal brain damage.

    Reference:
        LeCun, Denker, Solla, Optimal brain damage, 1990.
    """
    return units.total((quadratic.curvature.diagonal() * quadratic.weights.square())[units.members]) / 2


def opd_score(quadratic: Quadratic, units: Units) -> Tensor:
    """`sum_q P_qq w_q^2` with the posterior precision P: optimal posterior damage, twice OBD of the penalised loss.

    As the prior precision grows it becomes pruning by magnitude.

    Reference:
        Dhahri et al., Shaving weights with Occam's razor, 2024.
    """
    return units.total((quadratic.precision.diagonal() * quadratic.weights.square())[units.members])


def joint_score(quadratic: Quadratic, units: Units) -> Tensor:
    """`w_Q^T P_QQ w_Q / 2`: what the objective rises by if the unit goes and the others stay."""
    if units.single:
        return opd_score(quadratic, units) / 2
    scores = []
    for group in units.groups():
        inside = torch.zeros_like(quadratic.weights)
        inside[group] = quadratic.weights[group]
        scores.append(quadratic.increase(inside))
    return torch.stack(scores)


def obs_removal(square: Tensor, logdet: Tensor, prior: Tensor) -> Tensor:
    """`w_Q^T ([P^{-1}]_QQ)^{-1} w_Q / 2`: what the objective rises by if the others make up for the unit."""
    return square / 2


def evidence_removal(square: Tensor, logdet: Tensor, prior: Tensor) -> Tensor:
    """By how many nats the log evidence falls: what the prior says of zero less what the posterior says of it."""
    return (square + logdet + prior) / 2


def obs_score(quadratic: Quadratic, units: Units) -> Tensor:
    """`w_Q^T ([P^{-1}]_QQ)^{-1} w_Q / 2`: optimal brain surgeon, for groups too.

    Reference:
        Hassibi and Stork, 1992; Dangel, Backpropagation Beyond the Gradient, eq. (3.34c).
    """
    return obs_removal(*_marginals(quadratic, units))


def evidence_score(quadratic: Quadratic, units: Units) -> Tensor:
    """The fall of the log evidence if a unit is fixed to zero, in nats: negative for what is better gone.

        log p(D) - log p(D | w_Q = 0) = [w_Q^T C_QQ^{-1} w_Q + log det(D_Q C_QQ) - m_Q^T D_Q m_Q] / 2

    with the posterior covariance C and the prior `N(m, D^{-1})`: the Savage-Dickey ratio, exact in a linear model with
    Gaussian noise. The prior has to be tuned first: the evidence falls without bound for ever smaller precisions, and
    any weight would be better gone. A precision for each weight, tuned, has taken what there was to gain: nothing is
    negative then, and what is useless is near zero, so that a small positive threshold serves.

    Raises:
        ValueError: if there is no prior, or the structure only approximates it, as "kron" does one for each weight.

    Reference:
        Dickey, The weighted likelihood ratio, 1971; Beckers et al., Principled pruning of Bayesian neural networks
        through variational free energy minimization, 2022.
    """
    check_prior(quadratic)
    return evidence_removal(*_marginals(quadratic, units))


def random_scores(generator: torch.Generator | None = None) -> Criterion:
    """A criterion that ranks units at random.

    Args:
        generator: on the CPU; the only source of randomness.

    Returns:
        The criterion.
    """

    def score(quadratic: Quadratic, units: Units) -> Tensor:
        return torch.rand(len(units), generator=generator, dtype=torch.float64).to(quadratic.weights.device)

    return Criterion(score)


def check_prior(quadratic: Quadratic) -> None:
    """Refuse an evidence without a prior, or with one that the structure of the precision has changed.

    Raises:
        ValueError: if there is none, or it is not what was added to the curvature.
    """
    if not (quadratic.prior_precision > 0).all():
        raise ValueError("This quadratic model has no prior, so no evidence. Give a fitted Laplace, or use 'obs'.")
    exact = quadratic.curvature.diagonal() + quadratic.prior_precision
    if ((quadratic.precision.diagonal() - exact).abs() > ROUNDING * exact).any():
        raise ValueError(
            "This structure ('kron', 'ekfac') only approximates a prior precision for each weight, so that evidences "
            "with and without a weight do not compare: it would prune weights that are worth having. Use 'diag', "
            "'blockdiag', 'full' or 'lowrank', a precision for each tensor (prior_structure='layerwise'), or 'obs'."
        )


def prior_terms(quadratic: Quadratic, units: Units) -> Tensor:
    """`log det D_Q - m_Q^T D_Q m_Q` of each unit."""
    each = quadratic.prior_precision.log() - quadratic.prior_precision * quadratic.prior_mean.square()
    return units.total(each[units.members])


def _marginals(quadratic: Quadratic, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """`w_Q^T C_QQ^{-1} w_Q`, `log det C_QQ` and what the prior says, of each unit."""
    prior, w = prior_terms(quadratic, units), quadratic.weights
    if units.single:
        variance = quadratic.precision.inverse_diagonal()[units.members]
        return w[units.members].square() / variance, variance.log(), prior
    return *marginals(quadratic.precision, units.groups(), w), prior


CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(obs_score, compensates=True, removal=obs_removal),
    "evidence": Criterion(evidence_score, compensates=True, removal=evidence_removal, gain=True),
    "obd": Criterion(obd_score),
    "opd": Criterion(opd_score),
    "joint": Criterion(joint_score),
    "magnitude": Criterion(magnitude_score),
    "random": random_scores(),
}


def criterion_named(criterion: str | Criterion) -> Criterion:
    """A criterion, given as such or by its key.

    Args:
        criterion: a key of `CRITERIA`, or a `Criterion`.

    Returns:
        The criterion.

    Raises:
        ValueError: if the key is unknown.
    """
    return criterion if isinstance(criterion, Criterion) else choice(CRITERIA, criterion, "criterion")
