"""How far a proportion of n examples scatters: the band of a known one, the interval of an unknown one."""

from __future__ import annotations

import torch
from torch import Tensor


def check_level(level: float) -> float:
    """The probability of a band or an interval, if it is one.

    Args:
        level: in (0, 1).

    Returns:
        The level.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a probability between 0 and 1, such as 0.95.")
    return level


def binomial_band(count: Tensor, mean: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Where the proportion of n draws of probability p lies: quantiles of `Binomial(n, p) / n`.

    Args:
        count: `(M,)` n.
        mean: `(M,)` p.
        level: the probability of the band, at least, half of the rest on each side.

    Returns:
        Lower and upper end, `(M,)` each, float64; NaN where there are no draws.
    """
    # Half a second of imports, for bands alone.
    from scipy.stats import binom

    tail = (1 - check_level(level)) / 2
    n, p = count.cpu().numpy(), mean.clamp(0, 1).cpu().numpy()
    return _ends(count, binom.ppf(tail, n, p), binom.isf(tail, n, p), count)


def proportion_interval(count: Tensor, hits: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Confidence interval for the probability of which `hits` of `count` came true.

    Args:
        count: `(M,)` n.
        hits: `(M,)` k, whole numbers up to rounding, or mean numbers where ties were shared.
        level: the confidence level, at least.

    Returns:
        Lower and upper end, `(M,)` each, float64; NaN where there are no examples.

    Reference:
        Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial.
    """
    # Half a second of imports, for intervals alone.
    from scipy.stats import beta

    tail = (1 - check_level(level)) / 2
    n, k = count.to(torch.float64).cpu(), hits.to(torch.float64).cpu()
    # A beta distribution with a parameter of zero is all at an end; rounding must not take one below zero.
    some, missed = k.clamp_min(torch.finfo(k.dtype).tiny), (n - k).clamp_min(torch.finfo(k.dtype).tiny)
    lower = torch.from_numpy(beta.ppf(tail, some.numpy(), (n - k + 1).numpy())).where(k > 0, 0.0)
    upper = torch.from_numpy(beta.isf(tail, (k + 1).numpy(), missed.numpy())).where(k < n, 1.0)
    return _ends(count, lower.numpy(), upper.numpy(), torch.ones_like(count))


def _ends(count: Tensor, lower: object, upper: object, scale: Tensor) -> tuple[Tensor, Tensor]:
    ends = (torch.as_tensor(end, dtype=torch.float64).to(count.device) / scale for end in (lower, upper))
    low, high = (end.where(count > 0, torch.nan) for end in ends)
    return low, high
