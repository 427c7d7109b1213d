"""The whole spectrum of a matrix that can only be multiplied by, as a distribution: stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.memory import chunk_length, default_budget
from lapkit.curvature.products.estimators import Estimate, Matrix, rademacher


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Eigenvalues as a random z sees them: `z^T f(A) z / P = sum_j weights_j f(nodes_j)` for smooth functions f.

    Args:
        nodes: `(R, m)` for R random vectors, in float64.
        weights: `(R, m)`, each row adds up to one.
        size: the number of eigenvalues P.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """`tr f(A)`, with the error that comes from the random vectors.

        That of the quadrature is beside it: none for polynomials of degree `2 m - 1`, falling fast with m for smooth
        functions.

        Args:
            function: of eigenvalues, entry by entry.

        Returns:
            The estimate; its error needs two vectors at least, and is NaN with one.
        """
        values = torch.where(self.weights > 0, function(self.nodes) * self.weights, 0.0)
        samples = self.size * values.sum(1)
        return Estimate(samples.mean(), samples.std() / math.sqrt(len(samples)), self.nodes.numel())

    def logdet(self, shift: float = 0.0) -> Estimate:
        """`log det (A + shift I)`; one decomposition serves every shift.

        Raises:
            ValueError: if `A + shift I` is seen not to be positive definite.
        """
        lowest = float(self.nodes[self.weights > torch.finfo(self.nodes.dtype).eps].min())
        if lowest + shift <= 0:
            raise ValueError(
                f"A + {shift:g} I has no logarithm: A has an eigenvalue of {lowest:.3g} at most. Use a larger shift, "
                "or the GGN, which has no negative ones, in place of the Hessian."
            )
        return self.trace_of(lambda nodes: (nodes + shift).clamp_min(torch.finfo(nodes.dtype).tiny).log())

    def effective_dimension(self, shift: float) -> Estimate:
        """`tr A (A + shift I)^{-1}`, the number of well-determined weights of a semi-definite A.

        A shift below the smallest nodes is beyond what the Lanczos steps resolve: eigenvalues from there on are seen
        as a few nodes, mostly too large, so that more of them count as well determined than are. The bias is not in
        the estimate's error. Take more steps until the number stands still, or a shift well above the noise of the
        small eigenvalues; for the GGN `SqrtGGN` gives all of the non-zero ones.

        Args:
            shift: the prior precision.

        Returns:
            The estimate.

        Raises:
            ValueError: if the shift is not positive.

        Reference:
            MacKay, Bayesian interpolation, 1992, eq. (4.9).
        """
        if shift <= 0:
            raise ValueError(f"The shift, a prior precision, must be positive, got {shift}.")
        return self.trace_of(lambda nodes: nodes / (nodes + shift))

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density of eigenvalues, smoothed by a normal distribution.

        Args:
            grid: where, `(G,)`.
            width: the standard deviation of the smoothing, in the units of the eigenvalues.

        Returns:
            `(G,)`, with an integral of one.

        Raises:
            ValueError: if the width is not positive.

        Reference:
            Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density,
            2019, algorithm 2.
        """
        if width <= 0:
            raise ValueError(f"The width must be positive, got {width}.")
        grid = grid.to(self.nodes)
        bumps = torch.exp(-(((grid[:, None] - self.nodes.flatten()) / width).square()) / 2)
        return bumps @ self.weights.flatten() / (len(self.nodes) * width * math.sqrt(2 * math.pi))


def spectral_density(
    matrix: Matrix,
    probes: int = 10,
    steps: int = 50,
    *,
    memory_budget: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues, by Lanczos from random signs.

    Args:
        matrix: anything symmetric with products, definite or not.
        probes: the number of random vectors R.
        steps: the number of Lanczos steps m, one product each for every vector; no more than P are made.
        memory_budget: bytes for the `m P` numbers that are kept of each vector of those that go together.
        generator: of the random vectors.

    Returns:
        Nodes and weights.

    Raises:
        ValueError: if there is no probe or no step.

    Reference:
        Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017, algorithm 1.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"Got {probes} probes and {steps} steps; at least one of each is needed.")
    steps = min(steps, matrix.size)
    budget = default_budget(matrix.device) if memory_budget is None else memory_budget
    each = 2 * (steps + 2) * matrix.size * torch.finfo(matrix.dtype).bits // 8
    signs = rademacher(matrix, probes, generator)
    pieces = signs.split(chunk_length(probes, each, budget), dim=1)
    tridiagonal = torch.cat([lanczos(matrix, piece, steps) for piece in pieces])
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return SpectralDensity(nodes, vectors[:, 0].square(), matrix.size)


def lanczos(matrix: Matrix, start: Tensor, steps: int) -> Tensor:
    """`T = Q^T A Q` on the Krylov spaces of several vectors, all orthogonalised twice against everything before.

    Args:
        matrix: symmetric.
        start: vectors `(P, R)`, not zero.
        steps: the dimension m.

    Returns:
        Tridiagonal matrices `(R, m, m)` in float64. Where a Krylov space is exhausted before, T is zero from there on,
        and the first row of its eigenvectors with it.
    """
    size, count = start.shape
    basis = start.new_zeros(steps, size, count)
    result = torch.zeros(count, steps, steps, dtype=torch.float64, device=start.device)
    scale = torch.zeros(count, dtype=start.dtype, device=start.device)
    vector = start / start.norm(dim=0)
    for j in range(steps):
        basis[j] = vector
        image = matrix.matmul(vector)
        result[:, j, j] = (vector * image).sum(0).double()
        scale = torch.maximum(scale, image.norm(dim=0))
        for _ in range(2):
            known = torch.einsum("jpr,pr->jr", basis[: j + 1], image)
            image = image - torch.einsum("jpr,jr->pr", basis[: j + 1], known)
        length = image.norm(dim=0)
        alive = length > 10 * torch.finfo(start.dtype).eps * math.sqrt(size) * scale
        vector = torch.where(alive, image / length, 0.0)
        if j + 1 < steps:
            result[:, j, j + 1] = result[:, j + 1, j] = torch.where(alive, length, 0.0).double()
    return result
