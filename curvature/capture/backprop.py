"""The one backward pass: columns go in at the output, every parameter's Jacobian comes out as soon as it is complete.

Nothing is computed for the parameters themselves: the pass stops at the nodes where they enter, each cotangent
becomes a factored Jacobian there and is given on at once.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.layout import AnyLayout
from lapkit.curvature.capture.local import Arrived, local_jacobian, local_pull_back
from lapkit.curvature.capture.tape import Graph, Use
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.jacobians.sum_jacobian import combined
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.rules.site import FromCotangent, Site
from lapkit.curvature.rules.table import closed_form

Consume = Callable[[str, LayerJacobian], None]


@dataclass(frozen=True)
class Plan:
    """How columns are sent back: together under vmap or one after the other, and how many at a time."""

    together: bool
    chunk: int


class Backprop:
    """A forward pass whose tape has been read, ready to send columns back.

    Args:
        output: the model's output `(N, *, C)` with its graph.
        graph: its nodes.
        uses: where each parameter meets the data.
        layouts: how the examples stand in the cotangents there.
        parameters: the selected weights.
        budget: bytes that intermediates may take.
        roots: the nodes of the uses below which a backward pass has nothing to do, if they are known.
    """

    def __init__(
        self,
        output: Tensor,
        graph: Graph,
        uses: Sequence[Use],
        layouts: dict[Node, dict[int, AnyLayout]],
        parameters: Parameters,
        budget: int,
        roots: Sequence[Node] | None = None,
    ) -> None:
        self.output, self.graph, self.layouts = output, graph, layouts
        self.parameters, self.budget = parameters, budget
        self.examples = len(output)
        self.returned_shape = output.shape  # the engine puts that of the outputs before they took this form
        self.may_batch = True  # cleared where an operation fails under vmap
        self.restrict: Callable[[str, LayerJacobian], LayerJacobian] | None = None  # to some of a tensor's weights
        self.uses: dict[Node, list[Use]] = defaultdict(list)
        self.count: dict[str, int] = defaultdict(int)
        uses = [use for use in uses if layouts[use.node]]  # autograd knows the others to receive nothing
        for use in uses:
            self.uses[use.node].append(use)
            self.count[use.parameter] += 1
        self.tensors = dict(zip(parameters.names, parameters.tensors, strict=True))
        self.rules = {use: self._rule(use) for use in uses}
        self.requested = list(self.uses)
        if internals.CAN_UNBATCH:
            self.requested = graph.roots(self.uses) if roots is None else list(roots)
        self.hooked = list(self.uses.keys() - set(self.requested))

    def _rule(self, use: Use) -> FromCotangent | None:
        layouts = self.layouts[use.node]
        if set(layouts) != {0}:
            return None
        parameter, leaf = self.tensors[use.parameter], self.graph.leaves[use.parameter]
        return closed_form(Site(use, layouts[0], self.examples, parameter, leaf, self.budget))

    def local_jacobian(self, use: Use, cotangents: Arrived, *, together: bool) -> DenseJacobian:
        """One use's Jacobian where there is no closed form."""
        parameter, leaf = self.tensors[use.parameter], self.graph.leaves[use.parameter]
        pull_back = local_pull_back(use, parameter, leaf)
        return local_jacobian(
            pull_back, self.layouts[use.node], self.examples, cotangents, budget=self.budget, together=together
        )

    def plan(self, columns: int) -> Plan:
        """How to send `columns` of them back, within the budget.

        Sequential for convolutions on a CPU, which arithmetic bounds there; batched elsewhere.
        """
        convolutions = any(node.name() == "ConvolutionBackward0" for node in self.graph.nodes)
        if not self.may_batch or (convolutions and self.output.device.type == "cpu"):
            return Plan(together=False, chunk=1)
        # Cotangents live at the nodes of interest and, in flight, at a few more of the same size.
        return Plan(together=True, chunk=chunk_length(columns, 4 * self._bytes_each_column(), self.budget))

    def _bytes_each_column(self) -> int:
        numbers = sum(internals.shape_at(n, o).numel() for n in self.uses for o in self.layouts[n])
        return numbers * self.output.element_size()

    def examples_per_piece(self) -> int:
        """How many examples' Jacobians, all outputs at once, fit into the budget."""
        outputs = self.output[0].numel()
        each = 2 * outputs * self._bytes_each_column() // self.examples
        return chunk_length(self.examples, each, self.budget)

    def jacobian(self) -> NetworkJacobian:
        """The Jacobian of the outputs, `K = C` or `T C` unit columns: one factored part for each parameter."""
        outputs = self.output[0].numel()
        unit = torch.eye(outputs, dtype=self.output.dtype, device=self.output.device)
        parts: dict[str, LayerJacobian] = {}
        columns = unit.unflatten(1, self.output.shape[1:])[:, None].expand(outputs, *self.output.shape)
        self(columns, parts.__setitem__, self.plan(outputs), whole=True)
        for name, size in zip(self.parameters.names, self.parameters.sizes, strict=True):
            if name not in parts:  # autograd knows its derivative to be zero
                parts[name] = DenseJacobian(self.output.new_zeros(outputs, len(self.output), size))
        if self.restrict is not None:
            parts = {name: self.restrict(name, part) for name, part in parts.items()}
        return NetworkJacobian(tuple(parts[n] for n in self.parameters.names))

    def __call__(self, columns: Tensor, consume: Consume, plan: Plan, *, whole: bool = False) -> None:
        """Send columns back and hand each parameter's Jacobian to `consume`.

        Args:
            columns: `(K, N, *, C)`.
            consume: called with a parameter's name and Jacobian, once for each parameter and chunk of columns.
            plan: how.
            whole: deliver all K columns of a Jacobian at once, after the pass, whatever the chunks.
        """
        if not whole:
            for chunk in columns.split(plan.chunk):
                delivery = _Delivery(self, consume, together=plan.together)
                self._pass(chunk, delivery.arrive, together=plan.together)
                delivery.finish()
            return
        gathered: dict[Node, list[Arrived]] = defaultdict(list)
        for chunk in columns.split(plan.chunk):
            self._pass(chunk, lambda n, c: gathered[n].append(c), together=plan.together)
        delivery = _Delivery(self, consume, together=plan.together)
        for node in self.uses:
            pieces = gathered.pop(node, [])
            if pieces:
                delivery.arrive(node, {o: torch.cat([p[o] for p in pieces]) for o in pieces[0]})
        delivery.finish()

    def _pass(self, columns: Tensor, arrive: Callable[[Node, Arrived], None], *, together: bool) -> None:
        """One backward pass of `(K, N, *, C)`: all at once under vmap, which a single one does without.

        None is needed where the output comes right from the last parameter, as for the last layer alone.
        """
        count, top, number = len(columns), self.output.grad_fn, self.output.output_nr
        if top is not None and self.requested == [top] and set(self.layouts[top]) == {number}:
            arrive(top, {number: columns.detach()})
            return

        def prehook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
            def hook(cotangents: tuple[Tensor | None, ...]) -> None:
                arrive(node, {o: internals.unbatch(c, count) for o, c in enumerate(cotangents) if c is not None})

            return hook

        edges = [GradientEdge(n, o) for n in self.requested for o in sorted(self.layouts[n])]

        def backward(column: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(self.output, edges, column, retain_graph=True, materialize_grads=True)

        handles = [n.register_prehook(prehook(n)) for n in self.hooked]
        try:
            if together and count > 1:
                with warnings.catch_warnings():
                    # An operation without a batching rule is looped over inside: slower, and exact.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found = torch.func.vmap(backward)(columns)
            else:
                found = tuple(g[None] for g in backward(columns[0]))
        finally:
            for handle in handles:
                handle.remove()
        received: dict[Node, Arrived] = defaultdict(dict)
        for edge, g in zip(edges, found, strict=True):
            received[edge.node][edge.output_nr] = g.detach()
        for node, cotangents in received.items():
            arrive(node, cotangents)


class _Delivery:
    """Collects the uses of each parameter during one chunk and passes on the complete ones."""

    def __init__(self, backprop: Backprop, consume: Consume, *, together: bool) -> None:
        self.backprop, self.consume, self.together = backprop, consume, together
        self.pending: dict[str, list[LayerJacobian]] = defaultdict(list)
        self.later: list[tuple[Use, Arrived]] = []

    def arrive(self, node: Node, cotangents: Arrived) -> None:
        """Take a node's cotangents.

        Closed forms are used up at once; local products wait until autograd's engine has finished.
        """
        for use in self.backprop.uses[node]:
            rule = self.backprop.rules[use]
            if rule is None:
                self.later.append((use, cotangents))
            elif 0 in cotangents:
                self._complete(use.parameter, rule(cotangents[0]))

    def finish(self) -> None:
        """What had to wait: inside the engine a node that is called directly sees the running pass's pruning."""
        for use, cotangents in self.later:
            self._complete(use.parameter, self.backprop.local_jacobian(use, cotangents, together=self.together))
        for name in list(self.pending):  # uses that autograd knows to be zero never arrived
            self.consume(name, combined(self.pending.pop(name)))

    def _complete(self, name: str, jacobian: LayerJacobian) -> None:
        self.pending[name].append(jacobian)
        if len(self.pending[name]) == self.backprop.count[name]:
            self.consume(name, combined(self.pending.pop(name)))
