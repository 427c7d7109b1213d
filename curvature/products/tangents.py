"""Forward mode: `J v` in one pass, and the operations on tangents of that pass done again for further vectors.

Operations on tangents are linear in them. Their list, with what they read of the forward pass, is the network made
linear: to run it costs no forward pass, and a convolution in it is two convolutions, which are far cheaper than the
derivative of a convolution's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lapkit.curvature.capture.internals import tree_flatten, tree_leaves, tree_unflatten
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.recording import (
    CannotReplay,
    Recorder,
    Step,
    needed_steps,
    storage,
    tensors,
    with_copies,
)
from lapkit.curvature.products.vectors import Vectors

Place = tuple[Any, ...]


class _Runs(nn.Module):
    """A forward pass as a module, whose parameters can be exchanged for others."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)


def pushed(
    model: nn.Module, run: Callable[[nn.Module], Tensor], parameters: Parameters, vector: Vectors
) -> tuple[Tensor, Tensor]:
    """Outputs and `J v`, by one forward pass with dual numbers.

    Args:
        model: the network.
        run: its forward pass.
        parameters: the weights that change.
        vector: their change v.

    Returns:
        The outputs and their change, of the same shape.

    Raises:
        RuntimeError: if an operation has no derivative in forward mode.
    """
    with torch.no_grad(), _plain_attention(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p.detach(), v) for p, v in zip(parameters.tensors, vector, strict=True)]
        named = {f"model.{name}": dual for name, dual in zip(parameters.names, duals, strict=True)}
        output, tangent = forward_ad.unpack_dual(torch.func.functional_call(_Runs(model, run), named, ()))
    return output, torch.zeros_like(output) if tangent is None else tangent


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Layers of transformers without the fused kernels they take when nothing requires gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Tangents:
    """The operations on tangents in one forward pass, to be done with other tangents.

    Args:
        model: the network.
        run: its forward pass.
        parameters: the weights that change.
        vector: any change of them.

    Raises:
        CannotReplay: if an operation read what a later one overwrote, or tangents came from an unseen operation.
        RuntimeError: if an operation has no derivative in forward mode.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module], Tensor], parameters: Parameters, vector: Vectors
    ) -> None:
        with Recorder() as recorder:
            self.output, tangent = pushed(model, run, parameters, vector)
        needed = needed_steps(recorder.steps, vector, tangent)
        self._inputs, known = [_place(v) for v in vector], {_place(v) for v in vector}
        written = {storage(v) for v in vector}.union(*(step.writes for step in needed))
        self._steps = []
        for step in with_copies(needed):
            self._steps.append(_Replayed.of(step, known, written))
            known |= {_place(t) for t in tensors(step.result)}
        self._result = _place(tangent)
        if self._result not in known:
            raise CannotReplay("The change of the outputs comes from no recorded operation.")

    def __call__(self, vector: Vectors) -> Tensor:
        """`J v`."""
        found = dict(zip(self._inputs, vector, strict=True))
        with torch.no_grad():
            for step in self._steps:
                step(found)
        return found[self._result]


@dataclass(frozen=True, eq=False)
class _Replayed:
    """One operation, with the places of the operands that differ from vector to vector."""

    function: Any
    operands: list[Any]
    changing: list[tuple[int, Place]]
    form: Any
    results: list[Place | None]

    @classmethod
    def of(cls, step: Step, known: set[Place], written: set[int]) -> _Replayed:
        """A step of the first pass.

        Args:
            step: of the pass.
            known: places that earlier steps fill.
            written: memory that any step fills.

        Raises:
            CannotReplay: if an operand was filled by no earlier step.
        """
        operands, form = tree_flatten(step.arguments)
        changing = [(i, _place(t)) for i, t in enumerate(operands) if isinstance(t, Tensor) and storage(t) in written]
        if any(place not in known for _, place in changing):
            raise CannotReplay("A tangent comes from no recorded operation.")
        for i, _ in changing:
            operands[i] = None
        results = [_place(t) if isinstance(t, Tensor) else None for t in tree_leaves(step.result)]
        return cls(step.function, operands, changing, form, results)

    def __call__(self, found: dict[Place, Tensor]) -> None:
        """Do it with the tangents found so far, and add the results to them."""
        operands = list(self.operands)
        for i, place in self.changing:
            operands[i] = found[place]
        args, kwargs = tree_unflatten(operands, self.form)
        for where, result in zip(self.results, tree_leaves(self.function(*args, **kwargs)), strict=True):
            if where is not None:
                found[where] = result


def _place(tensor: Tensor) -> Place:
    """Where and how a tensor lies in memory: two that agree in this are one."""
    return (storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
