"""How a model uses each of its parameters: the operations, the form of the curvature, what a structure of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.tape import operation
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian
from lapkit.curvature.quantities.kfac import GGNKronecker

STRUCTURES = ("diag", "kron", "blocks")  # and "full", which is not a sum over parameters
# The Kronecker form; the numbers kept and the multiplications, once and for each column, of each structure.
_Costs = tuple[str, dict[str, int], dict[str, int], dict[str, int]]


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

    @property
    def used_by(self) -> str:
        """The operations in one line, each with how often it uses the parameter."""
        return ", ".join(o if n == 1 else f"{n} x {o}" for o, n in Counter(self.operations).items())

    @property
    def form(self) -> str:
        """How its Jacobian is found."""
        if not self.operations:
            return "zero"
        return "closed form" if self.closed_form else "generic (slow)"


def parameter_uses(backprop: Backprop, captured: Mapping[str, LayerJacobian]) -> tuple[ParameterUse, ...]:
    """What the Jacobians of a single column show of every parameter.

    Args:
        backprop: the pass.
        captured: the Jacobians that it handed over, by parameter.

    Returns:
        One row for each parameter.
    """
    kronecker = GGNKronecker(backprop.parameters)
    kronecker.begin_batch(backprop.examples, None)
    for name, jacobian in captured.items():
        kronecker.update(name, jacobian, first=True)
    factors = kronecker.result()
    uses = [use for at_node in backprop.uses.values() for use in at_node]
    rows = []
    for name, tensor in backprop.tensors.items():
        mine = [use for use in uses if use.parameter == name]
        operations = tuple(operation(use.node).removesuffix("Backward") for use in mine)
        closed = all(backprop.rules[use] is not None for use in mine)
        costs = _costs(captured[name], *factors.factors(name)) if name in captured else _no_costs(tensor.numel())
        rows.append(ParameterUse(name, tuple(tensor.shape), operations, closed, *costs))
    return tuple(rows)


def _no_costs(size: int) -> _Costs:
    """Those of a parameter that the output does not depend on."""
    nothing = {"diag": 0, "kron": 0, "blocks": 0}
    return "always zero", {"diag": size, "kron": size, "blocks": size**2}, nothing, nothing


def _costs(jacobian: LayerJacobian, left: Tensor, right: Tensor) -> _Costs:
    """Those of a Jacobian and the factors of its Kronecker block."""
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
