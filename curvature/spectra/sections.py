"""All columns of a layer's Jacobian at once, a few layers at a time where those of all do not fit into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.backprop import Backprop, Consume


def deliver(backprop: Backprop, columns: Tensor, consume: Consume) -> None:
    """Send columns back and hand each parameter's Jacobian to `consume`, with all columns in it.

    Where the columns cannot go together, cotangents are gathered for as many layers as the budget allows, and the
    others have to wait for another round of passes.

    Args:
        backprop: a forward pass.
        columns: `(K, N, *, C)`.
        consume: called with a parameter's name and Jacobian; a parameter whose derivative is zero may be left out.
    """
    columns = columns.to(backprop.output.dtype)
    plan = backprop.plan(len(columns))
    if plan.chunk >= len(columns):
        backprop(columns, consume, plan)
        return
    for names in sections(backprop, len(columns)):
        part = restricted(backprop, names)
        part(columns, consume, part.plan(len(columns)), whole=True)


def restricted(backprop: Backprop, names: Collection[str]) -> Backprop:
    """The same pass for some of its parameters, going back no farther than to them."""
    uses = [use for at_node in backprop.uses.values() for use in at_node if use.parameter in names]
    part = Backprop(backprop.output, backprop.graph, uses, backprop.layouts, backprop.parameters, backprop.budget)
    part.may_batch = backprop.may_batch
    return part


def sections(backprop: Backprop, columns: int) -> Iterator[list[str]]:
    """The parameters, the last first, in groups whose cotangents for so many columns fit into half of the budget."""
    group: list[str] = []
    taken = 0
    for name in reversed(backprop.parameters.names):
        needed = columns * _cotangent_bytes(backprop, name)
        if group and taken + needed > backprop.budget // 2:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += needed
    yield group


def _cotangent_bytes(backprop: Backprop, name: str) -> int:
    """What one column's cotangents take where a parameter is used."""
    nodes = [node for node, uses in backprop.uses.items() if any(use.parameter == name for use in uses)]
    numbers = sum(internals.shape_at(node, o).numel() for node in nodes for o in backprop.layouts[node])
    return numbers * backprop.output.element_size()
