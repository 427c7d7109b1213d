"""Where the examples stand in the cotangent that a node receives, found by scaling each example's output cotangent.

A few plain backward passes suffice. The first sends a random cotangent `u`, the others `r_n u_n` with one power of two
for each example, a digit of its number: one pass tells eight examples apart, two tell 64. Where examples do not mix,
every entry of a node's cotangent is multiplied by exactly the factor of the example it belongs to; an entry that mixes
examples, or a parameter's, is not. The passes also yield autograd's own parameter gradients, with which the captured
Jacobians are compared later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture.irregular import (
    IrregularLayout,
    digit_factors,
    digits,
    irregular_layout,
    scaled_alike,
)
from lapkit.curvature.capture.tape import Graph, Use


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
        moved = tensor.movedim(self.axis + 1, 1) if self.axis else tensor
        if self.rounds == 1:
            return moved.view(len(moved), examples, moved.shape[1] // examples, *moved.shape[2:])
        if self.rounds is None:
            return moved.unflatten(1, (-1, examples)).transpose(1, 2)
        return moved.unflatten(1, (self.rounds, examples, -1)).transpose(1, 2).flatten(2, 3)


AnyLayout = Layout | IrregularLayout
Layouts = dict[Node, dict[int, AnyLayout]]  # by node and number of its output


def of_one(layout: AnyLayout) -> Layout:
    """For a single example, whose positions are all its own, in whatever order those of two would stand."""
    return Layout(layout.axis) if isinstance(layout, IrregularLayout) else layout


@dataclass(frozen=True)
class Probe:
    """What a few backward passes showed: layouts by node and output, None where examples mix, and autograd's gradients.

    `certain` is false when a layout may be another one in the next batch: nothing or too little arrived to tell, or
    the examples stand in no regular order.
    """

    layouts: dict[Node, dict[int, AnyLayout] | None]
    certain: bool
    cotangent: Tensor  # (N, *, C)
    factors: Sequence[Tensor]  # (N,), together different for all examples
    gradients: Sequence[Sequence[Tensor]]  # of sum_n r_n u_n f_n, for each of the factors


def probe(output: Tensor, nodes: Iterable[Node], parameters: Sequence[Tensor], graph: Graph) -> Probe:
    """Find the layout of the examples in the cotangents of `nodes`.

    Args:
        output: the model's output `(N, *, C)` with its graph.
        nodes: the nodes asked about.
        parameters: leaves whose gradient is wanted; the backward passes run down to them.
        graph: the tape, which knows which outputs of a node are used.

    Returns:
        Layouts and the reference gradients.
    """
    wanted, examples = list(nodes), len(output)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    factors = [digit_factors(examples, digit, output) for digit in range(digits(examples))]
    first = _collect(output, wanted, parameters, cotangent)[0]
    passes = [_collect(output, wanted, parameters, cotangent * _along(f, output)) for f in factors]
    layouts: dict[Node, dict[int, AnyLayout] | None] = {}
    certain = True
    for node in wanted:
        found: dict[int, AnyLayout] = {}
        layouts[node] = found
        for number in sorted(graph.outputs[node]):
            one = first[node][number]
            if one is None:  # autograd knows this cotangent to be zero
                continue
            scaled = [arrived[node][number] for arrived, _ in passes]
            layout, sure = _layout(one, [torch.zeros_like(one) if t is None else t for t in scaled], factors)
            certain = certain and sure
            if layout is not None:
                found[number] = layout
            elif one.numel():  # nothing arrives at an expert that no example is sent to
                layouts[node] = None
                break
    return Probe(layouts, certain, cotangent, factors, [gradients for _, gradients in passes])


def _along(factors: Tensor, output: Tensor) -> Tensor:
    """Factors `(N,)` in a shape that multiplies outputs."""
    return factors.reshape(-1, *[1] * (output.ndim - 1))


def _layout(one: Tensor, scaled: list[Tensor], factors: Sequence[Tensor]) -> tuple[AnyLayout | None, bool]:
    """The layout of a cotangent, if examples do not mix there, and whether it will hold for other batches."""
    if one.ndim and one.numel() and not one.any():  # nothing arrives, but rows have gone in and count
        even = len(one) % len(factors[0]) == 0
        return (Layout(0) if even else IrregularLayout(0, torch.zeros(len(one), dtype=torch.long))), False
    for noise in (0, 2):  # exactly, or up to sums in another order
        candidates = _candidates(one, scaled, factors, noise)
        if candidates:
            rows = _rows(one, scaled, len(factors[0]), noise) if candidates[0].axis else None
            return (candidates[0], len(candidates) == 1) if rows is None else (rows, False)
        irregular = irregular_layout(one, scaled, len(factors[0]), noise)
        if irregular is not None:
            return irregular, False
    return None, False


def _rows(one: Tensor, scaled: list[Tensor], examples: int, noise: float) -> IrregularLayout | None:
    """The layout of a matrix each of whose rows belongs to one example: columns fit by accident where many are zero.

    If a single example has them all, then also those at which nothing arrives.
    """
    found = irregular_layout(one, scaled, examples, noise) if one.ndim == 2 else None
    if found is None or found.axis != 0:
        return None
    owners = found.owner[one.any(1).cpu()].unique()
    return IrregularLayout(0, owners.expand(len(one))) if len(owners) == 1 else found


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
    return arrived, [g.to_dense() if g.is_sparse else g for g in gradients]  # an embedding may ask for sparse ones


def _candidates(one: Tensor, scaled: list[Tensor], factors: Sequence[Tensor], noise: float) -> list[Layout]:
    """The regular layouts under which `scaled` is `one` times each example's factors."""
    examples = len(factors[0])
    if one.numel() == 0:
        return []

    def fits(layout: Layout) -> bool:
        owner = layout.owners(one.shape[layout.axis], examples).to(one.device)
        shape = (-1, *[1] * (one.ndim - layout.axis - 1))
        return all(
            scaled_alike(one, two, f[owner].reshape(shape), layout.axis, noise)
            for two, f in zip(scaled, factors, strict=True)
        )

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


def resolve(graph: Graph, output: Tensor, parameters: Sequence[Tensor]) -> tuple[list[Use], Layouts, Probe]:
    """Each parameter's uses: the nodes nearest to it whose cotangent keeps examples apart.

    What lies below such a node and above the parameter is the parameter's own business (a transpose, a merged
    adapter, a weight norm).

    Args:
        graph: the tape.
        output: the model's output `(N, *, C)`.
        parameters: the selected leaves.

    Returns:
        The uses, the layouts at their nodes, and the last probe.

    Raises:
        ValueError: if the examples are mixed all the way up to the output.
    """
    uses = {use for name in graph.leaves for use in graph.entries(name)}
    while True:
        result = probe(output, {u.node for u in uses}, parameters, graph)
        mixed = {u for u in uses if result.layouts[u.node] is None}
        if not mixed:
            order = {node: i for i, node in enumerate(graph.nodes)}
            layouts = {node: layout for node, layout in result.layouts.items() if layout is not None}
            return sorted(uses, key=lambda u: (order[u.node], u.slot, u.parameter)), layouts, result
        for use in mixed:
            higher = graph.above(use.parameter, use.node)
            if not higher:
                raise ValueError(
                    f"Parameter {use.parameter!r} reaches the output only through operations that mix examples "
                    f"({use.node.name()}), so its per-example Jacobian is not defined. Leave it out of the selection."
                )
            uses |= higher
        uses -= mixed
