"""From a model and a batch to a `Backprop`: one forward pass, its tape read, and the first of its kind verified."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lapkit.curvature.backprop import Backprop, Plan
from lapkit.curvature.inputs import map_tensors, shapes_of_one, tensors
from lapkit.curvature.jacobians import NetworkJacobian
from lapkit.curvature.layout import Layout, Probe, probe, resolve
from lapkit.curvature.memory import default_budget
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.tape import Graph, Use
from lapkit.curvature.verify import check_examples_apart, contraction_errors

Layouts = dict[Node, dict[int, Layout]]


@dataclass(frozen=True)
class _Known:
    """What is remembered of a graph: uses and layouts by position of the node, and whether columns may go together."""

    uses: tuple[tuple[str, int, int], ...]
    layouts: dict[int, dict[int, Layout]]
    together: bool

    @classmethod
    def of(cls, graph: Graph, uses: Sequence[Use], layouts: Layouts, *, together: bool) -> _Known:
        """What to remember of `graph`."""
        index = {node: i for i, node in enumerate(graph.nodes)}
        places = tuple((use.parameter, index[use.node], use.slot) for use in uses)
        return cls(places, {index[node]: layout for node, layout in layouts.items()}, together)

    def found_in(self, graph: Graph) -> tuple[list[Use], Layouts]:
        """The same uses and layouts in another graph with the same signature."""
        uses = [Use(parameter, graph.nodes[i], slot) for parameter, i, slot in self.uses]
        return uses, {graph.nodes[i]: layout for i, layout in self.layouts.items()}


class Engine:
    """Runs a model and returns its Jacobians in factored form. Use it inside `borrowed(model, parameters)`.

    The first graph of each kind is verified: examples must not influence each other, and the captured Jacobians,
    contracted with a random cotangent, must reproduce autograd's parameter gradient. Later batches with the same
    graph and the same shapes only read the tape; a graph that moves examples about by the data is verified each time.

    Args:
        model: maps a batch to outputs `(N, C)`; `(N,)` counts as `(N, 1)`.
        parameters: the weights to differentiate with respect to.
        memory_budget: bytes that intermediates may take; a quarter of what is free by default.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, *, memory_budget: int | None = None) -> None:
        self.model, self.parameters = model, parameters
        self.budget = default_budget(parameters.device) if memory_budget is None else memory_budget
        self._known: dict[tuple[object, ...], _Known] = {}

    def __call__(self, x: Any) -> Backprop:
        """Forward `x` and make its tape ready.

        Args:
            x: a batch of inputs, whatever the model takes.

        Returns:
            The pass, with the outputs `(N, C)`.

        Raises:
            TypeError: if the model returns something else than a tensor, or refuses the inputs' type.
            ValueError: if outputs have a wrong shape or are not finite, or examples influence each other.
            RuntimeError: if the captured Jacobians do not reproduce autograd's gradient.
        """
        output = forward(self.model, x, self.parameters)
        graph = Graph(output, self.parameters)
        key = (graph.signature(), tuple(output.shape[1:]), len(output) == 1, shapes_of_one(x, len(output)))
        known = self._known.get(key)
        if known is not None:
            backprop = Backprop(output, graph, *known.found_in(graph), self.parameters, self.budget)
            backprop.may_batch = known.together
            return backprop
        uses, found = self._resolve_one(x, output, graph) or self._resolve(x, output, graph)
        layouts = {node: layout for node, layout in found.layouts.items() if layout is not None}
        backprop = Backprop(output, graph, uses, layouts, self.parameters, self.budget)
        backprop.may_batch = self._verify(backprop, found)
        if len(output) == 1 or (found.certain and not graph.routes_by_data()):
            self._known[key] = _Known.of(graph, uses, layouts, together=backprop.may_batch)
        return backprop

    def jacobian(self, x: Any) -> tuple[Tensor, NetworkJacobian]:
        """The outputs `(N, C)` and their Jacobian: one unit column for each output, `K = C`.

        Args:
            x: a batch of inputs.

        Returns:
            Detached outputs and the factored Jacobian, one part for each parameter.
        """
        backprop = self(x)
        return backprop.output.detach(), backprop.jacobian()

    def _resolve(self, x: Any, output: Tensor, graph: Graph) -> tuple[list[Use], Probe]:
        check_examples_apart(self.model, x, output, lambda z: forward(self.model, z, self.parameters))
        return resolve(graph, output, self.parameters.tensors)

    def _resolve_one(self, x: Any, output: Tensor, graph: Graph) -> tuple[list[Use], Probe] | None:
        """A single example is read as two copies of it would be, if the model runs on them in the same way.

        Alone it would look unmixed everywhere, and its weights could be given another form than those of other batches.
        """
        if len(output) != 1:
            return None
        two = map_tensors(lambda t: torch.cat([t, t]) if t.ndim > 0 and len(t) == 1 else t, x)
        try:
            twice = forward(self.model, two, self.parameters)
            other = Graph(twice, self.parameters)
            if len(twice) != 2 or other.signature() != graph.signature():
                return None
            uses, found = resolve(other, twice, self.parameters.tensors)
        except (RuntimeError, ValueError):  # a model for one example at a time
            return None
        layouts = {node: layout for node, layout in found.layouts.items() if layout is not None}
        uses, layouts = _Known.of(other, uses, layouts, together=False).found_in(graph)
        alone = probe(output, layouts, self.parameters.tensors, graph)
        return uses, replace(alone, layouts={**layouts})

    def _verify(self, backprop: Backprop, found: Probe) -> bool:
        """Whether columns may go together, checked against autograd; one by one is the last resort.

        Raises:
            RuntimeError: if the captured Jacobians are wrong either way.
        """
        together = backprop.plan(2).together
        if together:
            try:
                errors = contraction_errors(backprop, found, Plan(together=True, chunk=2))
            except (RuntimeError, NotImplementedError) as reason:
                errors = {"torch.func.vmap": float("inf")}
                message = str(reason).splitlines()[0]
            else:
                message = f"wrong gradients for {list(errors)}"
            if not errors:
                return True
            warnings.warn(
                f"Some operation of this model cannot be differentiated in a batch of columns ({message}); "
                "columns go one by one, which is slower but exact.",
                stacklevel=2,
            )
        errors = contraction_errors(backprop, found, Plan(together=False, chunk=1))
        if errors:
            worst = max(errors, key=lambda n: errors[n])
            raise RuntimeError(
                f"The captured Jacobian of {sorted(errors)} does not reproduce autograd's gradient (relative error "
                f"{errors[worst]:.1e} for {worst!r}). Either examples influence each other on the way (batch "
                "statistics, attention across the batch), or an operation changes a saved tensor in place. Leave "
                "these parameters out of the selection, or make the forward pass treat examples one by one."
            )
        return False


