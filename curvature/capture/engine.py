"""From a model and a batch to a `Backprop`: one forward pass, its tape read, and the first of its kind verified."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.backprop import Backprop, Plan
from lapkit.curvature.capture.forward import ForwardFunction, canonical, run
from lapkit.curvature.capture.irregular import BASE
from lapkit.curvature.capture.known import Known
from lapkit.curvature.capture.layout import Layouts, Probe, of_one, probe, resolve
from lapkit.curvature.capture.self_check import check_examples_apart, check_same, contraction_errors
from lapkit.curvature.capture.steady import holds_for_others
from lapkit.curvature.capture.tape import Graph, Use
from lapkit.curvature.inputs import can_be_cut, cut, map_tensors, shapes_of_one, tensors, to_device
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.memory import default_budget
from lapkit.curvature.parameters import Parameters, unwrapped


def _check_types(parameters: Parameters) -> None:
    """Refuse weights of several types, whose curvature no single tensor holds.

    Raises:
        ValueError: if there are any.
    """
    types = {summable(p[:0] if p.ndim else p).dtype for p in parameters.tensors}
    if len(types) > 1:
        raise ValueError(
            f"The selected parameters are of types {sorted(map(str, types))}. Convert the model to one of them: "
            "model.to(torch.float32)."
        )


class Engine:
    """Runs a model and returns its Jacobians in factored form. Use it inside `borrowed(model, parameters)`.

    The first graph of each kind is verified: examples must not influence each other, and the captured Jacobians,
    contracted with a random cotangent, must reproduce autograd's parameter gradient. Later batches with the same
    graph and the same shapes only read the tape; a graph that moves examples about by the data is verified each time.

    Args:
        model: maps a batch to outputs; see `lapkit.curvature.capture.forward.forward` for their shapes.
        parameters: the weights to differentiate with respect to.
        memory_budget: bytes that intermediates may take; a quarter of what is free by default.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Raises:
        ValueError: if parameters have different types.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        *,
        memory_budget: int | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
    ) -> None:
        self.model, self.parameters = unwrapped(model), parameters
        _check_types(parameters)
        self.forward_fn, self.output_axis = forward_fn, output_axis
        self.budget = default_budget(parameters.device) if memory_budget is None else memory_budget
        self.unreached = set(parameters.names)  # parameters that no output has depended on so far
        self._together = True  # until an operation fails under vmap
        self._known: dict[tuple[object, ...], list[Known]] = defaultdict(list)

    def __call__(self, x: Any) -> Backprop:
        """Forward `x` and make its tape ready.

        Args:
            x: a batch of inputs, whatever the model takes.

        Returns:
            The pass, with the outputs `(N, C)`, or `(N, T, C)` for T positions.

        Raises:
            TypeError: if the model returns something else than a tensor, or refuses the inputs' type.
            ValueError: if outputs have a wrong shape or are not finite, or examples influence each other.
            RuntimeError: if the captured Jacobians do not reproduce autograd's gradient.
        """
        returned = self._returned(x)
        backprop = self._read(x, canonical(returned, self.output_axis))
        backprop.returned_shape = returned.shape
        return backprop

    def _read(self, x: Any, output: Tensor) -> Backprop:
        """The tape of a pass, from memory where its kind is known."""
        graph = Graph(output, self.parameters)
        self.unreached.difference_update(graph.leaves)
        key = self._kind(x, output, graph)
        known = self._recall(key, graph, len(output))
        if known is None and len(output) > BASE and not graph.routes_by_data() and can_be_cut(x, len(output)):
            self._study_few(cut(x, slice(BASE)), key)
            known = self._recall(key, graph, len(output))
        if known is None:
            return self._study(x, output, graph, key)
        uses, layouts, roots = known.found_in(graph)
        backprop = Backprop(output, graph, uses, layouts, self.parameters, self.budget, roots)
        backprop.may_batch = known.together
        return backprop

    def _recall(self, key: tuple[object, ...], graph: Graph, examples: int) -> Known | None:
        """What is known of passes like this one."""
        return next((known for known in self._known[key] if known.fits(graph, examples)), None)

    def _kind(self, x: Any, output: Tensor, graph: Graph) -> tuple[object, ...]:
        """What passes must have in common for one to stand for the other."""
        return graph.signature(), tuple(output.shape[1:]), len(output) == 1, shapes_of_one(x, len(output))

    def _study_few(self, few: Any, key: tuple[object, ...]) -> None:
        """Read and verify as many examples as one probe tells apart, if their pass is of the same kind.

        A fraction of the cost for all of them.
        """
        try:
            output = self.outputs(few)
            graph = Graph(output, self.parameters)
        except Exception:  # a model for batches of a certain size: then the whole batch is studied
            return
        if len(output) == BASE and self._kind(few, output, graph) == key:
            self._study(few, output, graph, key)

    def _study(self, x: Any, output: Tensor, graph: Graph, key: tuple[object, ...]) -> Backprop:
        """Read a pass of a new kind, verify it, and remember what was found where it will hold for others."""
        uses, layouts, found = self._resolve_one(x, output, graph) or self._resolve(x, output, graph)
        backprop = Backprop(output, graph, uses, layouts, self.parameters, self.budget)
        backprop.may_batch = self._verify(backprop, found)
        steady = found.certain and can_be_cut(x, len(output)) and not graph.routes_by_data()
        steady = steady and holds_for_others(graph, uses, self._own_memory(), len(output))
        if len(output) == 1 or steady:
            known = Known.of(graph, uses, layouts, len(output), together=backprop.may_batch)
            self._known[key].append(known)
        return backprop

    def _own_memory(self) -> set[int]:
        """Addresses of the model's weights and buffers."""
        owned = [*self.model.parameters(), *self.model.buffers()]
        return {t.untyped_storage().data_ptr() for t in owned}

    def jacobian(self, x: Any) -> tuple[Tensor, NetworkJacobian]:
        """The outputs `(N, *, C)` and their Jacobian: one unit column for each output number, `K = C` or `T C`.

        Args:
            x: a batch of inputs.

        Returns:
            Detached outputs and the factored Jacobian, one part for each parameter.
        """
        backprop = self(x)
        return backprop.output.detach(), backprop.jacobian()

    @property
    def of_tensors(self) -> Engine:
        """An engine whose Jacobians are in all weights of `parameters`: itself."""
        return self

    def complete(self, weights: Tensor) -> Tensor:
        """Values of the weights that Jacobians are in, `(*, S)`, as those of all of `parameters`, `(*, P)`."""
        return weights

    def restricted(self, jacobian: NetworkJacobian) -> NetworkJacobian:
        """A Jacobian in all of `parameters`, cut down to the weights that this engine's Jacobians are in."""
        return jacobian

    def outputs(self, x: Any) -> Tensor:
        """The forward pass alone: outputs `(N, *, C)` with their graph.

        Raises:
            ValueError: if inputs or outputs are refused, or the model changes its inputs.
            TypeError: if they are of a wrong type.
        """
        return canonical(self._returned(x), self.output_axis)

    def _returned(self, x: Any) -> Any:
        """What the model returns for `x`.

        Raises:
            ValueError: if it changes its inputs, or squeezes the axis of the examples away.
        """
        x = to_device(x, self.parameters.device)
        versions = [t._version for t in tensors(x)]
        returned = run(self.model, x, self.parameters, self.forward_fn)
        if versions != [t._version for t in tensors(x)]:
            raise ValueError(
                "The forward pass changes its inputs in place, so that a second pass would see others. Let it work on "
                "a copy: x = x.clone(), or inplace=False in the first activation."
            )
        if getattr(returned, "ndim", 0) == 1 < len(returned) and can_be_cut(x, 1):
            raise ValueError(
                f"The model returned outputs {tuple(returned.shape)} for a single example: it squeezes the axis of the "
                "examples away. Name the axis, as in squeeze(-1), or use flatten(1)."
            )
        return returned

    def _resolve(self, x: Any, output: Tensor, graph: Graph) -> tuple[list[Use], Layouts, Probe]:
        check_examples_apart(self.model, x, output, self.outputs)
        return resolve(graph, output, self.parameters.tensors)

    def _resolve_one(self, x: Any, output: Tensor, graph: Graph) -> tuple[list[Use], Layouts, Probe] | None:
        """A single example is read as two copies of it would be, if the model runs on them in the same way.

        Alone it would look unmixed everywhere, and its weights could be given another form than those of other batches.
        """
        if len(output) != 1:
            return None
        two = map_tensors(lambda t: torch.cat([t, t]) if t.ndim > 0 and len(t) == 1 else t, x)
        try:
            twice = self.outputs(two)
        except Exception:  # a model for one example at a time
            return None
        if len(twice) != 2 or twice.shape[1:] != output.shape[1:]:
            return None
        if can_be_cut(x, 1):
            check_same(twice, output)
            check_examples_apart(self.model, x, output, self.outputs)
        other = Graph(twice, self.parameters)
        if other.signature() != graph.signature():
            return None
        uses, layouts, _ = resolve(other, twice, self.parameters.tensors)
        uses, layouts, _ = Known.of(other, uses, layouts, 2, together=False).found_in(graph)
        layouts = {node: {o: of_one(layout) for o, layout in at.items()} for node, at in layouts.items()}
        return uses, layouts, probe(output, layouts, self.parameters.tensors, graph)

    def _verify(self, backprop: Backprop, found: Probe) -> bool:
        """Whether columns may go together, checked against autograd; one by one is the last resort.

        Raises:
            RuntimeError: if the captured Jacobians are wrong either way.
        """
        if self._together and backprop.plan(2).together:
            try:
                errors = contraction_errors(backprop, found, Plan(together=True, chunk=2))
            except (RuntimeError, NotImplementedError) as reason:
                errors = {"torch.func.vmap": float("inf")}
                message = str(reason).splitlines()[0]
            else:
                message = f"wrong gradients for {list(errors)}"
            if not errors:
                return True
            self._together = False
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
