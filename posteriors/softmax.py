"""Closed forms for the class probabilities `E[softmax(f)]` of Gaussian logits `f ~ N(m, V)`.

None is exact. Mean total variation distances from the truth over random m of variance 4, for three kinds of V: all
variances 1 and independent; full, of mean variance 1; full, of mean variance 0.3, beside a common noise of variance 10,
which a softmax does not see:

| V           | C   | none | probit | probit_centered | mean_field | bridge | bridge_norm |
|-------------|-----|------|--------|-----------------|------------|--------|-------------|
| independent | 2   | .040 | .017   | .003            | .003       | .040   | .083        |
|             | 3   | .052 | .019   | .008            | .009       | .038   | .065        |
|             | 10  | .066 | .015   | .015            | .048       | .149   | .191        |
|             | 100 | .043 | .062   | .062            | .130       | .417   | .530        |
| full        | 2   | .032 | .028   | .002            | .002       | .184   | .253        |
|             | 3   | .048 | .033   | .024            | .015       | .305   | .285        |
|             | 10  | .072 | .059   | .061            | .054       | .281   | .303        |
| common      | 3   | .018 | .152   | .010            | .006       | .196   | .181        |
|             | 10  | .025 | .267   | .024            | .021       | .234   | .327        |
"""

from __future__ import annotations

import math

from torch import Tensor

from lapkit.curvature.likelihoods.classification import probit_scaled
from lapkit.posteriors.checks import check_classes, check_gaussian


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """MacKay's formula class by class, `softmax(m / sqrt(1 + pi diag(V) / 8))`.

    Logits count as independent: noise that they have in common, which a softmax does not see, flattens the
    probabilities too.

    Args:
        mean: m, `(..., C)`.
        covariance: V, `(..., C, C)`.

    Returns:
        Probabilities `(..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits.

    Reference:
        MacKay, The evidence framework applied to classification networks, 1992, eq. (10); for several classes Gibbs,
        Bayesian Gaussian processes for regression and classification, 1997.
    """
    check_gaussian(mean, covariance)
    check_classes(mean)
    return probit_scaled(mean, covariance).softmax(-1)


def probit_centered(mean: Tensor, covariance: Tensor) -> Tensor:
    """MacKay's formula for each logit against the mean of the others.

    `softmax(H m / sqrt(1 + pi/8 (C / (C - 1))^2 diag(H V H)))` with `H = I - 1 1^T / C`: noise that all logits have in
    common, which a softmax does not see, is projected out. `C / (C - 1) (H f)_c = f_c - mean of the others` is a
    margin, so that two classes are exactly MacKay's formula for the difference of their logits.

    Args:
        mean: m, `(..., C)`.
        covariance: V, `(..., C, C)`.

    Returns:
        Probabilities `(..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits.
    """
    check_gaussian(mean, covariance)
    check_classes(mean)
    classes = mean.shape[-1]
    half = covariance - covariance.mean(-1, keepdim=True)
    centered = half - half.mean(-2, keepdim=True)  # H V H
    margins = (classes / (classes - 1)) ** 2 * centered
    return probit_scaled(mean - mean.mean(-1, keepdim=True), margins).softmax(-1)


def mean_field(mean: Tensor, covariance: Tensor) -> Tensor:
    """Every pair of classes by MacKay's formula, `p_c ~ 1 / sum_i exp(-(m_c - m_i) / sqrt(1 + pi s_ci / 8))`.

    `s_ci = V_cc + V_ii - 2 V_ci` is the variance of the difference. The formula replaces each sigmoid in

        softmax(f)_c = 1 / (2 - C + sum_{i != c} 1 / sigmoid(f_c - f_i))

    by its approximate mean; the results are then scaled to a sum of one. All of V enters, noise in common cancels, and
    two classes are exactly MacKay's formula for the difference of their logits.

    Args:
        mean: m, `(..., C)`.
        covariance: V, `(..., C, C)`.

    Returns:
        Probabilities `(..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits.

    Reference:
        Daunizeau, Semi-analytical approximations to statistical moments of sigmoid and softmax mappings of normal
        variables, 2017; Lu, Ie, Sha, Mean-field approximation to Gaussian-softmax integral, 2020.
    """
    check_gaussian(mean, covariance)
    check_classes(mean)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = (variance[..., :, None] + variance[..., None, :] - 2 * covariance).clamp_min(0)  # (..., C, C)
    gaps = (mean[..., None, :] - mean[..., :, None]) / (1 + math.pi / 8 * spread).sqrt()
    return (-gaps.logsumexp(-1)).softmax(-1)
