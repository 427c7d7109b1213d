"""Outputs and Jacobian of a network as functions of its inputs, to optimise a choice of inputs by gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.jacobians.jacobian import DenseJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.products.vectors import differentiated, explained, twice_differentiable


class _OfInputs(torch.autograd.Function):
    """`x -> (f, J)` with the derivative in x alone: the network's weights receive no gradient from what is made of it.

    Each example takes a pass by itself, and each output a backward pass whose graph is kept: plain autograd, so that
    every operation counts that can be differentiated twice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
        """Outputs `(N, *, C)` and their Jacobian `(K, N, P)`."""
        outputs, rows = [], []
        with torch.enable_grad(), twice_differentiable(engine.model):
            leaf = x.detach().requires_grad_()
            for example in leaf.split(1):
                f = engine.outputs(example)
                found = [differentiated(number, engine.parameters.tensors) for number in f.flatten()]
                outputs.append(f)
                rows.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found]))
            f, jacobian = torch.cat(outputs), torch.stack(rows, dim=1)
        ctx.leaf, ctx.results = leaf, (f, jacobian)  # type: ignore[attr-defined]
        return f.detach(), jacobian.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        """The derivative in x.

        Raises:
            RuntimeError: if its graph is asked for.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "What the linearised network says has one derivative in its inputs, no second one. Take it without "
                "create_graph=True."
            )
        pairs = [(result, u) for result, u in zip(ctx.results, cotangents, strict=True) if result.requires_grad]
        if not pairs:
            return torch.zeros_like(ctx.leaf), None
        results, given = zip(*pairs, strict=True)
        with explained():
            (gradient,) = torch.autograd.grad(results, ctx.leaf, given, retain_graph=True, materialize_grads=True)
        return gradient, None


def differentiable_jacobian(engine: Engine, x: Tensor) -> tuple[Tensor, NetworkJacobian]:
    """Outputs and expanded Jacobian with their graph in x.

    Args:
        engine: the model; inside `borrowed`.
        x: inputs that require a gradient, one example a row.

    Returns:
        Outputs `(N, *, C)`, and the Jacobian with `K = C` or `T C` columns.

    Raises:
        ValueError: if the expanded Jacobian would not fit into the engine's memory budget.
        NotTwiceDifferentiable: if an operation of the network cannot be differentiated twice.
    """
    with torch.no_grad():
        outputs = engine.outputs(x[:1].detach()).numel()
    needed = len(x) * outputs * engine.parameters.numel * engine.parameters.dtype.itemsize
    if needed > engine.budget:
        raise ValueError(
            f"Gradients in the inputs need the expanded Jacobian of {len(x)} examples, {outputs} outputs and "
            f"{engine.parameters.numel} weights, {needed / 2**30:.3g} GiB of a budget of {engine.budget / 2**30:.3g} "
            "GiB. Give fewer inputs at a time, fewer weights (the last layer), or a larger memory_budget."
        )
    f, jacobian = _OfInputs.apply(x, engine)
    return f, NetworkJacobian(tuple(DenseJacobian(part) for part in jacobian.split(engine.parameters.sizes, dim=-1)))
