"""Before a long fit: how every parameter is used, in which form its curvature is kept, and what that will cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lapkit.curvature.capture.backprop import Backprop, Plan
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.inputs import to_device
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.quantities.kfac import GGNKronecker
from lapkit.curvature.text import readable_size, text_table

STRUCTURES = ("diag", "kron", "blocks")  # and "full", which is not a sum over parameters


@dataclass(frozen=True)
class ParameterUse:
    """One row of the table.

    Args:
        name: the parameter.
        shape: its shape.
        operations: where it meets the data, one operation for each use.
        closed_form: whether every use has a closed form; else the exact generic path serves, which is slower.
        kronecker: the form of its Kronecker-factored block, such as `64 (x) 576`.
        numbers: how many numbers each structure keeps of it.
        once: multiplications of each structure, whatever the number of columns, for this batch.
        each_column: multiplications that come on top for every column.
    """

    name: str
    shape: tuple[int, ...]
    operations: tuple[str, ...]
    closed_form: bool
    kronecker: str
    numbers: dict[str, int]
    once: dict[str, int]
    each_column: dict[str, int]


@dataclass(frozen=True)
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

    def __str__(self) -> str:
        """The table, and one line for each structure."""
        head = ("parameter", "shape", "used by", "Jacobian", "Kronecker block")
        body = [
            (r.name, " x ".join(map(str, r.shape)) or "scalar", _counted(r.operations), _form(r), r.kronecker)
            for r in self.rows
        ]
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
    x = to_device(x, parameters.device)
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
        rows = _rows(backprop, captured)
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


def _rows(backprop: Backprop, captured: dict[str, LayerJacobian]) -> tuple[ParameterUse, ...]:
    """What the Jacobians of a single column show of every parameter."""
    kronecker = GGNKronecker(backprop.parameters)
    kronecker.begin_batch(backprop.examples, None)
    for name, jacobian in captured.items():
        kronecker.update(name, jacobian, first=True)
    factors = kronecker.result()
    uses = [use for at_node in backprop.uses.values() for use in at_node]
    rows = []
    for name, tensor in backprop.tensors.items():
        mine = [use for use in uses if use.parameter == name]
        operations = tuple(use.node.name().removesuffix("0").removesuffix("Backward") for use in mine)
        closed = all(backprop.rules[use] is not None for use in mine)
        costs = _costs(captured[name], *factors.factors(name)) if name in captured else _no_costs(tensor.numel())
        rows.append(ParameterUse(name, tuple(tensor.shape), operations, closed, *costs))
    return tuple(rows)


def _no_costs(size: int) -> tuple[str, dict[str, int], dict[str, int], dict[str, int]]:
    """Those of a parameter that the output does not depend on."""
    nothing = {"diag": 0, "kron": 0, "blocks": 0}
    return "always zero", {"diag": size, "kron": size, "blocks": size**2}, nothing, nothing


def _costs(
    jacobian: LayerJacobian, left: Tensor, right: Tensor
) -> tuple[str, dict[str, int], dict[str, int], dict[str, int]]:
    """The Kronecker form, the numbers kept and the multiplications, once and for each column, of each structure."""
    _, examples, size = jacobian.shape
    count = int(torch.as_tensor(jacobian.input_moment()[1]).double().mean().ceil())  # of an average group
    outputs, inputs = (right, left) if jacobian.transposed else (left, right)
    groups, rows = outputs.shape[0], outputs.shape[-1]
    alone = count <= examples  # then no column enters the products with the inputs
    numbers = {"diag": size, "kron": left.numel() + right.numel(), "blocks": size**2}
    once = {
        "diag": examples * size if alone else 0,
        "kron": count * inputs.numel(),
        "blocks": examples * size**2 if alone else 0,
    }
    each = {
        "diag": examples * groups * rows if alone else count * size,
        "kron": count * outputs.numel(),
        "blocks": examples * groups * rows**2 if alone else examples * size**2,
    }
    return _block(jacobian, left, right), numbers, once, each


def _block(jacobian: LayerJacobian, left: Tensor, right: Tensor) -> str:
    """How a Kronecker block is written in the table."""
    if isinstance(jacobian, DenseJacobian):  # without factors
        return "exact" if left.shape[0] == 1 else "diagonal"
    product = f"{_factor(left)} (x) {_factor(right)}"
    return product if left.shape[0] == 1 else f"{left.shape[0]} x ({product})"


def _factor(factor: Tensor) -> str:
    return f"diagonal {factor.shape[-1]}" if factor.ndim == 2 else str(factor.shape[-1])


def _form(row: ParameterUse) -> str:
    if not row.operations:
        return "zero"
    return "closed form" if row.closed_form else "generic (slow)"


def _counted(operations: tuple[str, ...]) -> str:
    counts = {o: operations.count(o) for o in operations}
    return ", ".join(o if c == 1 else f"{c} x {o}" for o, c in counts.items())
