"""Draws from a posterior without its Jacobian or any matrix of it: prior draws, corrected by what the data say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.hessian.hbp_step import conjugate_gradients
from lapkit.curvature.operators.woodbury import Woodbury
from lapkit.curvature.products.products import GGNProduct
from lapkit.curvature.products.pushforward import pushforward
from lapkit.curvature.products.square_root import Noise, normal_noise, times_square_root
from lapkit.posteriors.gaussian import GaussianPosterior


def matheron_samples(
    posterior: GaussianPosterior, n_samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Draws `mean + t0 + P0^{-1} V (I + V^T P0^{-1} V)^{-1} (e - V^T t0)`, with `t0 ~ N(0, P0^{-1})`, `e ~ N(0, I)`.

    Args:
        posterior: whose precision is `V V^T + P0`: a `LowRank` or `Factored`.
        n_samples: how many, S.
        generator: the only source of randomness.

    Returns:
        `(S, P)`.

    Raises:
        TypeError: if the precision is another operator.

    Reference:
        Wilson et al., Efficiently sampling functions from Gaussian process posteriors, 2020, eq. (13).
    """
    precision = posterior.precision
    if not isinstance(precision, Woodbury):
        raise TypeError(
            f"Matheron's rule needs a precision V V^T + diag, LowRank or Factored, got {type(precision).__name__}. Fit "
            "with hessian_structure='lowrank', or take posterior.sample, which every structure has."
        )
    like = posterior.mean
    draws = _normal((precision.size, n_samples), like, generator)
    noise = _normal((precision.rank, n_samples), like, generator)
    prior = precision.prior_root()[:, None].to(like) * draws
    return posterior.mean + precision.conditioned(prior, noise).T


def sample_then_optimize(
    product: GGNProduct,
    prior_precision: Tensor | float,
    n_samples: int = 1,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Tensor:
    """Draws of `N(0, (scale H + diag(prior precision))^{-1})` by one linear system for each; nothing of size P x R.

    `(scale H + P0) t = scale^{1/2} V e + P0^{1/2} e0` with `V V^T = H`: the right-hand side has the covariance of the
    matrix on the left, so t has that of its inverse. `V e` is one backward pass, a step of conjugate gradients one
    product with H. Data of any size will do, and weights of any number.

    Args:
        product: H, with model and data.
        prior_precision: P0, a number or `(P,)`, positive.
        n_samples: how many, S.
        scale: of H: the likelihood's precision divided by the temperature.
        generator: the only source of randomness.
        tolerance: of the residual, relative to the right-hand side; the draws' relative error is at most this times the
            root of the condition number of `I + scale P0^{-1/2} H P0^{-1/2}`, and mostly far smaller.
        max_iterations: of conjugate gradients, which in exact arithmetic need at most one more than the rank of H.

    Returns:
        Deviations from the mean, `(S, P)`.

    Raises:
        ValueError: if the prior precision is not positive or has a wrong shape, or the scale is not positive.
        RuntimeError: if the residual is still too large after the last iteration.

    Reference:
        Antoran et al., Sampling-based inference for large linear models, with application to linearised Laplace, 2023,
        section 3.
    """
    like = torch.empty(0, dtype=product.dtype, device=product.device)
    noise = normal_noise(n_samples, generator)
    prior_noise = _normal((n_samples, product.size), like, generator)
    return optimized(product, prior_precision, noise, prior_noise, scale, tolerance, max_iterations)


def optimized(
    product: GGNProduct,
    prior_precision: Tensor | float,
    noise: Noise,
    prior_noise: Tensor,
    scale: float,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """The linear map of `sample_then_optimize`, from given noise of the data and of the prior `(S, P)` to `(S, P)`.

    Raises:
        ValueError: if the prior precision is not positive or has a wrong shape, or the scale is not positive.
        RuntimeError: if the residual is still too large after the last iteration.
    """
    precision = torch.as_tensor(prior_precision, dtype=product.dtype, device=product.device)
    if precision.shape not in ((), (product.size,)) or not (precision > 0).all() or not scale > 0:
        raise ValueError(
            f"Expected a positive prior precision () or ({product.size},) and a positive scale, got shape "
            f"{tuple(precision.shape)}, smallest {precision.min():g}, and scale {scale:g}."
        )
    root = precision.rsqrt().expand(product.size)  # in its units the prior is standard, and the system well conditioned
    right = scale**0.5 * root * times_square_root(product, noise) + prior_noise

    def matmul(flat: Tensor) -> Tensor:
        rows = flat.view_as(right)
        return (rows + scale * root * product.matmul((root * rows).T).T).reshape(-1)

    found = conjugate_gradients(
        matmul, right.reshape(-1), [product.size] * len(right), tolerance=tolerance, max_iterations=max_iterations
    )
    if not (found.residuals <= tolerance).all():
        raise RuntimeError(
            f"Conjugate gradients reached a residual of {float(found.residuals.max()):.1e} after {max_iterations} "
            f"steps, not {tolerance:g}. Allow more by max_iterations, a larger tolerance, or a larger prior precision."
        )
    return root * found.vector.view_as(right)


def function_samples(engine: Engine, x: Any, deviations: Tensor) -> Tensor:
    """Draws of whole functions `f(x) + J(x) (w - w*)`: inputs share the weights, so they vary together.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs.
        deviations: `w - w*` of S draws, `(S, P)`.

    Returns:
        `(S, N, *, C)`.
    """
    f, moved = pushforward(engine, x, deviations)
    return f + moved


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
