"""What a Gaussian over weights says about the network's outputs: the linearised model's Gaussian over functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.inputs import can_be_cut, cut
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.operators.operator import SymmetricOperator


@dataclass(frozen=True, eq=False)
class FunctionDistribution:
    """Independent Gaussians over the outputs f of N inputs; of f, not of y: no observation noise is in it.

    Outputs at T positions of an input have a Gaussian each; what they have in common is not kept.

    Args:
        mean: `(N, C)`, or `(N, T, C)`.
        covariance: `(N, C, C)`, or `(N, T, C, C)`.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Marginal variances, of the shape of the mean."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def first(self, outputs: int) -> FunctionDistribution:
        """The Gaussian of the first so many outputs."""
        return FunctionDistribution(self.mean[..., :outputs], self.covariance[..., :outputs, :outputs])

    def independent(self) -> FunctionDistribution:
        """The same variances, without what the outputs have in common."""
        return FunctionDistribution(self.mean, torch.diag_embed(self.variance))

    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the outputs, independent between inputs and positions, `(S, *mean.shape)`.

        Args:
            n_samples: how many, S.
            generator: the only source of randomness.

        Returns:
            `mean + root epsilon`, with a root that also exists where the covariance is singular.
        """
        noise = torch.randn(
            (n_samples, *self.mean.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        return self.mean + torch.einsum("...cd,s...d->s...c", _root(self.covariance), noise)


def _root(covariance: Tensor) -> Tensor:
    """`B` with `B B^T = covariance`: Cholesky, or eigenvectors where it is singular (a dead unit)."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.any():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def jointly_linearized(engine: Engine, x: Any, precision: SymmetricOperator) -> tuple[Tensor, Tensor]:
    """The Gaussian of the outputs of all inputs together, under the same weights.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs.
        precision: P, over the engine's parameters.

    Returns:
        Means `(N, *, C)` and their covariance `(N, K, N, K)` with `K = C` or `T C`.
    """
    mean, jacobian = engine.jacobian(x)
    return summable(mean), precision.inverse_gram(jacobian).permute(1, 0, 3, 2)


def linearized(engine: Engine, x: Any, precision: SymmetricOperator) -> FunctionDistribution:
    """The distribution of `f(x) + J(x) (w - w*)` for weights `w ~ N(w*, P^{-1})`: `N(f(x), J P^{-1} J^T)`.

    Batches whose Jacobians would not fit into the engine's memory budget are cut into pieces, where the inputs are
    tensors.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs.
        precision: P, over the engine's parameters.

    Returns:
        The outputs' distribution.

    Reference:
        Immer, Korzepa, Bauer, Improving predictions of Bayesian neural nets via local linearization, 2021, eq. (10).
    """
    pieces = [from_jacobian(mean, jacobian, precision) for mean, jacobian in linearized_pieces(engine, x)]
    if len(pieces) == 1:
        return pieces[0]
    return FunctionDistribution(torch.cat([p.mean for p in pieces]), torch.cat([p.covariance for p in pieces]))


def linearized_pieces(engine: Engine, x: Any) -> Iterator[tuple[Tensor, NetworkJacobian]]:
    """Outputs and Jacobian, of as many examples at a time as the engine's memory budget has room for.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs.

    Yields:
        Outputs `(n, C)` or `(n, T, C)`, and the Jacobian with K columns, C or T C.
    """
    backprop = engine(x)
    examples, step = backprop.examples, backprop.examples_per_piece()
    if step < examples and can_be_cut(x, examples):
        for start in range(0, examples, step):
            yield from linearized_pieces(engine, cut(x, slice(start, start + step)))
    else:
        yield summable(backprop.output.detach()), backprop.jacobian()


def from_jacobian(mean: Tensor, jacobian: NetworkJacobian, precision: SymmetricOperator) -> FunctionDistribution:
    """`N(mean, J P^{-1} J^T)`, of each position by itself.

    Args:
        mean: outputs, `(N, C)` or `(N, T, C)`.
        jacobian: with K columns, C or T C.
        precision: P.
    """
    covariance = precision.inverse_quadratic(jacobian)
    if mean.ndim == 3:  # (N, T C, T C): the blocks of each position
        boxed = covariance.unflatten(2, mean.shape[1:]).unflatten(1, mean.shape[1:])
        covariance = boxed.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return FunctionDistribution(mean, (covariance + covariance.mT) / 2)
