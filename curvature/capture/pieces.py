"""A large batch in pieces: what one layer leaves the next one reads from the processor's cache, not from memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture import internals
from lapkit.curvature.inputs import can_be_cut, cut, shapes_of_one, tensors

Outputs = Callable[[Any], Tensor]
NEAR = 2**23  # bytes of the largest tensor in a forward pass: measured, with caches of 32 MiB for all cores
FEW = 32  # examples that are not worth a trial
TRIALS = (2, 3)  # examples in each of two small passes, whose differences are what one example adds


class _Sizes(internals.TorchDispatchMode):
    """Notes how many bytes each operation leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        left = function(*args, **(kwargs or {}))
        self.found.append(sum(t.nbytes for t in internals.tree_leaves(left) if isinstance(t, Tensor)))
        return left


class Pieces:
    """Cuts batches of inputs on a CPU where their intermediates would outgrow the cache.

    Two small forward passes tell whether the examples stand along the first axis, so that as many go in as come out,
    and how large the largest tensor is that an example adds. What they found is remembered by the inputs' shapes.
    """

    def __init__(self) -> None:
        self._most: dict[tuple[object, ...], int] = {}

    def __call__(self, x: Any, outputs: Outputs) -> list[Any]:
        """The batch whole, or in parts of nearly equal length.

        Args:
            x: inputs, whatever the model takes.
            outputs: the forward pass, from inputs to `(N, *, C)`.
        """
        found = [t for t in tensors(x) if t.ndim]
        examples = len(found[0]) if found else 0
        if examples <= FEW or not can_be_cut(x, examples) or any(t.device.type != "cpu" for t in found):
            return [x]
        kind = (shapes_of_one(x, examples), tuple(t.dtype for t in found))
        if kind not in self._most:
            self._most[kind] = _most(x, outputs)
        step = -(-examples // -(-examples // self._most[kind]))
        return [cut(x, slice(start, start + step)) for start in range(0, examples, step)]


def _most(x: Any, outputs: Outputs) -> int:
    """How many examples a piece may have, by two small passes."""
    sizes, outcomes = [], []
    for few in TRIALS:
        try:
            with _Sizes() as noted:
                found = outputs(cut(x, slice(few)))
        except Exception:  # a model for batches of a certain size; what is wrong with the inputs, the whole batch tells
            return sys.maxsize
        if len(found) != few:  # the first axis counts something else
            return sys.maxsize
        sizes.append(noted.found)
        outcomes.append(found)
    fewer, more = outcomes
    if not torch.allclose(fewer, more[: len(fewer)], rtol=1e-3, atol=1e-5):  # what was cut was not examples alone
        return sys.maxsize
    largest = max(three - two for two, three in zip(*sizes, strict=False))
    return max(NEAR // max(largest, 1), 1)
