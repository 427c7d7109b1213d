"""Some of the examples of a data set, whatever batches it comes in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.inputs import can_be_cut, map_tensors, unpack

Subset = int | Sequence[int] | Tensor


def chosen_examples(
    data: Iterable[Any], subset: Subset, generator: torch.Generator | None = None
) -> Iterator[tuple[Any, ...]]:
    """Batches of those examples alone, from one pass over the data.

    Args:
        data: batches `(inputs, targets)` or `(inputs, targets, weights)`.
        subset: how many examples, drawn without replacement and with equal probabilities; or their places in the order
            of the data, from zero.
        generator: on the CPU; the only source of randomness.

    Yields:
        Batches of the form of the data's; for a number of examples only after the whole pass.

    Raises:
        ValueError: if the subset is empty, names an example twice or one that is not there, or batches cannot be cut.
        TypeError: if the subset is neither a number nor a vector of integers.
    """
    if isinstance(subset, bool | float):
        raise TypeError(f"A subset of the data is a number of examples or a vector of their places, got {subset!r}.")
    if isinstance(subset, int):
        yield from _drawn(data, subset, generator)
    else:
        yield from _picked(data, torch.as_tensor(subset))


def _picked(data: Iterable[Any], places: Tensor) -> Iterator[tuple[Any, ...]]:
    """The examples at these places.

    Raises:
        ValueError: if there is none, one is named twice, or is not there.
        TypeError: if they are no integers.
    """
    if places.numel() == 0:
        raise ValueError("A subset of the data has at least one example, got none.")
    if places.is_floating_point() or places.is_complex() or places.dtype == torch.bool or places.ndim != 1:
        raise TypeError(
            f"Expected the places of examples as a vector of integers, got {places.dtype} {tuple(places.shape)}."
        )
    wanted = places.cpu().long()
    if len(wanted.unique()) < len(wanted) or int(wanted.min()) < 0:
        raise ValueError("A subset of the data names no example twice, and counts them from zero.")
    begin = 0
    for number, batch in enumerate(data):
        parts, examples = _parts(batch, number)
        here = wanted[(wanted >= begin) & (wanted < begin + examples)] - begin
        if len(here):
            yield _take(parts, here)
        begin += examples
    if int(wanted.max()) >= begin:
        raise ValueError(f"The subset names example {int(wanted.max())}, but the data has {begin} examples.")


def _drawn(data: Iterable[Any], count: int, generator: torch.Generator | None) -> Iterator[tuple[Any, ...]]:
    """So many examples: those of the largest of independent uniform numbers, one drawn for each.

    Raises:
        ValueError: if the number is not positive, or the data has fewer.
    """
    if count < 1:
        raise ValueError(f"A subset of the data has at least one example, got subset_of_data={count}.")
    best: list[tuple[float, int, int]] = []  # key, batch, place in it
    held: dict[int, tuple[Any, ...]] = {}
    seen = 0
    for number, batch in enumerate(data):
        held[number], examples = _parts(batch, number)
        seen += examples
        keys = torch.rand(examples, generator=generator, dtype=torch.float64).tolist()
        best = sorted([*best, *((key, number, place) for place, key in enumerate(keys))])[-count:]
        held = {origin: held[origin] for origin in sorted({origin for _, origin, _ in best})}
    if seen < count:
        raise ValueError(f"The data has {seen} examples, fewer than subset_of_data={count}.")
    for origin, parts in held.items():
        yield _take(parts, torch.tensor(sorted(place for _, source, place in best if source == origin)))


def _parts(batch: Any, number: int) -> tuple[tuple[Any, ...], int]:
    """Inputs, targets and perhaps weights, and how many examples there are.

    Raises:
        ValueError: if not every tensor has the examples along its first axis.
    """
    x, y, weights = unpack(batch, number)
    parts = (x, y) if weights is None else (x, y, weights)
    examples = len(y) if y.ndim else 0
    if not all(can_be_cut(part, examples) for part in parts):
        raise ValueError(
            f"A subset of the data needs batches whose tensors all have the examples along their first axis; batch "
            f"{number} has not. Choose the examples in the data set itself (torch.utils.data.Subset)."
        )
    return parts, examples


def _take(parts: tuple[Any, ...], index: Tensor) -> tuple[Any, ...]:
    """Some of the examples of a batch."""
    return tuple(map_tensors(lambda t: t[index.to(t.device)] if t.ndim else t, part) for part in parts)
