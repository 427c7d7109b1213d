"""What is remembered of a pass that has been read and verified, so that others of its kind need neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lapkit.curvature.capture.layout import AnyLayout, Layouts
from lapkit.curvature.capture.tape import Graph, Use


@dataclass(frozen=True)
class Known:
    """What is remembered of a graph: uses and layouts by position of the node, and whether columns may go together."""

    uses: tuple[tuple[str, int, int], ...]
    layouts: dict[int, dict[int, AnyLayout]]
    together: bool
    shapes: tuple[torch.Size, ...]
    examples: int

    @classmethod
    def of(cls, graph: Graph, uses: Sequence[Use], layouts: Layouts, examples: int, *, together: bool) -> Known:
        """What to remember of `graph`."""
        index = {node: i for i, node in enumerate(graph.nodes)}
        places = tuple((use.parameter, index[use.node], use.slot) for use in uses)
        places_of_layouts = {index[node]: layout for node, layout in layouts.items()}
        return cls(places, places_of_layouts, together, graph.shapes(), examples)

    def fits(self, graph: Graph, examples: int) -> bool:
        """Whether another graph with the same signature has the same shapes, up to the number of examples.

        Where parts of a batch are cut out by lengths that the data gives, shapes tell.
        """
        return all(
            len(one) == len(two)
            and all(p == q or p * examples == q * self.examples for p, q in zip(one, two, strict=True))
            for one, two in zip(self.shapes, graph.shapes(), strict=True)
        )

    def found_in(self, graph: Graph) -> tuple[list[Use], Layouts]:
        """The same uses and layouts in another graph with the same signature."""
        uses = [Use(parameter, graph.nodes[i], slot) for parameter, i, slot in self.uses]
        return uses, {graph.nodes[i]: layout for i, layout in self.layouts.items()}
