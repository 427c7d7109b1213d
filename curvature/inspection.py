"""Before a long fit: how every parameter is used, in which form its curvature is kept, and what that will cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lapkit.curvature.capture.backprop import Plan
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.text import readable_size, text_table
from lapkit.curvature.usage import STRUCTURES, ParameterUse, parameter_uses


@dataclass(frozen=True, repr=False)
class Inspection:
    """How a model's parameters are used, and what each structure of curvature costs on a batch like this one.

    Args:
        rows: one for each selected parameter.
        outputs: shape of the outputs of one example.
        columns: how many columns the exact curvature sends back, at most: one for each output number.
        examples: how many there were in the batch.
        forward: multiplications and additions of a forward pass of it.
        column: those of sending one column back to where the parameters meet the data.
        gradient: those of a forward pass and a gradient.
        itemsize: bytes of a number.
    """

    rows: tuple[ParameterUse, ...]
    outputs: tuple[int, ...]
    columns: int
    examples: int
    forward: int
    column: int
    gradient: int
    itemsize: int

    def memory(self, structure: str) -> int:
        """Bytes that a structure takes once the data has been seen; the full matrix couples all parameters."""
        return self._numbers()[structure] * self.itemsize

    def gradients(self, structure: str, columns: int | None = None) -> float:
        """Operations of one batch in units of those of a gradient pass.

        Args:
            structure: `diag`, `kron`, `blocks` or `full`.
            columns: how many columns are sent back; as many as there are outputs by default.

        Returns:
            A count, not a measurement.
        """
        columns = self.columns if columns is None else columns
        extra = {s: sum(r.once[s] + columns * r.each_column[s] for r in self.rows) for s in STRUCTURES}
        extra["full"] = columns * self.examples * self._numbers()["full"]
        return (self.forward + columns * self.column + 2 * extra[structure]) / max(self.gradient, 1)

    def _numbers(self) -> dict[str, int]:
        """How many numbers each structure keeps; the full matrix couples all parameters."""
        kept = {s: sum(row.numbers[s] for row in self.rows) for s in STRUCTURES}
        return kept | {"full": kept["diag"] ** 2}

    def __repr__(self) -> str:
        """Short, since `inspect` has printed the table."""
        return f"{type(self).__name__}(parameters={len(self.rows)}, outputs={self.outputs}, columns={self.columns})"

    def __str__(self) -> str:
        """The table, and one line for each structure."""
        head = ("parameter", "shape", "used by", "Jacobian", "Kronecker block")
        body = [(r.name, " x ".join(map(str, r.shape)) or "scalar", r.used_by, r.form, r.kronecker) for r in self.rows]
        costs = [
            (name, readable_size(self.memory(name)), f"{self.gradients(name):.3g} gradient passes")
            for name in (*STRUCTURES, "full")
        ]
        weights = sum(r.numbers["diag"] for r in self.rows)
        heading = f"parameters: {len(self.rows)}, weights: {weights:,}, "
        heading += f"outputs: {' x '.join(map(str, self.outputs))}, columns: up to {self.columns}"
        return "\n".join(
            (heading, "", *text_table(head, body), "", *text_table(("structure", "memory", "a batch costs"), costs))
        )


def inspection(
    model: nn.Module,
    x: Any,
    *,
    parameters: Parameters | Iterable[str] | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    memory_budget: int | None = None,
) -> Inspection:
    """Look at how a model uses its parameters.

    Args:
        model: the network; it is given back as it was.
        x: one batch of inputs; costs are those of this batch.
        parameters: the selection, or names of parameters or modules; all trainable ones by default.
        forward_fn: `forward_fn(model, x)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        memory_budget: bytes that intermediates may take.

    Returns:
        One row for each parameter, and costs.

    Raises:
        ValueError: if the engine refuses the model; the message names the reason and the remedy.
        TypeError: if inputs or outputs have a type it cannot take.
    """
    parameters = Parameters.selected(model, parameters)
    with borrowed(model, parameters):
        engine = Engine(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
        operations, output = _counted_operations(lambda: engine.outputs(x))
        gradient, _ = _counted_operations(
            lambda: torch.autograd.grad(output.sum(), parameters.tensors, materialize_grads=True)
        )
        backprop = engine(x)
        captured: dict[str, LayerJacobian] = {}
        one = torch.ones_like(output)[None]
        column, _ = _counted_operations(lambda: backprop(one, captured.__setitem__, Plan(together=False, chunk=1)))
        rows = parameter_uses(backprop, captured)
    return Inspection(
        rows,
        outputs=tuple(output.shape[1:]),
        columns=output[0].numel(),
        examples=len(output),
        forward=operations,
        column=column,
        gradient=operations + gradient,
        itemsize=summable(output[:0]).element_size(),
    )


def _counted_operations(job: Callable[[], Any]) -> tuple[int, Any]:
    """The multiplications and additions of a job, and what it returns."""
    with warnings.catch_warnings():
        # The counter also follows modules, by global hooks, which compiled ones among them warn of.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        with FlopCounterMode(display=False) as counter:
            result = job()
    return counter.get_total_flops(), result


def inspect(model: nn.Module, x: Any, **options: Any) -> Inspection:
    """Print how a model uses its parameters, in which form their curvature is kept and what it costs; see `inspection`.

    Args:
        model: the network; it is given back as it was.
        x: one batch of inputs; costs are those of this batch.
        options: as those of `inspection`.

    Returns:
        What was printed.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> _ = inspect(nn.Linear(3, 2), torch.zeros(4, 3))
        parameters: 2, weights: 8, outputs: 2, columns: up to 2
        ...
    """
    found = inspection(model, x, **options)
    print(found)
    return found