def forward(model: nn.Module, x: Any, parameters: Parameters) -> Tensor:
    """The model's outputs as `(N, C)`, or an error that says why they are not.

    Args:
        model: the network.
        x: a batch of inputs.
        parameters: the selection, for its dtype.

    Returns:
        Outputs with their graph.

    Raises:
        TypeError: if the inputs' type does not suit the weights, or outputs are no floating tensor.
        ValueError: if outputs have a wrong shape, or they or the inputs are not finite.
        RuntimeError: if the model itself fails, as it does.
    """
    if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors(x)):
        raise ValueError("The inputs hold NaN or infinite values. Remove or impute these examples first.")
    try:
        output = model(x)
    except RuntimeError as error:
        if isinstance(x, Tensor) and x.dtype != parameters.dtype:
            raise TypeError(
                f"The model, with weights of type {parameters.dtype}, failed on inputs of type {x.dtype} ({error}). "
                f"If they are numbers rather than indices, convert them: x.to({parameters.dtype})."
            ) from error
        raise
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"The model must return a floating tensor of shape (N, C), it returned {kind}. Wrap it.")
    if output.ndim == 1:
        output = output[:, None]
    if output.ndim != 2 or 0 in output.shape:
        raise ValueError(
            "The model must return outputs of shape (N, C) with at least one example and one output, "
            f"it returned {tuple(output.shape)}."
        )
    if not torch.isfinite(output).all():
        raise ValueError(
            "The model's outputs are NaN or infinite on finite inputs: check its weights and the scale of the inputs."
        )
    return output
