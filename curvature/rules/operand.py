"""What was made of a parameter before it met the data, replayed to know which of its entries went where.

The nodes between a parameter and its use are replayed on another tensor of its shape: one without data, whose strides
then describe a view, or the numbers of the entries themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture.internals import saved, shape_at
from lapkit.curvature.capture.tape import Use

Step = Callable[[Node, int, Tensor], Tensor]


def path(use: Use, leaf: Node) -> list[tuple[Node, int]] | None:
    """The nodes from a parameter to its use, lowest first, with the output taken of each; None if they branch."""
    found: list[tuple[Node, int]] = []
    child, number = use.node.next_functions[use.slot]
    while child is not leaf:
        if child is None or child.name() not in STEPS:
            return None
        found.append((child, number))
        below = [edge for edge in child.next_functions if edge[0] is not None]
        if len(below) != 1:
            return None
        child, number = below[0]
    return found[::-1]


def replay(steps: list[tuple[Node, int]], tensor: Tensor) -> Tensor | None:
    """What the nodes of `path` make of another tensor of the parameter's shape; None if that is no view of it.

    Args:
        steps: what `path` returns.
        tensor: on the meta device to ask for a view, or numbers of entries, which may also be copied.
    """
    try:
        for node, number in steps:
            tensor = STEPS[node.name()](node, number, tensor)
    except RuntimeError:  # not a view
        return None
    return tensor


def view_of(parameter: Tensor, steps: list[tuple[Node, int]]) -> Tensor | None:
    """An operand as a view, without data, of the parameter's entries in their flat order; None if it is none."""
    return replay(steps, torch.empty(parameter.shape, device="meta"))


def unmerged_view_of(parameter: Tensor, steps: list[tuple[Node, int]]) -> Tensor | None:
    """The same before axes were merged that are no neighbours in the parameter; None if more than that was done to it.

    Whatever comes after is a copy in another shape, with the entries in the same order.
    """
    tensor = torch.empty(parameter.shape, device="meta")
    for done, (node, number) in enumerate(steps):
        try:
            tensor = STEPS[node.name()](node, number, tensor)
        except RuntimeError:
            return tensor if all(STEPS[n.name()] in (_reshape, _same) for n, _ in steps[done:]) else None
    return tensor


def entries_of(parameter: Tensor, steps: list[tuple[Node, int]]) -> Tensor | None:
    """The number in flat order of the entry of the parameter that stands at each place of an operand; -1 for none."""
    numbers = torch.arange(parameter.numel(), device=parameter.device)
    return replay(steps, numbers.view(parameter.shape))


def whole(view: Tensor, parameter: Tensor) -> bool:
    """Whether a view holds all entries of the parameter in their flat order."""
    return view.numel() == parameter.numel() and view.is_contiguous()


def scaled(a: Tensor, alpha: float) -> Tensor:
    """Inputs times the number that the whole product was multiplied by."""
    return a if alpha == 1 else alpha * a


def signed(number: int) -> int:
    """Saved axes are unsigned: -1 is 2^64 - 1."""
    return number - 2**64 if number >= 2**63 else number


def _integer(node: Node, name: str) -> int:
    return signed(int(saved(node, name)))


def _reshape(node: Node, number: int, t: Tensor) -> Tensor:
    shape = shape_at(node, number)
    return t.view(shape) if t.is_meta else t.reshape(shape)


def _permute(node: Node, number: int, t: Tensor) -> Tensor:
    return t.permute(*(signed(int(d)) for d in saved(node, "dims")))


def _slice(node: Node, number: int, t: Tensor) -> Tensor:
    dim, step = _integer(node, "dim"), _integer(node, "step")
    start, end = (_integer(node, n) for n in ("start", "end"))
    return torch.ops.aten.slice(t, dim, start, end, step)


def _split(node: Node, number: int, t: Tensor) -> Tensor:
    return t.split(int(saved(node, "split_size")), _integer(node, "dim"))[number]


def _split_with_sizes(node: Node, number: int, t: Tensor) -> Tensor:
    return t.split([int(s) for s in saved(node, "split_sizes")], _integer(node, "dim"))[number]


def _no_view(t: Tensor) -> None:
    if t.is_meta:
        raise RuntimeError("Rows that are looked up are not a view.")


def _index(node: Node, number: int, t: Tensor) -> Tensor:
    _no_view(t)
    return t[tuple(slice(None) if i is None else i for i in saved(node, "indices"))]


def _index_select(node: Node, number: int, t: Tensor) -> Tensor:
    _no_view(t)
    return t.index_select(_integer(node, "dim"), saved(node, "index"))


def _embedding(node: Node, number: int, t: Tensor) -> Tensor:
    raise RuntimeError("Rows of an embedding are not entries: some may be padding.")


def _where(node: Node, number: int, t: Tensor) -> Tensor:
    """Constants take the place of some entries: -1, no entry."""
    _no_view(t)
    condition = saved(node, "condition")
    return torch.where(condition if node.next_functions[0][0] is not None else ~condition, t, -1)


def _masked_fill(node: Node, number: int, t: Tensor) -> Tensor:
    """The same."""
    _no_view(t)
    return t.masked_fill(saved(node, "mask"), -1)


def _constant_added(node: Node, number: int, t: Tensor) -> Tensor:
    """Entries stay what they are where a constant, such as a mask, is added to them.

    Raises:
        RuntimeError: if they are multiplied by a number.
    """
    if node.next_functions[0][0] is None and saved(node, "alpha") != 1:
        raise RuntimeError("Scaled entries are not the entries.")
    return t.expand(shape_at(node, number))


def _same(node: Node, number: int, t: Tensor) -> Tensor:
    return t


STEPS: dict[str, Step] = {
    "TBackward0": lambda node, number, t: t.t(),
    "TransposeBackward0": lambda node, number, t: t.transpose(_integer(node, "dim0"), _integer(node, "dim1")),
    "PermuteBackward0": _permute,
    "ViewBackward0": _reshape,
    "UnsafeViewBackward0": _reshape,
    "ReshapeAliasBackward0": _reshape,
    "UnsqueezeBackward0": _reshape,
    "SqueezeBackward0": _reshape,
    "SqueezeBackward1": _reshape,
    "SqueezeBackward2": _reshape,
    "AddBackward0": _constant_added,
    "WhereBackward0": _where,
    "MaskedFillBackward0": _masked_fill,
    "ExpandBackward0": lambda node, number, t: t.expand(shape_at(node, number)),
    "SliceBackward0": _slice,
    "SelectBackward0": lambda node, number, t: t.select(_integer(node, "dim"), _integer(node, "index")),
    "UnbindBackward0": lambda node, number, t: t.unbind(_integer(node, "dim"))[number],
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split_with_sizes,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "EmbeddingBackward0": _embedding,
    "ToCopyBackward0": _same,
    "CloneBackward0": _same,
    "AliasBackward0": _same,
}
