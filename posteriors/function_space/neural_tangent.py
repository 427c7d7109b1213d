"""The empirical neural tangent kernel of a trained network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.parameters import Parameters
from lapkit.posteriors.function_space.tangents import Tangents
from lapkit.posteriors.priors import GaussianPrior


def neural_tangent_kernel(
    model: nn.Module,
    x: Any,
    other: Any = None,
    *,
    prior: GaussianPrior | None = None,
    parameters: Parameters | Iterable[str] | None = None,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
) -> Tensor:
    """The inner products of the outputs' gradients at two batches of inputs, `Theta(x, x') = J(x) P0^{-1} J(x')^T`.

    It is the covariance of the linearised network's outputs for weights from the prior. The Jacobians are kept
    factored; the kernel is differentiable in the prior's precision, and in inputs that require a gradient.

    Args:
        model: the network at its present weights; it is given back as it was.
        x: a batch of N inputs.
        other: another one of M; the same by default.
        prior: whose precision P0 weighs the weights; one for each by default.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Returns:
        `(N, C, M, C)`, C counting all the numbers that an example has for outputs, positions first.

    Raises:
        TypeError: if the model is no module.
        ValueError: if nothing is selected, the prior's precision has a wrong length, or the engine refuses the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> neural_tangent_kernel(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))[:, 0, :, 0]
        tensor([[ 6.,  7.],
                [ 7., 10.]])

    Reference:
        Jacot, Gabriel, Hongler, Neural Tangent Kernel, 2018; Dangel et al., ViViT, 2022, section 4.
    """
    tangents = Tangents(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
    variance = tangents.precision(GaussianPrior() if prior is None else prior).reciprocal()
    outputs, rows = tangents(x)
    columns = outputs[0].numel()
    kernel = rows.inner_products(None if other is None else tangents(other)[1], variance)
    return summable(kernel.to(outputs.dtype)).unflatten(1, (-1, columns)).unflatten(0, (-1, columns))
