"""Where the examples stand in the cotangent that a node receives, found by scaling each example's output cotangent.

Two plain backward passes suffice. The first sends a random cotangent `u`, the second `r_n u_n` with one power of two
for each example. Where examples do not mix, every entry of a node's cotangent is multiplied by exactly the factor of
the example it belongs to; an entry that mixes examples, or a parameter's, is not. The second pass also yields
autograd's own parameter gradient, with which the captured Jacobians are compared later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.tape import Graph, Use


@dataclass(frozen=True)
class Layout:
    """Examples along one axis of a tensor: in blocks (0 0 1 1), interleaved (0 1 0 1) or both (0 0 1 1 0 0 1 1).

    Args:
        axis: which one.
        rounds: how often the row of examples is repeated: once for blocks, None for as often as there are positions.
    """

    axis: int
    rounds: int | None = 1

    def owners(self, length: int, examples: int) -> Tensor:
        """The example that each of `length` positions along the axis belongs to."""
        index = torch.arange(length)
        return index % examples if self.rounds is None else index // (length // self.rounds // examples) % examples

    def canonical(self, tensor: Tensor, examples: int) -> Tensor:
        """`(K, *shape)` to `(K, N, R, *rest)`: the axis of the examples first, with R positions an example."""
        moved = tensor.movedim(self.axis + 1, 1)
        if self.rounds is None:
            return moved.unflatten(1, (-1, examples)).transpose(1, 2)
        if self.rounds == 1:
            return moved.unflatten(1, (examples, -1))
        return moved.unflatten(1, (self.rounds, examples, -1)).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class Probe:
    """What two backward passes showed: layouts by node and output, None where examples mix, and autograd's gradient.

    `certain` is false when some cotangent was too sparse to tell one layout from another, so that it may differ in
    the next batch.
    """

    layouts: dict[Node, dict[int, Layout] | None]
    certain: bool
    cotangent: Tensor  # (N, C)
    factors: Tensor  # (N,)
    gradients: Sequence[Tensor]  # of sum_n r_n u_n f_n


def example_factors(examples: int, like: Tensor) -> Tensor:
    """Powers of two `(N,)`, all different for up to eight examples and a fixed scramble of eight beyond."""
    index = torch.arange(examples, dtype=torch.int64)
    scrambled = torch.where(index < 8, index, (index * 2654435761 >> 13) % 8)
    return torch.exp2(scrambled.to(torch.float64) - 4).to(like)


def probe(output: Tensor, nodes: Iterable[Node], parameters: Sequence[Tensor], numbers: Graph) -> Probe:
    """Find the layout of the examples in the cotangents of `nodes`.

    Args:
        output: the model's output `(N, C)` with its graph.
        nodes: the nodes asked about.
        parameters: leaves whose gradient is wanted; the backward passes run down to them.
        numbers: the graph, which knows which outputs of a node are used.

    Returns:
        Layouts and the reference gradient.
    """
    wanted = list(nodes)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    factors = example_factors(len(output), output)
    first = _collect(output, wanted, parameters, cotangent)[0]
    second, gradients = _collect(output, wanted, parameters, cotangent * factors[:, None])
    layouts: dict[Node, dict[int, Layout] | None] = {}
    certain = True
    for node in wanted:
        found: dict[int, Layout] = {}
        layouts[node] = found
        for number in sorted(numbers.outputs[node]):
            one, two = first[node][number], second[node][number]
            if one is None or two is None:  # autograd knows this cotangent to be zero
                continue
            candidates = _candidates(one, two, factors)
            if not candidates:
                layouts[node] = None
                break
            certain = certain and len(candidates) == 1
            found[number] = candidates[0]
    return Probe(layouts, certain, cotangent, factors, gradients)


def _collect(
    output: Tensor, nodes: list[Node], parameters: Sequence[Tensor], cotangent: Tensor
) -> tuple[dict[Node, tuple[Tensor | None, ...]], Sequence[Tensor]]:
    """One backward pass; what arrived at each node, and the parameters' gradient."""
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}

    def prehook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(cotangents: tuple[Tensor | None, ...]) -> None:
            arrived[node] = cotangents

        return hook

    handles = [n.register_prehook(prehook(n)) for n in nodes]
    try:
        gradients = torch.autograd.grad(output, parameters, cotangent, retain_graph=True, materialize_grads=True)
    finally:
        for handle in handles:
            handle.remove()
    return arrived, gradients


def _candidates(one: Tensor, two: Tensor, factors: Tensor) -> list[Layout]:
    """The layouts under which `two` is `one` scaled by each example's factor; the same layout twice counts once."""
    examples = len(factors)
    if one.numel() == 0:  # such as an expert that no example is sent to
        return []
    # Powers of two scale exactly; what is allowed for is another order of summation.
    tolerance = min(1e3 * torch.finfo(one.dtype).eps, 0.02) * two.abs().max()

    def fits(layout: Layout) -> bool:
        owner = layout.owners(one.shape[layout.axis], examples).to(factors.device)
        scale = factors[owner].reshape(-1, *[1] * (one.ndim - layout.axis - 1))
        return bool(((two - one * scale).abs() <= tolerance).all())

    positions = {axis: length // examples for axis, length in enumerate(one.shape) if length % examples == 0}
    simple = [
        Layout(axis, rounds)
        for axis, each in positions.items()
        for rounds in ((1, None) if each > 1 and examples > 1 else (1,))
    ]
    found = [layout for layout in simple if fits(layout)]
    if found:
        return found
    between = (Layout(axis, r) for axis, each in positions.items() for r in range(2, each) if each % r == 0)
    return [layout for layout in between if fits(layout)]


def resolve(graph: Graph, output: Tensor, parameters: Sequence[Tensor]) -> tuple[list[Use], Probe]:
    """Each parameter's uses: the nodes nearest to it whose cotangent keeps examples apart.

    What lies below such a node and above the parameter is the parameter's own business (a transpose, a merged
    adapter, a weight norm).

    Args:
        graph: the tape.
        output: the model's output `(N, C)`.
        parameters: the selected leaves.

    Returns:
        The uses and the layouts at their nodes.

    Raises:
        ValueError: if the examples are mixed all the way up to the output.
    """
    uses = {use for name in graph.leaves for use in graph.entries(name)}
    while True:
        result = probe(output, {u.node for u in uses}, parameters, graph)
        mixed = {u for u in uses if result.layouts[u.node] is None}
        if not mixed:
            order = {node: i for i, node in enumerate(graph.nodes)}
            return sorted(uses, key=lambda u: (order[u.node], u.slot, u.parameter)), result
        for use in mixed:
            higher = graph.above(use.parameter, use.node)
            if not higher:
                raise ValueError(
                    f"Parameter {use.parameter!r} reaches the output only through operations that mix examples "
                    f"({use.node.name()}), so its per-example Jacobian is not defined. Leave it out of the selection."
                )
            uses |= higher
        uses -= mixed
