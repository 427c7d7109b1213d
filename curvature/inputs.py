"""Batches as users have them: a tensor, a tuple, a dict; moved, counted and indexed without knowing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """`function` applied to every tensor in tuples, lists and mappings; anything else is passed through."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: map_tensors(function, value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        values = [map_tensors(function, value) for value in x]
        return type(x)(values) if type(x) in (tuple, list) else type(x)(*values)  # a named tuple takes its fields
    return x


def to_device(x: Any, device: torch.device) -> Any:
    """Every tensor on `device`, and none made under inference mode, which autograd refuses."""
    return map_tensors(lambda t: t.to(device).clone() if t.is_inference() else t.to(device), x)


def unpack(batch: Any, number: int) -> tuple[Any, Tensor]:
    """Inputs and targets of one batch of a data loader.

    Raises:
        TypeError: if the batch is not a pair `(inputs, targets)` with tensor targets.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"Batch {number} of the data is a {type(batch).__name__}{length}; expected a pair (inputs, targets) "
            "with a tensor of targets. Adapt the data loader's collate_fn."
        )
    return batch[0], batch[1]


def tensors(x: Any) -> list[Tensor]:
    """Every tensor in tuples, lists and mappings."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(keep, x)
    return found


def shapes_of_one(x: Any, examples: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's tensors without the first axis, where that counts the examples."""
    return tuple(tuple(t.shape[1:] if t.ndim > 0 and len(t) == examples else t.shape) for t in tensors(x))


def can_be_cut(x: Any, examples: int) -> bool:
    """Whether every tensor of a batch has the examples along its first axis."""
    found = tensors(x)
    return bool(found) and all(t.ndim > 0 and len(t) == examples for t in found)
