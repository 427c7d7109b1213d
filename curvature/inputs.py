"""Batches as users have them: a tensor, a tuple, a dict; moved, counted and indexed without knowing the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

TARGET_KEYS = ("labels", "label")


def all_finite(t: Tensor) -> bool:
    """Whether no number is NaN or infinite; the sum, which takes a third of the time, is finite only then."""
    return bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all())


def map_tensors(function: Callable[[Any], Tensor], x: Any, kind: Any = Tensor) -> Any:
    """`function` applied to every tensor in tuples, lists and mappings; anything else is passed through."""
    if isinstance(x, kind):
        return function(x)
    if isinstance(x, Mapping):
        return {key: map_tensors(function, value, kind) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        values = [map_tensors(function, value, kind) for value in x]
        return type(x)(values) if type(x) in (tuple, list) else type(x)(*values)  # a named tuple takes its fields
    return x


def to_device(x: Any, device: torch.device) -> Any:
    """Every tensor, and every array of numpy, on `device`; none made under inference mode, which autograd refuses."""
    x = as_tensors(x)
    return map_tensors(lambda t: t.to(device).clone() if t.is_inference() else t.to(device), x)


def check_batches(data: Any) -> None:
    """Refuse what gives examples one at a time, or is a batch itself.

    Raises:
        TypeError: if the data is none, a data set without a loader, tensors or arrays, or a function.
    """
    if data is None:
        raise TypeError("The data is None; expected a data loader or a list of batches.")
    if inspect.isroutine(data):
        raise TypeError(
            f"The data is {data!r:.80}; expected a data loader or a list of batches. If it makes batches, call it, "
            "list(batches()), since some methods read the data more than once."
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"The data is a {type(data).__name__}, which gives one example at a time; expected batches. Wrap it: "
            "torch.utils.data.DataLoader(data, batch_size=...)."
        )
    array = (Tensor, np.ndarray)
    if isinstance(data, (*array, Mapping)) or (isinstance(data, tuple) and any(isinstance(d, array) for d in data)):
        raise TypeError(
            f"The data is a {type(data).__name__}, which looks like one batch; expected a data loader or a list of "
            "batches. For a single batch give [(inputs, targets)]."
        )


def numbered(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches of a data set, with their numbers.

    Raises:
        TypeError: if the data is none, a data set without a loader, or tensors or arrays.
    """
    check_batches(data)
    yield from enumerate(data)


def unpack(batch: Any, number: int) -> tuple[Any, Tensor, Tensor | None]:
    """Inputs, targets and, where there are any, weights of the examples of one batch of a data loader.

    A mapping with `labels` or `label`, as tokenised data sets have them, is the inputs and the targets in one. Arrays
    of numpy become tensors.

    Raises:
        TypeError: if the batch is neither `(inputs, targets)` nor `(inputs, targets, weights)` with tensors of targets
            and of floating weights, one for each example.
        ValueError: if a weight is negative or not finite, or targets are ragged.
    """
    if isinstance(batch, Mapping):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        if key is None:
            raise TypeError(
                f"Batch {number} of the data is a {type(batch).__name__} of {list(batch)}; expected a pair (inputs, "
                f"targets), or targets called {' or '.join(TARGET_KEYS)}. Adapt the data loader's collate_fn."
            )
        return as_tensors({k: v for k, v in batch.items() if k != key}), targets(batch[key], number), None
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"Batch {number} of the data is a {type(batch).__name__}{length}; expected a pair (inputs, targets) "
            "with a tensor of targets, or (inputs, targets, weights). Adapt the data loader's collate_fn."
        )
    weights = example_weights(as_tensors(batch[2]), number) if len(batch) == 3 else None
    return as_tensors(batch[0]), targets(batch[1], number), weights


def as_tensors(x: Any) -> Any:
    """Every array of numpy in tuples, lists and mappings as a tensor; anything else is passed through."""
    return map_tensors(torch.as_tensor, x, kind=(Tensor, np.ndarray))


def targets(y: Any, number: int) -> Tensor:
    """The targets of a batch as a tensor, out of a tensor, an array or a list with one entry for each example.

    Raises:
        TypeError: if they are something else.
        ValueError: if the entries differ in shape, or are no numbers.
    """
    if isinstance(y, Tensor):
        return y
    if not isinstance(y, (np.ndarray, list, tuple)):
        raise TypeError(
            f"Batch {number} of the data is a pair with a {type(y).__name__} for targets; expected a pair (inputs, "
            "targets) with a tensor of targets, one for each example. Adapt the data loader's collate_fn; single "
            "examples become batches by torch.utils.data.DataLoader(data, batch_size=...)."
        )
    try:
        return torch.stack(list(y)) if any(isinstance(t, Tensor) for t in y) else torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The targets of batch {number}, a {type(y).__name__} of {len(y)}, make no tensor ({error}). Expected one "
            "number or one tensor of equal shape for each example: pad ragged targets in the data loader's collate_fn, "
            "with ignore_index where none is."
        ) from error


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
