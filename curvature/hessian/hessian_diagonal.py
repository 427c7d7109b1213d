"""The exact diagonal of the Hessian of any network, by as few second derivatives as the layers' shapes allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lapkit.curvature.accumulate import EMPTY
from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction, check_positions
from lapkit.curvature.hessian.hessian_routes import OutputRoute, output_route
from lapkit.curvature.hessian.piecewise_linear import loss_hessian, piecewise_linear_in, signed_roots, square_sums
from lapkit.curvature.inputs import numbered, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.vectors import (
    Passage,
    Vectors,
    bytes_each,
    differentiated,
    explained,
    twice_differentiable,
)
from lapkit.curvature.quantities.quantity import described
from lapkit.curvature.quantities.results import Sum

AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}


@final
class HessianDiagonal(Sum):
    """`diag(d^2 loss / dw^2)`, one tensor `value/NAME` in the shape of each parameter; entries may be negative."""

    main = "value"

    def diagonal(self) -> Tensor:
        """All entries in flat order, `(P,)`."""
        return torch.cat([value.flatten() for value in self.part("value").values()])


def hessian_diagonal(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    parameters: Parameters | Iterable[str] | None = None,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
) -> HessianDiagonal:
    """The diagonal of the Hessian of the summed loss, exactly, for networks of any form.

    A weight that enters once, as a factor of what goes in, `z[n,t,o] = sum_i w[o,i] a[n,t,i]`, has

        d^2 loss / dw[o,i]^2 = sum_n sum_{t,t'} a[n,t,i] a[n,t',i] d^2 loss / dz[n,t,o] dz[n,t',o]

    and one second derivative in a position and output serves all examples and inputs: T O of them instead of O I.
    Other parameters, and those for which that is not fewer, take one Hessian-vector product for each entry.

    Where no operation between a weight and the outputs bends, as in ReLU networks and for every last layer, there is
    no residual and `H = J^T L J` with the Hessian L of the loss in the outputs: one backward pass for each output
    serves all such weights. Elsewhere the cost is that of `T O` or `O I` passes through the graph of the gradient for
    each weight, about two gradients each: some thousand for a small convolutional network with smooth activations.

    Args:
        model: any network whose operations can be differentiated twice; it is given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)` or `(inputs, targets, weights)`.
        parameters: the weights, or names of parameters or modules; all trainable ones by default.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Returns:
        The diagonal, summed over examples.

    Raises:
        ValueError: if there is no data, or the engine or the likelihood refuses a batch.
        RuntimeError: if an operation cannot be differentiated twice, or the two ways to an entry disagree.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> data = [(torch.full((4, 1), 2.0), torch.zeros(4, 1))]
        >>> hessian_diagonal(torch.nn.Linear(1, 1), Gaussian(), data).diagonal()
        tensor([16., 4.])

    Reference:
        Dangel, Backpropagation Beyond the Gradient, appendix B.1.3, has the diagonal for sequential networks.
    """
    parameters = Parameters.selected(model, parameters)
    parameters.check_finite()
    sums = {
        n: torch.zeros_like(summable(p.detach())) for n, p in zip(parameters.names, parameters.tensors, strict=True)
    }
    count = 0
    with borrowed(model, parameters), twice_differentiable(model):
        engine = Engine(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
        for number, batch in numbered(data):
            x, y, weights = unpack(batch, number)
            backprop = engine(x)
            f = summable(backprop.output)
            if weights is not None and len(weights) != len(f):
                raise ValueError(f"Got {len(weights)} weights for a batch of {len(f)} examples: one weight an example.")
            check_positions(backprop.returned_shape, output_axis, y)
            checked = likelihood.check(f.detach(), y, output_axis)

            def loss(f: Tensor, y: Tensor = checked, weights: Tensor | None = weights) -> Tensor:
                losses = likelihood.loss(f, y)
                return losses.sum() if weights is None else (losses * weights.to(losses)).sum()

            for name, value in _BatchDiagonal(backprop, loss, verify=count == 0).values().items():
                sums[name] += value
            count += len(f)
    if not count:
        raise ValueError(EMPTY)
    shapes = {name: tuple(value.shape) for name, value in sums.items()}
    about = {"curvature": "hessian", "likelihood": described(likelihood)}
    return HessianDiagonal(shapes, {f"value/{name}": value for name, value in sums.items()}, count, about)


class _BatchDiagonal:
    """The diagonal of the Hessian of one batch's loss.

    Args:
        backprop: the forward pass.
        loss: of outputs, summed over examples.
        verify: compare an entry of each parameter with a Hessian-vector product.
    """

    def __init__(self, backprop: Backprop, loss: Callable[[Tensor], Tensor], *, verify: bool) -> None:
        self.backprop, self.loss, self.verify = backprop, loss, verify
        self.total = loss(summable(backprop.output))
        self.passage = Passage(backprop.budget)
        self.passage.together = backprop.plan(2).together
        self.each = 2 * bytes_each(backprop.output, backprop.parameters)

    def values(self) -> dict[str, Tensor]:
        """Entries by parameter, those that are not known to be zero."""
        tensors = self.backprop.tensors
        routes = {name: self._route(name) for name in self.backprop.parameters.names}
        values = self._without_residual(routes)
        routes = {name: route for name, route in routes.items() if name not in values}
        if not routes:
            return values
        targets: Any = [tensors[name] if route is None else route.edge for name, route in routes.items()]
        with explained():
            found = torch.autograd.grad(self.total, targets, create_graph=True, allow_unused=True)
        for (name, route), gradient in zip(routes.items(), found, strict=True):
            if gradient is None or not gradient.requires_grad:  # the loss is linear in it
                continue
            value = (
                self._directly(name, gradient) if route is None else self._by_outputs(route, gradient, tensors[name])
            )
            if self.verify and route is not None:
                self._check(name, value)
            values[name] = value
        return values

    def _without_residual(self, routes: Mapping[str, OutputRoute | None]) -> dict[str, Tensor]:
        """The entries of weights in which the outputs are piecewise linear, if that takes fewer passes."""
        graph, output = self.backprop.graph, self.backprop.output
        names = {name for name in routes if name in graph.leaves and piecewise_linear_in(graph, name)}
        costs = {n: self.backprop.tensors[n].numel() if route is None else route.count for n, route in routes.items()}
        size = output[0].numel()
        if size >= sum(costs[n] for n in names) or len(output) * size**2 * output.element_size() > self.backprop.budget:
            return {}
        with explained():
            hessian = loss_hessian(self.loss, summable(output.detach()))
        positive, negative = (square_sums(self.backprop, root, names) for root in signed_roots(hessian))
        values = {name: torch.zeros_like(summable(self.backprop.tensors[name].detach())) for name in names}
        for name, value in values.items():
            value += positive.get(name, 0)
            value -= negative.get(name, 0)
            if self.verify:
                self._check(name, value)
        return values

    def _route(self, name: str) -> OutputRoute | None:
        """The way through the outputs, where it is the shorter one."""
        route = output_route(self.backprop, name)
        return route if route is not None and route.count < self.backprop.tensors[name].numel() else None

    def _products(self, gradient: Tensor, target: Tensor | GradientEdge, directions: Tensor) -> Tensor:
        """`d <gradient, v> / d target` for directions `(K, *shape)`."""

        def product(vectors: Vectors) -> Vectors:
            with explained():
                found = torch.autograd.grad(gradient, target, vectors[0], retain_graph=True, allow_unused=True)[0]
            return (torch.zeros_like(vectors[0]) if found is None else found,)

        return self.passage(product, (directions,), verify=self.verify)[0].detach()

    def _directly(self, name: str, gradient: Tensor) -> Tensor:
        """One product for each entry."""
        weight = self.backprop.tensors[name]
        entries = []
        for which in torch.arange(weight.numel(), device=weight.device).split(self._step(weight.numel())):
            entries.append(self._entries(gradient, weight, which))
        return summable(torch.cat(entries).view(weight.shape))

    def _entries(self, gradient: Tensor, weight: Tensor, which: Tensor) -> Tensor:
        unit = torch.zeros(len(which), weight.numel(), dtype=weight.dtype, device=weight.device)
        unit.scatter_(1, which[:, None], 1)
        products = self._products(gradient, weight, unit.view(-1, *weight.shape))
        return products.reshape(len(which), -1).gather(1, which[:, None])[:, 0]

    def _by_outputs(self, route: OutputRoute, gradient: Tensor, weight: Tensor) -> Tensor:
        """One product for each position and unit."""
        total = route.zeros().to(summable(weight.detach()).dtype)
        _, positions, units = route.places.shape
        pairs = torch.cartesian_prod(*(torch.arange(n, device=weight.device) for n in (positions, units)))
        for which in pairs.split(self._step(len(pairs))):
            second = self._products(gradient, route.edge, route.directions(which, gradient))
            route.add(total, which, route.rows(which, second))
        return route.in_weight(total, weight)

    def _step(self, count: int) -> int:
        return chunk_length(count, self.each, self.backprop.budget) if self.passage.together else 1

    def _check(self, name: str, value: Tensor) -> None:
        """Compare the largest entry with a Hessian-vector product.

        Raises:
            RuntimeError: if they disagree.
        """
        weight = self.backprop.tensors[name]
        largest = value.abs().argmax()[None]
        gradient = differentiated(self.total, [weight])[0]
        if not gradient.requires_grad:  # the loss is linear in it
            gradient = gradient + 0 * weight
        direct = self._entries(gradient, weight, largest)[0]
        found = value.flatten()[largest[0]]
        if not (found - direct).abs() <= AGREEMENT.get(weight.dtype, 1e-1) * torch.maximum(found.abs(), direct.abs()):
            raise RuntimeError(
                f"The second derivative of {name!r} through the outputs of its operation, {float(found):.6g}, is not "
                f"the direct one, {float(direct):.6g}. Leave this parameter out, or report the operation."
            )
