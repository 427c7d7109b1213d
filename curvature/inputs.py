"""Batches as users have them: a tensor, a tuple, a dict; moved, counted and indexed without knowing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def all_finite(t: Tensor) -> bool:
    """Whether no number is NaN or infinite; the sum, which takes a third of the time, is finite only then."""
    return bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all())


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


def unpack(batch: Any, number: int) -> tuple[Any, Tensor, Tensor | None]:
    """Inputs, targets and, where there are any, weights of the examples of one batch of a data loader.

    A mapping with `labels`, as tokenised data sets have them, is the inputs and the targets in one.

    Raises:
        TypeError: if the batch is neither `(inputs, targets)` nor `(inputs, targets, weights)` with tensors of targets
            and of floating weights, one for each example.
        ValueError: if a weight is negative or not finite.
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"], None
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or not isinstance(batch[1], Tensor):
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"Batch {number} of the data is a {type(batch).__name__}{length}; expected a pair (inputs, targets) "
            "with a tensor of targets, or (inputs, targets, weights). Adapt the data loader's collate_fn."
        )
    return batch[0], batch[1], example_weights(batch[2], number) if len(batch) == 3 else None


def example_weights(weights: Any, number: int) -> Tensor:
    """The third part of a batch, if it can be weights of examples `(N,)`.

    Integers are refused: the third of three is more often a label than a weight.

    Raises:
        TypeError: if it is no vector of floating numbers.
        ValueError: if a weight is negative or not finite.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.ndim != 1:
        kind = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"Batch {number} of the data is a tuple of length 3 whose last part is {kind}; expected a pair (inputs, "
            "targets), or (inputs, targets, weights) with floating weights of shape (N,). Several inputs go into one "
            "part, ((a, b), targets): adapt the data loader's collate_fn."
        )
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"Batch {number} of the data has weights that are negative, NaN or infinite.")
    return weights


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
    """Whether every tensor of a batch has the examples along its first axis; a single number belongs to all of them.

    A list of as many tensors as there are examples may have one for each, whatever their lengths.
    """
    if is_ambiguous(x, examples):
        return False
    found = [t for t in tensors(x) if t.ndim > 0]
    return bool(found) and all(len(t) == examples for t in found)


def is_ambiguous(x: Any, examples: int) -> bool:
    """Whether a list could be several inputs for all examples or one tensor for each of them."""
    return isinstance(x, list) and len(x) == examples > 1


def cut(x: Any, part: slice) -> Any:
    """The examples of a part of a batch that `can_be_cut`."""
    return map_tensors(lambda t: t[part] if t.ndim > 0 else t, x)
