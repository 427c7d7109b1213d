"""The engine against plain autograd on a user's own model: no vmap, no tape reading, one output number at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.capture.self_check import TOLERANCE
from lapkit.curvature.inputs import can_be_cut, cut
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.parameters import Parameters, borrowed


@dataclass(frozen=True)
class Verification:
    """How far the captured Jacobian is from autograd's, parameter by parameter.

    Args:
        errors: the largest difference over all compared rows, relative to the largest entry of the parameter's rows
            (or to a millionth of the largest of all, if it is smaller).
        compared: how many rows `(example, output)` were compared.
        tolerance: what rounding explains.
    """

    errors: dict[str, float]
    compared: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every parameter agrees up to rounding."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        """One line for each parameter and the verdict."""
        width = max(len(name) for name in self.errors)
        lines = [
            f"{name.ljust(width)}  {error:.1e}{'' if error <= self.tolerance else '  WRONG'}"
            for name, error in self.errors.items()
        ]
        verdict = "agrees with" if self.passed else "DIFFERS from"
        lines.append(
            f"The captured Jacobian {verdict} autograd on {self.compared} rows (tolerance {self.tolerance:g})."
        )
        return "\n".join(lines)


def verify(
    model: nn.Module,
    x: Any,
    *,
    parameters: Parameters | Iterable[str] | None = None,
    rows: int = 64,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    memory_budget: int | None = None,
) -> Verification:
    """Compare rows of the captured Jacobian with those that autograd finds for each example alone.

    Where the inputs can be cut into examples, each example is run by itself, so that nothing the others do can hide.

    Args:
        model: the network; it is given back as it was.
        x: one batch of inputs.
        parameters: the selection, or names of parameters or modules; all trainable ones by default.
        rows: how many pairs of an example and an output number to compare, spread evenly; all where there are fewer.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        memory_budget: bytes that intermediates may take.

    Returns:
        The errors; print it to read them.

    Raises:
        ValueError: if there is no row to compare, or the engine refuses the model.
        RuntimeError: if the engine's own first check fails already.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> verify(nn.Linear(3, 2), torch.ones(4, 3)).passed
        True
    """
    if rows < 1:
        raise ValueError(f"At least one row must be compared, got rows={rows}.")
    parameters = Parameters.selected(model, parameters)
    with borrowed(model, parameters):
        engine = Engine(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
        output, jacobian = engine.jacobian(x)
        examples, outputs = len(output), output[0].numel()
        chosen = torch.linspace(0, examples * outputs - 1, min(rows, examples * outputs)).long().tolist()
        errors = dict.fromkeys(parameters.names, 0.0)
        scales = dict.fromkeys(parameters.names, 0.0)
        for row in chosen:
            example, number = divmod(row, outputs)
            wanted = _autograd_row(engine, x, example, number, examples)
            unit = output.new_zeros(outputs, examples)
            unit[number, example] = 1
            for name, part, expected in zip(parameters.names, jacobian.parts, wanted, strict=True):
                found = part.pull_back(summable(unit))
                error = float((found - expected.reshape(-1)).abs().max())
                errors[name] = error if not error <= errors[name] else errors[name]  # NaN is kept
                scales[name] = max(scales[name], float(expected.abs().max()))
    tolerance = TOLERANCE[output.dtype]
    floor = 1e-6 * max(scales.values()) or 1.0  # a derivative that is nothing but rounding is not held against it
    relative = {name: error / max(scales[name], floor) for name, error in errors.items()}
    return Verification(relative, len(chosen), tolerance)


def _autograd_row(engine: Engine, x: Any, example: int, number: int, examples: int) -> tuple[Tensor, ...]:
    """The gradient of one output number of one example, by a pass of that example alone where it can be cut out."""
    if can_be_cut(x, examples):
        output = engine.outputs(cut(x, slice(example, example + 1)))[0]
    else:
        output = engine.outputs(x)[example]
    return torch.autograd.grad(output.reshape(-1)[number], engine.parameters.tensors, materialize_grads=True)
