"""How uncertain classes are, and the parts of that from samples of their probabilities.

Samples are those of a posterior, or the members of an ensemble; what they agree on is aleatoric, what they differ in
epistemic. A single predictive has no epistemic part to be found: these functions ask for the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_probabilities, as_tensor


def entropy(probabilities: Array) -> Tensor:
    """Entropy of each example's class probabilities, in nats.

        H_n = -sum_k p_nk log p_nk,    0 log 0 = 0

    Of a posterior mean of probabilities it is the total uncertainty, aleatoric and epistemic together.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.

    Returns:
        The entropies `(N,)` in nats, between 0 and log C, float64.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931], dtype=torch.float64)

    Reference:
        C. E. Shannon (1948), A mathematical theory of communication, section 6.
    """
    return torch.special.entr(as_probabilities(probabilities)).sum(dim=1)


@final
@dataclass(frozen=True, eq=False)
class UncertaintySplit:
    """Total uncertainty of each example and its two parts, `total = aleatoric + epistemic`.

    Attributes:
        total: `(N,)` of the mean of the samples.
        aleatoric: `(N,)` the mean over the samples.
        epistemic: `(N,)` the difference, never negative.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def entropy_split(samples: Array) -> UncertaintySplit:
    """Entropies in nats: of the mean, expected, and the mutual information of class and sample.

        H[E p] = E H[p] + E KL(p || E p)

    With S samples the epistemic part is at most log S, and too small by about 1/S of itself. It is bounded by the
    total, so that it is no measure of ignorance by itself.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        samples: `(S, N, C)` class probabilities.

    Returns:
        The parts `(N,)`, float64.

    Example:
        >>> split = entropy_split(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> split.total.item(), split.aleatoric.item(), split.epistemic.item()
        (0.6931, 0.0, 0.6931)

    Reference:
        Depeweg et al. (2018), Decomposition of uncertainty in Bayesian deep learning, equation 3; Houlsby et al.
        (2011), Bayesian active learning for classification and preference learning; Wimmer et al. (2023), Quantifying
        aleatoric and epistemic uncertainty in machine learning (its limits).
    """
    p = as_samples(samples)
    mean = p.mean(dim=0)
    aleatoric = torch.special.entr(p).sum(dim=-1).mean(dim=0)
    # As a mean of divergences, not a difference of entropies: small ones keep their digits.
    epistemic = (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(dim=-1).mean(dim=0).clamp(min=0)
    return UncertaintySplit(aleatoric + epistemic, aleatoric, epistemic)


def variance_split(samples: Array) -> UncertaintySplit:
    """Variances of the one-hot label, summed over classes: of the mean, expected, and of the samples.

        sum_k pbar_k (1 - pbar_k) = E sum_k p_k (1 - p_k) + sum_k Var p_k

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        samples: `(S, N, C)` class probabilities.

    Returns:
        The parts `(N,)` in [0, 1], float64; the variance divides by S.

    Reference:
        Kendall and Gal (2017), What uncertainties do we need; Sale et al. (2024), Label-wise aleatoric and epistemic
        uncertainty quantification.
    """
    p = as_samples(samples)
    aleatoric = (p * (1 - p)).sum(dim=-1).mean(dim=0)
    epistemic = p.var(dim=0, correction=0).sum(dim=-1)
    return UncertaintySplit(aleatoric + epistemic, aleatoric, epistemic)


def expected_pairwise_kl(samples: Array) -> Tensor:
    """The mean divergence between two samples, `1/S^2 sum_st KL(p_s || p_t)`, in nats.

    An epistemic uncertainty that is not bounded by the total: mutual information and reverse mutual information
    together. A sample is compared with itself as well.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        samples: `(S, N, C)` class probabilities.

    Returns:
        `(N,)` float64; inf where a class is impossible in one sample and possible in another.

    Reference:
        Malinin and Gales (2021), Uncertainty estimation in autoregressive structured prediction, equation 4;
        Schweighofer et al. (2023), Introducing an improved information-theoretic measure of predictive uncertainty.
    """
    p = as_samples(samples)
    # The mean over t of -log p_t is taken first: S terms, not S^2. Zero times infinity is zero where no sample
    # thinks the class possible.
    surprise = torch.where((p > 0).any(dim=0), -p.log().mean(dim=0), 0.0)
    mean = p.mean(dim=0)
    cross = torch.where(mean > 0, mean * surprise, 0.0).sum(dim=-1)
    return (cross - torch.special.entr(p).sum(dim=-1).mean(dim=0)).clamp(min=0)


def disagreement_with_mean(samples: Array) -> Tensor:
    """Variation ratio about the class of the mean: the share of samples that predict another class than their mean.

        1 - 1/S sum_s 1[argmax_k p_sk = argmax_k pbar_k]

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        samples: `(S, N, C)` class probabilities.

    Returns:
        `(N,)` in [0, 1), float64.
    """
    p = as_samples(samples)
    agree = p.argmax(dim=-1) == p.mean(dim=0).argmax(dim=-1)
    return 1 - agree.to(torch.float64).mean(dim=0)


def variation_ratio(samples: Array) -> Tensor:
    """Variation ratio about the vote: the share of samples that do not predict the class most of them do.

        1 - max_k 1/S sum_s 1[argmax_j p_sj = k]

    `disagreement_with_mean`, the other definition in use, is never less. A wrong dtype raises TypeError, a wrong shape
    or value ValueError.

    Args:
        samples: `(S, N, C)` class probabilities.

    Returns:
        `(N,)` in [0, 1), float64.

    Reference:
        Freeman (1965), Elementary applied statistics; Gal (2016), Uncertainty in deep learning, equation 3.19.
    """
    p = as_samples(samples)
    votes = torch.nn.functional.one_hot(p.argmax(dim=-1), p.shape[-1])
    return 1 - votes.to(torch.float64).mean(dim=0).amax(dim=-1)


def as_samples(samples: Array) -> Tensor:
    """Checked samples of class probabilities as `(S, N, C)` float64.

    Args:
        samples: `(S, N, C)`, S > 0, N > 0.

    Returns:
        The samples, on their device, detached.

    Raises:
        ValueError: the shape is another, or they are no probabilities.
    """
    given = as_tensor(samples)
    if given.ndim != 3 or given.shape[-1] < 2:
        raise ValueError(
            f"shape of samples is {tuple(given.shape)}, expected (S, N, C): samples, examples, classes. For yes or no "
            "stack 1 - p and p as the last axis."
        )
    rows = as_probabilities(given.reshape(math.prod(given.shape[:2]), given.shape[2]))
    return rows.reshape(given.shape)
