"""The autograd graph of one forward pass, read as data: its nodes, who consumes whom, where each parameter enters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture import internals
from lapkit.curvature.parameters import Parameters

# Operations on one tensor that only rename, copy or pick its entries. What such a node makes of a parameter is still a
# parameter: the place where it meets the data is further up.
TRANSPARENT = frozenset({"SqueezeBackward1", "SqueezeBackward2"}) | frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias"),
        *("Expand", "Unsqueeze", "Squeeze", "ToCopy", "Clone", "Alias"),
        *("Select", "Slice", "Split", "SplitWithSizes", "Unbind"),  # a part of a parameter is one, too
    )
)

# Operations that may move examples about as the data says: sorting by length, routing to experts. Two graphs that look
# the same may then hold the examples in different places.
ROUTING = ("Index", "Gather", "Scatter", "MaskedS", "Take", "PackPadded", "Segment")
GATHERING = ("IndexBackward0", "IndexSelectBackward0")
BATCHED = ("BmmBackward0", "BaddbmmBackward0")
# Where an operation takes its part from, or puts it, by name of the node: graphs that differ there hold the examples
# in different places.
PLACES = {
    "SelectBackward0": ("dim", "index"),
    "SliceBackward0": ("dim", "start", "end", "step"),
    "SplitBackward0": ("split_size", "dim"),
    "SplitWithSizesBackward0": ("split_sizes", "dim"),
    "UnbindBackward0": ("dim",),
    "RollBackward0": ("shifts", "dims"),
    "FlipBackward0": ("dims",),
    "Rot90Backward0": ("k", "dims"),
    "PermuteBackward0": ("dims",),
    "TransposeBackward0": ("dim0", "dim1"),
    "AsStridedBackward0": ("size", "stride", "storage_offset"),
    "DiagonalBackward0": ("offset", "dim1", "dim2"),
    "UnfoldBackward0": ("dimension", "size", "step"),
}

WRITING = ("IndexAdd", "IndexPut", "IndexCopy", "Scatter", "MaskedScatter")


def operation(node: Node) -> str:
    """The operation's name without what autograd adds; a user's own function keeps its name."""
    return re.sub(r"Backward\d+$", "", node.name())


@dataclass(frozen=True)
class Use:
    """One place where a parameter meets the data: operand `slot` of the autograd node `node`."""

    parameter: str
    node: Node
    slot: int


def never_used(names: Sequence[str]) -> str:
    """The message for parameters that outputs do not depend on."""
    return (
        f"The forward pass never uses the selected parameters {list(names)}, so they have no curvature. "
        "Leave them out: parameter.requires_grad_(False), or name the others (parameters=[...] of compute, "
        "subset_of_weights=[...] of Laplace)."
    )


class Graph:
    """All nodes below an output, in a reproducible order, with the edges turned round.

    Args:
        output: a tensor with a `grad_fn`.
        parameters: the weights whose places are looked for.
        strict: refuse parameters that the output does not depend on, unless rows are put where the data says;
            otherwise they are passed over.

    Raises:
        ValueError: if the output has no graph, or does not depend on a parameter and `strict` is set, or a part of the
            graph is hidden by reentrant checkpointing.
    """

    def __init__(self, output: Tensor, parameters: Parameters, *, strict: bool = True) -> None:
        if output.grad_fn is None:
            raise ValueError(
                f"The model's output does not depend on the selected parameters {list(parameters.names)}: it was "
                "detached, computed under torch.no_grad() or by another library. Let the forward pass use plain "
                "torch operations."
            )
        self.nodes: list[Node] = []
        self.consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self.outputs: dict[Node, set[int]] = defaultdict(set)
        self.outputs[output.grad_fn].add(output.output_nr)
        self._walk(output.grad_fn)
        if any(node.name() == "CheckpointFunctionBackward" for node in self.nodes):
            raise ValueError(
                "The model recomputes a part of itself by reentrant checkpointing, which hides the weights inside from "
                "autograd's tape. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        names = {id(p): n for n, p in zip(parameters.names, parameters.tensors, strict=True)}
        found = ((names.get(id(internals.leaf_of(node))), node) for node in self.nodes)
        self.leaves = {name: node for name, node in found if name is not None}
        missing = [name for name in parameters.names if name not in self.leaves]
        if missing and strict and not self._writes_rows():  # else the next batch may be sent to them
            raise ValueError(never_used(missing))

    def _walk(self, top: Node) -> None:
        """Note every node, its consumers and which of its outputs they use."""
        todo, seen = [top], {top}
        while todo:
            node = todo.pop()
            self.nodes.append(node)
            for slot, (child, number) in enumerate(node.next_functions):
                if child is None:
                    continue
                self.consumers[child].append((node, slot))
                self.outputs[child].add(number)
                if child not in seen:
                    seen.add(child)
                    todo.append(child)

    def signature(self) -> tuple[object, ...]:
        """A hashable description of the graph, equal for two forward passes through the same operations."""
        index = {node: i for i, node in enumerate(self.nodes)}
        names = {node: name for name, node in self.leaves.items()}
        return tuple(
            (
                names.get(node, node.name()),
                tuple(str(internals.saved(node, place)) for place in PLACES.get(node.name(), ())),
                tuple((index[c], o) if c is not None else None for c, o in node.next_functions),
            )
            for node in self.nodes
        )

    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of everything that was computed, in the order of the nodes."""
        return tuple(internals.shape_at(node, o) for node in self.nodes for o in sorted(self.outputs[node]))

    def dtypes(self) -> set[torch.dtype]:
        """The floating types of everything that was computed."""
        found = {internals.dtype_at(node, o) for node in self.nodes for o in self.outputs[node]}
        return {dtype for dtype in found if dtype.is_floating_point}

    def routes_by_data(self) -> bool:
        """Whether the places of the examples may depend on the data."""
        return any(node.name().lstrip("_").startswith(ROUTING) for node in self.nodes)

    def _writes_rows(self) -> bool:
        """Whether rows are put back in places that the data gives, as experts do with what they were sent."""
        return any(node.name().startswith(WRITING) for node in self.nodes)

    def entries(self, parameter: str) -> set[Use]:
        """The first uses of a parameter that do more than rename its entries."""
        return self.above(parameter, self.leaves[parameter])

    def above(self, parameter: str, node: Node) -> set[Use]:
        """The next uses of `parameter` above `node`, transparent nodes skipped."""
        found: set[Use] = set()
        todo = list(self.consumers[node])
        while todo:
            consumer, slot = todo.pop()
            higher = self.consumers[consumer]
            if higher and (consumer.name() in TRANSPARENT or self._gathers_matrices(consumer)):
                todo.extend(higher)
                # The slot that matters is the one of the node above; the loop finds it.
                continue
            found.add(Use(parameter, consumer, slot))
        return found

    def _gathers_matrices(self, node: Node) -> bool:
        """Whether what a node looks up are matrices for batched products only, as those of each token's expert.

        Their products have a closed form without the copies.
        """
        if node.name() not in GATHERING:
            return False
        todo = [consumer for consumer, _ in self.consumers[node]]
        while todo:
            consumer = todo.pop()
            if consumer.name() in TRANSPARENT:
                todo.extend(higher for higher, _ in self.consumers[consumer])
            elif consumer.name() not in BATCHED:
                return False
        return True

    def roots(self, nodes: Iterable[Node]) -> list[Node]:
        """Those of `nodes` that have no other of them below: a backward pass need not go further."""
        wanted = set(nodes)
        depth: dict[Node, bool] = {}
        for start in self.nodes:  # iterative post-order: deep networks exceed Python's recursion limit
            stack = [start]
            while stack:
                node = stack[-1]
                if node in depth:
                    stack.pop()
                    continue
                children = [c for c, _ in node.next_functions if c is not None]
                unknown = [c for c in children if c not in depth]
                if unknown:
                    stack.extend(unknown)
                    continue
                depth[node] = any(c in wanted or depth[c] for c in children)
                stack.pop()
        return [n for n in self.nodes if n in wanted and not depth[n]]


def last_layer(output: Tensor, parameters: Parameters) -> Parameters:
    """The parameters of the layer nearest to the output, whatever operation it is.

    Breadth-first from the output, the first node that takes a parameter (through transparent nodes) belongs to the
    last layer; the trainable parameters of the module that owns that parameter are the selection.

    Args:
        output: what the model returned, with its graph.
        parameters: all trainable parameters.

    Returns:
        The selection, in the model's order.

    Raises:
        ValueError: if no trainable parameter reaches the output.
    """
    graph = Graph(output, parameters, strict=False)
    entering: dict[Node, list[str]] = defaultdict(list)
    for name in graph.leaves:
        for use in graph.entries(name):
            entering[use.node].append(name)
    level, seen = [graph.nodes[0]], {graph.nodes[0]}
    while level:
        found = {name for node in level for name in entering[node]}
        if found:
            owners = {name.rpartition(".")[0] for name in found} - {""}
            return parameters.subset(n in found or n.rpartition(".")[0] in owners for n in parameters.names)
        below = dict.fromkeys(c for node in level for c, _ in node.next_functions if c is not None)
        level = [c for c in below if c not in seen]
        seen.update(level)
    raise ValueError(f"None of the trainable parameters {list(parameters.names)} reaches the model's output.")
