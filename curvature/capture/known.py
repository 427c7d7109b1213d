"""What is remembered of a pass that has been read and verified, so that others of its kind need neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from lapkit.curvature.capture.layout import AnyLayout, Layouts
from lapkit.curvature.capture.tape import Graph, Use


@dataclass(frozen=True)
class Known:
    """What is remembered of a graph: uses, layouts, roots by position of the node, and whether columns go together."""

    uses: tuple[tuple[str, int, int], ...]
    layouts: dict[int, dict[int, AnyLayout]]
    roots: tuple[int, ...]
    together: bool
    shapes: tuple[torch.Size, ...]
    examples: int

    @classmethod
    def of(cls, graph: Graph, uses: Sequence[Use], layouts: Layouts, examples: int, *, together: bool) -> Known:
        """What to remember of `graph`."""
        index = {node: i for i, node in enumerate(graph.nodes)}
        places = tuple((use.parameter, index[use.node], use.slot) for use in uses)
        places_of_layouts = {index[node]: layout for node, layout in layouts.items()}
        roots = tuple(index[node] for node in graph.roots({use.node for use in uses if layouts[use.node]}))
        return cls(places, places_of_layouts, roots, together, graph.shapes(), examples)

    def fits(self, graph: Graph, examples: int) -> bool:
        """Whether another graph with the same signature has the same shapes, up to the number of examples.

        Where parts of a batch are cut out by lengths that the data gives, shapes tell.
        """
        shapes = graph.shapes()
        return shapes == self.shapes or all(
            len(one) == len(two)
            and all(p == q or p * examples == q * self.examples for p, q in zip(one, two, strict=True))
            for one, two in zip(self.shapes, shapes, strict=True)
        )

    def found_in(self, graph: Graph) -> tuple[list[Use], Layouts, list[Node]]:
        """The same uses, layouts and roots in another graph with the same signature."""
        nodes = graph.nodes
        uses = [Use(parameter, nodes[i], slot) for parameter, i, slot in self.uses]
        return uses, {nodes[i]: layout for i, layout in self.layouts.items()}, [nodes[i] for i in self.roots]
