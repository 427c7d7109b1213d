"""The Laplace bridge: a Dirichlet over class probabilities for a Gaussian over logits.

In the basis of logits the Dirichlet with concentrations a has its mode at `m_c = log a_c - mean(log a)` and there the
inverse curvature `V_cc = (1 - 2/C) / a_c + sum_l 1 / a_l / C^2`. The bridge inverts this map. It is fast and gives a
distribution over probabilities, not only their mean, but it is a crude approximation of `E[softmax(f)]`:

- Plain, it is no better than ignoring V. For two classes its mean is softmax(m), whatever V is.
- Normalised, it is made for wide V (variances of ten, say) and is the sharper the narrower V is: below variances of
  about `sqrt(C / 2)` it is more confident than the network itself.
- Both depend on what all logits have in common, which a softmax does not see: the Gaussian is first conditioned on
  `sum_c f_c = 0`, as the Dirichlet's logits sum to zero.

For probabilities alone prefer `mean_field`, `probit_centered` or quasi-Monte Carlo.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from lapkit.curvature.callers import callers_level
from lapkit.posteriors.checks import check_classes, check_gaussian

SHARPER = 10  # times the logits, from which on normalising is worth a warning
ROUNDING = 8  # a variance below so many units in the last place, for each class, of its terms is none


def laplace_bridge(mean: Tensor, covariance: Tensor, *, normalise: bool = False) -> Dirichlet:
    """The Dirichlet whose mode and curvature in the basis of logits are those of `N(m, V)`.

    Conditioned on a sum of zero, `m -= V 1 (1^T m) / (1^T V 1)` and `V -= V 1 1^T V / (1^T V 1)`; then

        a_c = (1 - 2/C + exp(m_c) sum_l exp(-m_l) / C^2) / V_cc.

    The peer laplace-torch 0.3 computes the same, but answers [1, ..., 1], which is no distribution, where this is 0 / 0
    or overflows, and class c for certain where only `V_cc` is zero. Here large logits are right; logits without any
    variance give the limit, a Dirichlet concentrated at softmax(m); logits whose sum is certain need no conditioning;
    and where the bridge does not exist, it is refused.

    Args:
        mean: m, `(..., C)`.
        covariance: V, `(..., C, C)`.
        normalise: divide m by `sqrt(c)` and V by c first, `c = mean_c V_cc / sqrt(C / 2)`; warns where that makes
            logits more than ten times as large.

    Returns:
        A distribution of batch shape `(...)` over C classes. Total concentrations beyond what rounding can tell from a
        point are cut there, with the mean kept.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits, or some but not all logits have no variance given
            that they sum to zero.

    Example:
        >>> import torch
        >>> laplace_bridge(torch.tensor([1.0, 0.0, -1.0]), torch.eye(3)).concentration
        tensor([2.3512, 1.1810, 0.7505])

    Reference:
        MacKay, Choice of basis for Laplace approximation, 1998; Hobbhahn, Kristiadi, Hennig, Fast predictive
        uncertainty for classification with Bayesian deep networks, 2022.
    """
    log_concentration = _log_concentration(mean, covariance, normalise)
    numbers = torch.finfo(mean.dtype)
    ceiling = -2 * math.log(numbers.eps)
    excess = (log_concentration.logsumexp(-1, keepdim=True) - ceiling).clamp_min(0)
    return Dirichlet((log_concentration - excess).exp().clamp_min(numbers.tiny))


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """The mean of the Laplace bridge, `a_c / sum_l a_l`; see `laplace_bridge`, also for how crude it is.

    Args:
        mean: `(..., C)`.
        covariance: `(..., C, C)`.

    Returns:
        Probabilities `(..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits, or the bridge does not exist.
    """
    return _log_concentration(mean, covariance, normalise=False).softmax(-1)


def bridge_norm(mean: Tensor, covariance: Tensor) -> Tensor:
    """The mean of the normalised Laplace bridge; see `laplace_bridge`.

    The narrower the Gaussian, the larger are the logits after normalising: as V goes to zero, it does not go to the
    softmax of the mean but to certainty, and probabilities underflow to zero, with an infinite negative log-likelihood
    where that is a label's. It warns of logits that become more than ten times as large.

    Args:
        mean: `(..., C)`.
        covariance: `(..., C, C)`.

    Returns:
        Probabilities `(..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian over at least two logits, or the bridge does not exist.
    """
    return _log_concentration(mean, covariance, normalise=True).softmax(-1)


def _log_concentration(mean: Tensor, covariance: Tensor, normalise: bool) -> Tensor:
    """Logarithms, `(..., C)`, in which no logit overflows."""
    check_gaussian(mean, covariance)
    check_classes(mean)
    classes = mean.shape[-1]
    m, variance = _given_zero_sum(mean, covariance)
    certain = (covariance == 0).all(-1).all(-1)[..., None]
    variance = torch.where(certain, 1.0, variance)
    if normalise:
        c = variance.mean(-1, keepdim=True) / math.sqrt(classes / 2)
        if (c.masked_fill(certain, 1.0) * SHARPER**2 < 1).any():
            warnings.warn(
                f"The normalised Laplace bridge makes some logits more than {SHARPER} times as large, because their "
                "variances are far below sqrt(C / 2), which it is made for: its probabilities are far more confident "
                "than the network's. Use another link: 'probit_centered', 'mean_field' or 'qmc'.",
                stacklevel=callers_level(),
            )
        m, variance = m / c.sqrt(), variance / c
    log_a = m + (-m).logsumexp(-1, keepdim=True) - 2 * math.log(classes)
    if classes > 2:
        log_a = torch.logaddexp(log_a, log_a.new_tensor(math.log(1 - 2 / classes)))
    point = mean.log_softmax(-1) - 2 * math.log(torch.finfo(mean.dtype).eps)
    return torch.where(certain, point, log_a - variance.log())


def _given_zero_sum(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances `(..., C)` of the logits given that they sum to zero.

    Raises:
        ValueError: if the sum determines some logit that is not certain anyway.
    """
    classes = mean.shape[-1]
    rounding = ROUNDING * classes * torch.finfo(mean.dtype).eps
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    with_sum = covariance.sum(-1)  # V 1, the covariance of each logit with the sum
    of_sum = with_sum.sum(-1, keepdim=True)
    fixed = of_sum <= rounding * classes * variance.sum(-1, keepdim=True)
    of_sum = torch.where(fixed, 1.0, of_sum)
    share = torch.where(fixed, 0.0, with_sum / of_sum)  # what is left of the sum there is a level, which cancels
    left = torch.where(fixed, variance, variance - with_sum.square() / of_sum)
    lost = (left <= rounding * variance.amax(-1, keepdim=True)) & (covariance != 0).any(-1).any(-1)[..., None]
    if lost.any():
        place = lost.nonzero()[0].tolist()
        raise ValueError(
            f"The Laplace bridge does not exist for input {place[0] if len(place) > 1 else 0}: given that the logits "
            f"sum to zero, logit {place[-1]} has no variance, and a Dirichlet is never certain of one class only. Use "
            "another link: 'probit_centered', 'mean_field' or 'qmc'."
        )
    return mean - share * mean.sum(-1, keepdim=True), left
