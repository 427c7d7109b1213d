"""One use of a parameter as a rule sees it: the node, the operand, where the examples stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.irregular import IrregularLayout
from lapkit.curvature.capture.layout import AnyLayout, Layout
from lapkit.curvature.capture.tape import Use
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.rules.operand import entries_of, path, unmerged_view_of, view_of, whole

FromCotangent = Callable[[Tensor], LayerJacobian]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a parameter meets the data, and what a closed form needs to know about that place.

    Args:
        use: the node and operand.
        layout: where the examples stand in the node's cotangent.
        examples: their number N.
        parameter: the weight.
        leaf: its node in the graph.
        budget: bytes an intermediate may take.
        watched: saved tensors that were read, with their versions.
    """

    use: Use
    layout: AnyLayout
    examples: int
    parameter: Tensor
    leaf: Node
    budget: int
    watched: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def node(self) -> Node:
        """The node where the parameter meets the data."""
        return self.use.node

    @property
    def name(self) -> str:
        """Its name."""
        return self.node.name()

    @property
    def direct(self) -> bool:
        """Whether the operand is the parameter itself, not something made of it."""
        return self.node.next_functions[self.use.slot][0] is self.leaf

    @cached_property
    def steps(self) -> list[tuple[Node, int]] | None:
        """The nodes between the parameter and this place, lowest first; None if more than views and rows were taken."""
        return path(self.use, self.leaf)

    @cached_property
    def view(self) -> Tensor | None:
        """The operand as a view of the parameter, without data, or None if it is no view."""
        return None if self.steps is None else view_of(self.parameter, self.steps)

    @property
    def unmerged(self) -> Tensor | None:
        """The same before axes were merged that are no neighbours in the parameter."""
        return None if self.steps is None else unmerged_view_of(self.parameter, self.steps)

    @property
    def entries(self) -> Tensor | None:
        """Which entry of the parameter stands at each place of the operand, or None if that is not known."""
        return None if self.steps is None else entries_of(self.parameter, self.steps)

    @property
    def whole(self) -> bool:
        """Whether the operand holds all entries of the parameter in their flat order, in whatever shape."""
        return self.direct or (self.view is not None and whole(self.view, self.parameter))

    def saved(self, name: str) -> Any:
        """What the node kept under `name`, or None; a tensor is watched for later changes."""
        value = internals.saved(self.node, name)
        if isinstance(value, Tensor):
            self.watched.append((value, value._version))
        return value

    def check_unchanged(self) -> None:
        """Refuse to go on if something that was read has been changed since.

        Raises:
            RuntimeError: if a tensor was changed in place.
        """
        if any(tensor._version != version for tensor, version in self.watched):
            raise RuntimeError(
                f"An operand that {self.name} kept for the backward pass has been changed in place since the forward "
                "pass. Change a copy of it, or run the forward pass again."
            )

    def factor(self, name: str, *nodes: str) -> float | None:
        """The number kept under `name` by nodes of these names, None if it is not shown; one for other nodes."""
        if self.name not in nodes:
            return 1.0
        value = self.saved(name)
        return None if value is None else float(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's output."""
        return tuple(internals.shape_at(self.node, 0))

    @property
    def operand_shape(self) -> tuple[int, ...]:
        """Shape of the operand."""
        return self.shape_below(self.use.slot) or ()

    def shape_below(self, slot: int) -> tuple[int, ...] | None:
        """Shape of any operand of the node that has a gradient, else None."""
        child, number = self.node.next_functions[slot]
        return None if child is None else tuple(internals.shape_at(child, number))

    def along(self, axis: int) -> Site | None:
        """The same place with the examples along this axis of the cotangent; None if they stand along another one.

        Where all of it belongs to one example, as the few rows of an expert may, any axis will do.
        """
        if self.layout.axis == axis:
            return self
        owners = self.layout.owners(self.shape[self.layout.axis], self.examples)
        if not len(owners) or bool((owners != owners[0]).any()):
            return None
        length = self.shape[axis]
        layout = Layout(axis) if self.examples == 1 else IrregularLayout(axis, owners[:1].expand(length))
        return replace(self, layout=layout)

    @property
    def rows(self) -> int | None:
        """How many positions there are, where examples have different numbers of them; None if all have the same."""
        return len(self.layout.owner) if isinstance(self.layout, IrregularLayout) else None

    def canonical(self, cotangent: Tensor) -> Tensor:
        """Cotangents `(K, *shape)` as `(K, N, R, *rest)`, in float32 at least."""
        return summable(self.layout.canonical(cotangent, self.examples))

    def canonical_input(self, tensor: Tensor) -> Tensor:
        """A saved operand whose examples stand like the cotangent's, `(*shape)` as `(N, R, *rest)`."""
        return self.canonical(tensor.detach()[None])[0]
