"""`enable_backprop`: predictions as functions of their inputs, for optimising a choice of inputs by gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lapkit.curvature import borrowed
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.laplace import Laplace
from lapkit.posteriors import FunctionDistribution
from lapkit.posteriors.function_space.differentiable import differentiable_jacobian


class DifferentiableLaplace(Laplace):
    """A `lapkit.Laplace` whose linearised predictions carry the graph of inputs that require a gradient.

    Each example takes a pass by itself and the Jacobian is expanded, so that this is for few inputs at a time.
    """

    def function_distribution(self, x: Any) -> FunctionDistribution:
        """See `lapkit.Laplace.function_distribution`; differentiable in a tensor of inputs `(N, *)`."""
        if not _wanted(x):
            return super().function_distribution(x)
        mean, jacobian = self._with_graph(x)
        covariance = self.posterior.precision.inverse_quadratic(jacobian)
        return FunctionDistribution(mean, (covariance + covariance.mT) / 2)

    def _joint(self, x: Any) -> tuple[Tensor, Tensor]:
        """Of all inputs together, inputs first."""
        if not _wanted(x):
            return super()._joint(x)
        mean, jacobian = self._with_graph(x)
        covariance = self.posterior.precision.inverse_gram(jacobian).permute(1, 0, 3, 2)  # (N, C, N, C)
        return mean.flatten(), covariance.reshape(mean.numel(), mean.numel())

    def _with_graph(self, x: Tensor) -> tuple[Tensor, NetworkJacobian]:
        """Outputs and Jacobian.

        Raises:
            ValueError: if single weights are random, or an input has outputs at several positions.
        """
        self.fitted  # noqa: B018 (an error before fit)
        engine = self._checked_engine()
        if self._subnetwork is not None:
            raise ValueError("Gradients in the inputs are for whole parameters; single weights are random here.")
        with borrowed(self.model, engine.parameters):
            mean, jacobian = differentiable_jacobian(engine, x.to(engine.parameters.device))
        if mean.ndim != 2:
            raise ValueError(f"Gradients in the inputs are for outputs (N, C), got shape {tuple(mean.shape)}.")
        return mean, jacobian


def _wanted(x: Any) -> bool:
    """Whether a graph is wanted."""
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
