"""Traces, diagonals and norms of matrices that can only be multiplied by: random probes in, mean and error out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """What estimators, eigensolvers and views need of a symmetric matrix; `SymmetricOperator` has it all."""

    @property
    def size(self) -> int:
        """The number of rows P."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors it takes."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""

    def matmul(self, vectors: Tensor, /) -> Tensor:
        """`A v` for one vector `(P,)` or several `(P, R)`."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A random estimate and how far it is from the truth, typically.

    Args:
        value: unbiased unless its maker says otherwise.
        standard_error: the estimated standard deviation of `value`, of the same shape.
        products: how many vectors the matrix was multiplied by.
    """

    value: Tensor
    standard_error: Tensor
    products: int


Probes = Callable[[Matrix, int, torch.Generator | None], Tensor]


def rademacher(matrix: Matrix, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Signs `(P, count)`, drawn on the generator's device: of all probes those with the least variance of the trace."""
    device = matrix.device if generator is None else generator.device
    bits = torch.randint(2, (count, matrix.size), generator=generator, device=device)
    return (2 * bits - 1).T.to(matrix.device, matrix.dtype)


def gaussian(matrix: Matrix, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers `(P, count)`: probes whose distribution does not depend on the basis."""
    device = matrix.device if generator is None else generator.device
    shape = (count, matrix.size)
    return torch.randn(shape, generator=generator, device=device, dtype=matrix.dtype).T.to(matrix.device)


def hutchinson_trace(
    matrix: Matrix,
    probes: int = 32,
    *,
    draw: Probes = rademacher,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """`tr A = E[z^T A z]`, averaged over random z.

    Args:
        matrix: anything with products.
        probes: the number of vectors z, at least two.
        draw: makes them, `rademacher` or `gaussian`.
        chunk: how many at a time; all by default.
        generator: of the probes.

    Returns:
        The mean and its error. One product with signs has variance `2 (|A|_F^2 - |diag A|^2)`, with normal numbers
        `2 |A|_F^2`.

    Raises:
        ValueError: if there are fewer than two probes.

    Reference:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
    """
    pairs = _pairs(matrix, probes, draw, chunk, generator)
    return _mean(torch.cat([(z * az).sum(0) for z, az in pairs]), probes)


def squared_norm(
    matrix: Matrix,
    probes: int = 32,
    *,
    draw: Probes = rademacher,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The squared Frobenius norm `|A|_F^2 = E[|A z|^2]`; arguments as for `hutchinson_trace`.

    Raises:
        ValueError: if there are fewer than two probes.
    """
    pairs = _pairs(matrix, probes, draw, chunk, generator)
    return _mean(torch.cat([az.square().sum(0) for _, az in pairs]), probes)


def hutchpp_trace(
    matrix: Matrix,
    products: int = 48,
    *,
    draw: Probes = rademacher,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The trace, exact on a random subspace that holds the largest eigenvectors, Hutchinson's estimate on the rest.

    With Q an orthonormal basis of `A S` and `R = I - Q Q^T`, `tr A = tr Q^T A Q + E[(R z)^T A (R z)]`.

    Args:
        matrix: anything with products.
        products: how many vectors to multiply by: a third each for the subspace, its trace and the rest; at least six.
        draw: makes the random vectors.
        chunk: how many vectors of the rest at a time.
        generator: of the random vectors.

    Returns:
        The estimate; exact, with an error of zero up to rounding, for a matrix of rank `products // 3` at most.

    Raises:
        ValueError: if there are fewer than six products.

    Reference:
        Meyer, Musco, Musco and Woodruff, Hutch++: Optimal stochastic trace estimation, 2021, algorithm 1.
    """
    basis, image, left = _subspace(matrix, products, draw, generator)

    def rest(matrix: Matrix, count: int, generator: torch.Generator | None) -> Tensor:
        z = draw(matrix, count, generator)
        return z - basis @ (basis.T @ z)

    samples = torch.cat([(z * az).sum(0) for z, az in _pairs(matrix, left, rest, chunk, generator)])
    estimate = _mean(samples, products)
    return Estimate(estimate.value + (basis * image).sum(), estimate.standard_error, products)


def hutchinson_diagonal(
    matrix: Matrix,
    probes: int = 32,
    *,
    draw: Probes = rademacher,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The diagonal as `sum z * A z / sum z * z` over random z, entry by entry; arguments as for `hutchinson_trace`.

    Returns:
        `(P,)`. One product with signs has the variance `sum_(j != i) A_ij^2`. Unbiased for signs, in the limit of many
        probes for others.

    Raises:
        ValueError: if there are fewer than two probes.

    Reference:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007.
    """
    return _ratio(_pairs(matrix, probes, draw, chunk, generator), probes, probes)


def diagpp_diagonal(
    matrix: Matrix,
    products: int = 48,
    *,
    draw: Probes = rademacher,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The diagonal, exact for the part `Q Q^T A` on a random subspace, estimated for the rest; as `hutchpp_trace`.

    Returns:
        `(P,)`; exact for a matrix of rank `products // 3` at most.

    Raises:
        ValueError: if there are fewer than six products.

    Reference:
        Baston and Nakatsukasa, Stochastic diagonal estimation: probabilistic bounds and an improved algorithm, 2022.
    """
    basis, image, left = _subspace(matrix, products, draw, generator)
    pairs = ((z, az - basis @ (basis.T @ az)) for z, az in _pairs(matrix, left, draw, chunk, generator))
    estimate = _ratio(pairs, left, products)
    return Estimate(estimate.value + (basis * image).sum(1), estimate.standard_error, products)


def _pairs(
    matrix: Matrix, probes: int, draw: Probes, chunk: int | None, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Probes and their products, `(P, chunk)` each.

    Raises:
        ValueError: if no error can be told from so few probes, or chunks are empty.
    """
    if probes < 2 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"Got {probes} probes in chunks of {chunk}: a standard error needs two probes at least, a chunk one."
        )
    chunk = probes if chunk is None else chunk
    for start in range(0, probes, chunk):
        z = draw(matrix, min(chunk, probes - start), generator)
        yield z, matrix.matmul(z)


def _mean(samples: Tensor, products: int) -> Estimate:
    return Estimate(samples.mean(), samples.std() / len(samples) ** 0.5, products)


def _ratio(pairs: Iterator[tuple[Tensor, Tensor]], probes: int, products: int) -> Estimate:
    """`sum z w / sum z^2` and, by linearisation, its error: that of the mean of `z w - ratio z^2` over `z^2`."""
    z2 = zw = z4 = z3w = z2w2 = torch.zeros(())
    dtype = None
    for z, w in pairs:
        dtype = w.dtype
        square, product = z.double().square(), z.double() * w  # the error is a difference of large numbers
        z2, zw, z4 = z2 + square.sum(1), zw + product.sum(1), z4 + square.square().sum(1)
        z3w, z2w2 = z3w + (square * product).sum(1), z2w2 + product.square().sum(1)
    ratio = zw / z2
    residual = (z2w2 - 2 * ratio * z3w + ratio.square() * z4).clamp_min(0)
    error = (residual * probes / (probes - 1)).sqrt() / z2
    return Estimate(ratio.to(dtype), error.to(dtype), products)


def _subspace(
    matrix: Matrix, products: int, draw: Probes, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, int]:
    """An orthonormal basis `(P, s)` of the image of random vectors, its own image, and how many products are left.

    Raises:
        ValueError: if there are fewer than six products.
    """
    if products < 6:
        raise ValueError(f"Got {products} products; at least six are needed, a third of them for the error.")
    size = min(products // 3, matrix.size)
    basis = torch.linalg.qr(matrix.matmul(draw(matrix, size, generator)))[0]
    return basis, matrix.matmul(basis), products - 2 * size
