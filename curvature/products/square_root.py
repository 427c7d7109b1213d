"""The GGN's square root times vectors, `V e` with `V V^T = H`: one backward pass for each, V not formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lapkit.curvature.columns.sampling import Draws, seed_from
from lapkit.curvature.parameters import borrowed
from lapkit.curvature.products.passes import Batch
from lapkit.curvature.products.products import GGNProduct
from lapkit.curvature.products.vectors import pulled_back

Noise = Callable[[Batch, tuple[int, ...]], Tensor]  # of a batch and the shape (K, T) or (K,): (S, N, *shape)


def normal_noise(samples: int, generator: torch.Generator | None = None) -> Noise:
    """Standard normal numbers for each example by its place in the data, whatever the size of batches.

    By its place, not by what it is: an example that occurs twice needs independent numbers.

    Args:
        samples: the number of vectors S.
        generator: of the seed; torch's global one by default.

    Returns:
        From a batch and a shape to `(S, N, *shape)`.
    """
    seed = seed_from(generator)

    def noise(batch: Batch, shape: tuple[int, ...]) -> Tensor:
        start = batch.raw[2]
        draws = Draws(seed, torch.arange(start, start + len(batch.f), device=batch.f.device))
        return torch.stack([draws.normal(s, *shape, dtype=batch.f.dtype) for s in range(samples)])

    return noise


def times_square_root(product: GGNProduct, noise: Noise) -> Tensor:
    """`sum_n J_n^T S_n e_n` with the root `S_n S_n^T` of the loss's second derivative, for S vectors e.

    Args:
        product: whose square root is meant: model, likelihood, data and weights.
        noise: e for each batch, `(S, N, K)` or `(S, N, K, T)`.

    Returns:
        `(S, P)`; of standard normal e, draws of a covariance H.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> product = GGNProduct(model, Gaussian(), [(torch.full((2, 1), 3.0), torch.zeros(2, 1))])
        >>> times_square_root(product, lambda batch, shape: torch.ones(1, 2, *shape))
        tensor([[6.]])
    """
    total: Tensor | None = None
    with borrowed(product.model, product.chosen):
        for batch in product.batches():
            root = product.likelihood.hessian_root(batch.f, batch.y)  # (K, N, *, C)
            e = noise(batch, (len(root), *batch.f.shape[1:-1]))  # (S, N, K, *)
            found = torch.stack([_pulled(product, batch, root, one) for one in e])
            total = found if total is None else total + found
    assert total is not None  # a pass without batches is an error
    return total


def _pulled(product: GGNProduct, batch: Batch, root: Tensor, e: Tensor) -> Tensor:
    """`J^T S e` of one batch and one vector `(N, K, *)`."""
    cotangent = (root * e.to(root).movedim(1, 0)[..., None]).sum(0)  # (N, *, C)
    if batch.weights is not None:
        cotangent = cotangent * batch.weights.sqrt().reshape(-1, *[1] * (cotangent.ndim - 1))
    parts = pulled_back([batch.output], product.chosen.tensors, [cotangent])
    return torch.cat([part.reshape(-1) for part in parts]).to(product.dtype)
