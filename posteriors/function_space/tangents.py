"""A network made linear in its weights: outputs and Jacobian at any inputs, where asked differentiable in these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.fingerprint import fingerprint
from lapkit.curvature.inputs import can_be_cut, cut, map_tensors
from lapkit.curvature.jacobians.conversion import converted
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.posteriors.function_space.differentiable import differentiable_jacobian
from lapkit.posteriors.function_space.rows import TangentRows
from lapkit.posteriors.priors import GaussianPrior


class Tangents:
    """`f(x) + J(x) (w - w*)` at the network's present weights w*: from inputs to `f(x)` and the rows of `J(x)`.

    The rows are in double precision whatever the network's: a posterior covariance is a small difference of large
    numbers where the data determine the function well.

    Args:
        model: maps a batch to outputs; it is borrowed and given back as it was.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Raises:
        TypeError: if the model is no module.
        ValueError: if nothing is selected, or weights are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters | Iterable[str] | None = None,
        *,
        memory_budget: int | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
        self.parameters = Parameters.selected(model, parameters)
        self.parameters.check_finite()
        self.engine = Engine(
            model, self.parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis
        )
        self._weights = fingerprint(self.engine.model)

    def __call__(self, x: Any) -> tuple[Tensor, TangentRows]:
        """Outputs and Jacobian of all output numbers.

        Args:
            x: a batch of inputs, whatever the model takes. If it is a tensor that requires a gradient, both results
                have it; then each example takes a pass by itself, and the Jacobian is expanded.

        Returns:
            Outputs `(N, *, C)` of the model's type, and rows with `K = C` or `T C` columns for each example.

        Raises:
            RuntimeError: if the weights are not those that it was made for.
            ValueError: if the engine refuses model or inputs, or the expanded Jacobian would not fit into memory.
        """
        pairs = list(self.pieces(x))
        return torch.cat([f for f, _ in pairs]), TangentRows(tuple(rows.pieces[0] for _, rows in pairs))

    def pieces(self, x: Any) -> Iterator[tuple[Tensor, TangentRows]]:
        """The same for a few examples at a time, as many as fit into the memory budget, where inputs can be cut.

        Args:
            x: see `__call__`.

        Yields:
            Outputs and rows, while the network is borrowed.

        Raises:
            RuntimeError: if the weights are not those that it was made for.
        """
        if fingerprint(self.engine.model) != self._weights:
            raise RuntimeError(
                "The network's weights or buffers have changed since this function-space model was made. Make a new "
                "one from the network as it is now."
            )
        differentiable = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        with borrowed(self.engine.model, self.parameters):
            if differentiable:
                pairs = iter([differentiable_jacobian(self.engine, x)])
            else:
                pairs = self._captured(map_tensors(Tensor.detach, x))
            for outputs, jacobian in pairs:
                yield outputs, TangentRows((converted(jacobian, torch.float64),))

    def precision(self, prior: GaussianPrior) -> Tensor:
        """The prior's precision in double precision as it was given: `(1,)`, `(L,)` or `(P,)`, beside the weights.

        Args:
            prior: over the selected weights.

        Returns:
            Differentiable in the precision.

        Raises:
            ValueError: if its length is neither 1 nor the number of tensors or of weights.
        """
        prior.shift(self.parameters)
        given = torch.as_tensor(prior.precision, dtype=torch.float64, device=self.parameters.device)
        return given.reshape(-1)

    def _captured(self, x: Any) -> Iterator[tuple[Tensor, NetworkJacobian]]:
        """By the engine, in pieces whose Jacobians fit into its budget, where inputs can be cut."""
        backprop = self.engine(x)
        examples, step = backprop.examples, backprop.examples_per_piece()
        if step < examples and can_be_cut(x, examples):
            del backprop
            for start in range(0, examples, step):
                yield from self._captured(cut(x, slice(start, start + step)))
            return
        yield backprop.output.detach(), backprop.jacobian()
