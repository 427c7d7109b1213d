"""Points that fill a Gaussian evenly (quasi-Monte Carlo), and the roots that carry them to a covariance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from lapkit.posteriors.checks import check_gaussian

HALF_BIT = 2.0**-31  # Sobol points are multiples of 2^-30; so moved, they lie strictly between 0 and 1


def sobol_normal(n_samples: int, dimension: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal points by quantiles of a scrambled Sobol sequence.

    Each point by itself is standard normal; together they are more even than independent draws, so that the mean of a
    smooth function errs by nearly `1 / S` instead of `1 / sqrt(S)`. Best are powers of two.

    Args:
        n_samples: S.
        dimension: C.
        generator: the only source of randomness, of the scrambling.

    Returns:
        `(S, C)`, float64, on the CPU.

    Raises:
        ValueError: if there is not at least one sample, or the dimension is beyond what Sobol sequences are tabulated
            for.

    Reference:
        Owen, Scrambling Sobol' and Niederreiter-Xing points, 1998.
    """
    if n_samples < 1:
        raise ValueError(f"A mean needs at least one sample, got n_samples={n_samples}.")
    if not 0 < dimension <= SobolEngine.MAXDIM:
        raise ValueError(
            f"Sobol sequences are known for 1 to {SobolEngine.MAXDIM} outputs, got {dimension}. Use the link 'mc'."
        )
    device = None if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    points = SobolEngine(dimension, scramble=True, seed=seed).draw(n_samples, dtype=torch.float64)
    return torch.special.ndtri(points + HALF_BIT)


def spread(mean: Tensor, covariance: Tensor, points: Tensor) -> Tensor:
    """Outputs `mean + root z`, for the same standard normal points z at all inputs.

    Good for expectations of each input; outputs of different inputs are not independent.

    Args:
        mean: `(..., C)`.
        covariance: `(..., C, C)`; singular ones are welcome, but have no derivative.
        points: z, `(S, C)`.

    Returns:
        `(S, ..., C)`.

    Raises:
        TypeError: if the numbers are not floating.
        ValueError: if this is no Gaussian.
    """
    check_gaussian(mean, covariance)
    return mean + torch.einsum("...cd,sd->s...c", covariance_root(covariance), points.to(mean))


def covariance_root(covariance: Tensor) -> Tensor:
    """`B` with `B B^T = V`, matrix by matrix: Cholesky, or eigenvectors where it is singular (a dead unit).

    Args:
        covariance: V, `(..., C, C)`.

    Returns:
        `(..., C, C)`.

    Raises:
        ValueError: if an eigenvalue is negative beyond rounding.
    """
    with torch.no_grad():
        singular = torch.linalg.cholesky_ex(covariance)[1] > 0
    if not singular.any():
        return torch.linalg.cholesky(covariance)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    root = torch.linalg.cholesky(torch.where(singular[..., None, None], eye, covariance))
    return root.masked_scatter(singular[..., None, None], _eigen_root(covariance[singular]))


def _eigen_root(covariance: Tensor) -> Tensor:
    """`Q sqrt(values)`, `(B, C, C)`.

    Raises:
        ValueError: if an eigenvalue is negative beyond rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    rounding = torch.finfo(values.dtype).eps ** 0.5 * values.abs().amax(-1, keepdim=True)
    if (values < -rounding).any():
        raise ValueError(f"A covariance is indefinite: it has an eigenvalue {float(values.min()):.3g}.")
    return vectors * values.clamp_min(0).sqrt()[..., None, :]
