"""The neural tangent kernel as a kernel of gpytorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor, nn

from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.parameters import Parameters
from lapkit.posteriors.function_space.gaussian_processes import gpytorch
from lapkit.posteriors.function_space.positive import by_logarithm
from lapkit.posteriors.function_space.rows import TangentRows
from lapkit.posteriors.function_space.tangents import Tangents
from lapkit.posteriors.priors import GaussianPrior


class TangentKernel(gpytorch.kernels.Kernel):  # type: ignore[misc]  # gpytorch has no types
    """`k(x, x') = J(x) diag(prior precision)^{-1} J(x')^T`: the covariance of C outputs of a network made linear.

    For a Gaussian process of several outputs: `num_outputs_per_input` is C, and the matrix for N and M inputs is
    `(N C, M C)`, example by example, in double precision. The prior precision is a parameter of gpytorch with the
    constraint that it is positive, found by its logarithm; the network's weights are no parameters of the kernel.

    Args:
        model: the network at its present weights, to which the kernel belongs; it is borrowed and never changed. Or
            its `Tangents`, which know the rest.
        prior_precision: where the parameter starts: one number, one for each parameter tensor, or one for each weight.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        input_shape: the shape of an example as the model takes it. gpytorch's inputs are vectors `(*, N, D)`; D is the
            number of its entries. The vectors themselves by default.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Raises:
        TypeError: if the model is no module.
        ValueError: if nothing is selected, or the precision is not positive or has a wrong length.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> kernel = TangentKernel(nn.Linear(2, 1), prior_precision=2.0)
        >>> kernel(x).to_dense()
        tensor([[3.0000, 3.5000],
                [3.5000, 5.0000]], dtype=torch.float64, grad_fn=...)
    """

    def __init__(
        self,
        model: nn.Module | Tangents,
        prior_precision: float | Tensor = 1.0,
        *,
        parameters: Parameters | Iterable[str] | None = None,
        input_shape: tuple[int, ...] | None = None,
        memory_budget: int | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, Tangents):
            model = Tangents(
                model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis
            )
        self.tangents = model  # no module: the network does not become a part of the kernel
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self._outputs: int | None = None
        start = model.precision(GaussianPrior(prior_precision)).detach().log()
        self.register_parameter("raw_prior_precision", nn.Parameter(start.clone()))
        self.register_constraint("raw_prior_precision", by_logarithm())
        self.to(start.device)

    @property
    def prior_precision(self) -> Tensor:
        """`(1,)`, `(L,)` or `(P,)` in double precision, with its graph to the parameter."""
        return self.raw_prior_precision_constraint.transform(self.raw_prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        """Set it, all entries to one number or each.

        Raises:
            ValueError: if it is not positive and finite, or has another length than the parameter.
        """
        given = torch.as_tensor(GaussianPrior(value).precision).detach().to(self.prior_precision)
        if given.numel() not in (1, self.raw_prior_precision.numel()):
            raise ValueError(
                f"The kernel has {self.raw_prior_precision.numel()} prior precisions, got {given.numel()}. Make "
                "another kernel for another structure of the prior."
            )
        self.initialize(raw_prior_precision=given.reshape(-1).log().expand_as(self.raw_prior_precision).clone())

    @property
    def dtype(self) -> torch.dtype:
        """Of the kernel's matrices, whatever the parameter's: double precision."""
        return torch.float64

    @property
    def variance(self) -> Tensor:
        """Of the weights under the prior, `1 / prior_precision`."""
        return self.prior_precision.reciprocal()

    def examples(self, x: Tensor) -> Tensor:
        """Inputs `(*, N, D)` as a batch that the model takes, all examples along one axis.

        Floating numbers of a type that no weight of the network has are cast to that of its first weights.

        Raises:
            ValueError: if D is not the number of entries of an example.
        """
        weights = [p.dtype for p in self.tangents.engine.model.parameters() if p.is_floating_point()]
        if x.is_floating_point() and x.dtype not in weights:
            x = x.to(weights[0])
        if self.input_shape is None:
            return x.flatten(0, -2)
        if x.shape[-1] != Size(self.input_shape).numel():
            raise ValueError(
                f"Expected inputs (..., N, {Size(self.input_shape).numel()}), examples of shape {self.input_shape} as "
                f"vectors, got {tuple(x.shape)}. Flatten them: x.flatten(1)."
            )
        return x.reshape(-1, *self.input_shape)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C, or T C for outputs at T positions."""
        if self._outputs is None:
            mean, _ = self.tangents(self.examples(x1.detach()[..., :1, :])[:1])
            self._outputs = mean[0].numel()
        return self._outputs

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """The matrix `(*, N C, M C)`, or its diagonal `(*, N C)` where there are as many of both.

        Args:
            x1: inputs `(*, N, D)`.
            x2: inputs `(*, M, D)`; axes in front are broadcast.
            diag: the diagonal alone.
            last_dim_is_batch: refused.
            params: ignored.

        Returns:
            Differentiable in the prior precision, and in inputs that require a gradient.

        Raises:
            ValueError: if each entry of the inputs is to have a kernel of its own, which a network has not.
        """
        if last_dim_is_batch:
            raise ValueError("A network takes all entries of an input together: last_dim_is_batch=True has no meaning.")
        # Equal inputs of which one is a constant have different gradients.
        constant = not (x1.requires_grad or x2.requires_grad)
        same = x1 is x2 or (constant and x1.shape == x2.shape and torch.equal(x1, x2))
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        x1, x2 = x1.expand(*batch, *x1.shape[-2:]), x2.expand(*batch, *x2.shape[-2:])
        one = self.tangents(self.examples(x1))[1]
        two = one if same else self.tangents(self.examples(x2))[1]
        if diag:
            values = one.blocks(self.variance).diagonal(dim1=1, dim2=2) if same else one.matched(two, self.variance)
            return values.reshape(*batch, -1)
        return self.between(one, None if same else two, batch)

    def between(self, one: TangentRows, two: TangentRows | None, batch: Size, variance: Tensor | None = None) -> Tensor:
        """The matrices `(*batch, n, m)` of rows in as many equal groups as the batch has members.

        Args:
            one: rows of the first inputs.
            two: of the second; the same by default.
            batch: shape of the groups.
            variance: of the weights under the prior; the parameter's by default.
        """
        variance = self.variance if variance is None else variance
        if not batch:
            return one.inner_products(two, variance)
        count = batch.numel()
        if two is None:
            return one.grouped(count, variance).unflatten(0, batch)
        pairs = ((self._group(one, index, count), self._group(two, index, count)) for index in range(count))
        return torch.stack([rows.inner_products(other, variance) for rows, other in pairs]).unflatten(0, batch)

    @staticmethod
    def _group(rows: TangentRows, index: int, count: int) -> TangentRows:
        size = _examples(rows) // count
        return rows.examples(index * size, (index + 1) * size)


def _examples(rows: TangentRows) -> int:
    return sum(piece.shape[1] for piece in rows.pieces)
