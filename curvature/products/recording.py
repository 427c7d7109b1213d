"""Every operation of a computation below autograd, and those among them through which some tensors reach a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture.internals import VIEWS, TorchDispatchMode, tree_leaves

MADE_LIKE = tuple(  # operations that read the shape of their operand and none of its numbers
    getattr(torch.ops.aten, name)
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"),
        *("new_empty_strided", "_new_zeros_with_same_feature_meta"),
    )
)


class CannotReplay(RuntimeError):
    """Tangents were computed in a way that a list of operations does not tell."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation as it was done."""

    function: Any
    arguments: Any  # positional and named
    result: Any

    @property
    def reads(self) -> set[int]:
        """Memory of the operands whose numbers it uses."""
        if self.function.overloadpacket in MADE_LIKE:
            return set()
        return {storage(t) for t in tensors(self.arguments)}

    @property
    def overwrites(self) -> set[int]:
        """Memory of operands that it changes."""
        positional, named = self.arguments
        schema = self.function._schema.arguments
        values = [named.get(a.name, positional[i] if i < len(positional) else None) for i, a in enumerate(schema)]
        changed = [v for v, a in zip(values, schema, strict=True) if a.alias_info is not None and a.alias_info.is_write]
        return {storage(t) for t in tensors(changed)}

    @property
    def writes(self) -> set[int]:
        """Memory of its results, or of what it changes."""
        return {storage(t) for t in tensors(self.result)} | self.overwrites


class Recorder(TorchDispatchMode):
    """Keeps every operation below autograd, those on values and those on tangents, and all tensors, alive."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append(Step(func, (args, kwargs or {}), result))
        return result


def needed_steps(steps: Sequence[Step], given: Sequence[Tensor], result: Tensor) -> list[Step]:
    """The steps on memory that holds tangents at some time and from which the result comes.

    So also those that made room for tangents.

    Args:
        steps: all of a computation.
        given: tangents that went in.
        result: the tangent that came out.

    Returns:
        A part of the steps, in their order.

    Raises:
        CannotReplay: if one of them reads a value that is overwritten afterwards.
    """
    sets = [(step.reads, step.writes) for step in steps]
    holds, before = {storage(t) for t in given}, 0
    while len(holds) > before:  # a tangent written over a step's result makes earlier views of that a tangent, too
        before = len(holds)
        for reads, writes in sets:
            if reads & holds:
                holds |= writes
    wanted, used = {storage(result)}, []
    for reads, writes in reversed(sets):
        used.append(bool(writes & holds & wanted))
        if used[-1]:
            wanted |= reads | writes
    needed: list[Step] = []
    constants: set[int] = set()
    for step, use, (reads, _) in zip(steps, reversed(used), sets, strict=True):
        if use:
            needed.append(step)
            constants |= reads - holds
        if step.overwrites & constants:
            raise CannotReplay("The forward pass overwrites a value that the derivative of an operation needs.")
    return needed


def with_copies(steps: Sequence[Step]) -> Iterator[Step]:
    """Views that may be copies: where vectors are mapped over, strides differ from those of the first pass.

    A view through which or under which something is overwritten later stays a view.
    """
    last = {memory: i for i, step in enumerate(steps) for memory in step.overwrites}
    for i, step in enumerate(steps):
        if step.function in VIEWS and all(last.get(memory, -1) < i for memory in step.writes):
            yield Step(torch.ops.aten.reshape.default, step.arguments, step.result)
        else:
            yield step


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    """Tells pieces of memory apart while they are alive."""
    return tensor.untyped_storage()._cdata
