"""What the linearised network says of its outputs, differentiable in the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.posteriors.function_space.differentiable import differentiable_jacobian
from lapkit.posteriors.functions import FunctionDistribution


class _Solve(torch.autograd.Function):
    """`rows P^{-1}` with the derivative in the rows alone, which every structure of P has."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, precision: SymmetricOperator) -> Tensor:
        """`(R, P)`."""
        ctx.precision = precision  # type: ignore[attr-defined]
        return precision.solve(rows.T).T

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        """The same map, which is symmetric."""
        return _Solve.apply(cotangents[0], ctx.precision), None


def differentiable_rows(engine: Engine, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and Jacobian, with their graph in x.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs that require a gradient, one example a row.

    Returns:
        Outputs `(N, *, C)`, and the Jacobian in the engine's weights, `(N, K, P)`.

    Raises:
        ValueError: if the Jacobian does not fit into the engine's memory budget.
        NotTwiceDifferentiable: if an operation of the network cannot be differentiated twice.
    """
    f, jacobian = differentiable_jacobian(engine, x)
    return summable(f), summable(engine.restricted(jacobian).to_dense().transpose(0, 1))


def differentiable_linearized(engine: Engine, x: Tensor, precision: SymmetricOperator) -> FunctionDistribution:
    """`linearized`, with mean and covariance differentiable in x.

    It takes a backward pass for each example and output, and the expanded Jacobian.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs that require a gradient, one example a row.
        precision: P, over the weights that the engine's Jacobians are in.

    Returns:
        The outputs' distribution.

    Raises:
        ValueError: if the Jacobian does not fit into the engine's memory budget.
        NotTwiceDifferentiable: if an operation of the network cannot be differentiated twice.
    """
    f, rows = differentiable_rows(engine, x)
    boxed = rows.unflatten(1, f.shape[1:])  # (N, *, C, P): the covariance of each position by itself
    solved = _Solve.apply(boxed.flatten(0, -2), precision).view_as(boxed)
    covariance = boxed @ solved.mT
    return FunctionDistribution(f, (covariance + covariance.mT) / 2)


def differentiable_joint(engine: Engine, x: Tensor, precision: SymmetricOperator) -> tuple[Tensor, Tensor]:
    """`jointly_linearized`, with mean and covariance differentiable in x.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs that require a gradient, one example a row.
        precision: P, over the weights that the engine's Jacobians are in.

    Returns:
        Means `(N, *, C)` and their covariance `(N, K, N, K)`.

    Raises:
        ValueError: if the Jacobian does not fit into the engine's memory budget.
        NotTwiceDifferentiable: if an operation of the network cannot be differentiated twice.
    """
    f, rows = differentiable_rows(engine, x)
    flat = rows.flatten(0, 1)
    covariance = flat @ _Solve.apply(flat, precision).T
    return f, ((covariance + covariance.T) / 2).view(*rows.shape[:2], *rows.shape[:2])


def differentiable_samples(engine: Engine, x: Tensor, deviations: Tensor) -> Tensor:
    """`function_samples`, differentiable in x.

    Args:
        engine: the model at w*; inside `borrowed`.
        x: inputs that require a gradient, one example a row.
        deviations: `w - w*` of S draws, `(S, P)`.

    Returns:
        `(S, N, *, C)`.

    Raises:
        ValueError: if the Jacobian does not fit into the engine's memory budget.
        NotTwiceDifferentiable: if an operation of the network cannot be differentiated twice.
    """
    f, rows = differentiable_rows(engine, x)
    return f + torch.einsum("nkp,sp->snk", rows, deviations.to(rows)).view(len(deviations), *f.shape)
