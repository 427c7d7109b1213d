"""Closed forms: what an operation's cotangent says about a weight, for the operations where networks spend time.

A rule looks at one use of a parameter once a batch and returns a function from cotangents `(K, *shape)` to that use's
Jacobian, or None if this is not the case it knows; the exact local path then serves. Adding an operation is adding
one function to `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.internals import saved, shape_at
from lapkit.curvature.jacobians import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.layout import Layout
from lapkit.curvature.outer_product import OuterProduct
from lapkit.curvature.tape import Use

FromCotangent = Callable[[Tensor], LayerJacobian]


def closed_form(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """The closed form of one use of a parameter, if there is one.

    Args:
        use: the node and operand.
        layout: where the examples stand in the node's cotangent.
        examples: their number N.
        parameter: the weight.
        leaf: its node in the graph.
        budget: bytes an intermediate may take.

    Returns:
        A function from cotangents `(K, *shape)` to the Jacobian, or None.
    """
    rule = RULES.get((use.node.name(), use.slot))
    return rule(use, layout, examples, parameter, leaf, budget) if rule else None


def _is_transpose(node: Node) -> bool:
    """Whether a node transposes a matrix, however that was written."""
    if node.name() == "TBackward0":
        return True
    if node.name() == "TransposeBackward0":  # parity tells the two axes apart, also where -1 is stored as 2^64 - 1
        return (int(saved(node, "dim0")) - int(saved(node, "dim1"))) % 2 == 1
    return node.name() == "PermuteBackward0" and int(saved(node, "dims")[0]) % 2 == 1


def _orientation(use: Use, parameter: Tensor, leaf: Node) -> bool | None:
    """Whether the operand is the matrix `parameter` transposed; None if it is something else made of it."""
    child = use.node.next_functions[use.slot][0]
    if child is leaf:
        return False
    if child is None or parameter.ndim != 2 or child.next_functions[0][0] is not leaf:
        return None
    return True if _is_transpose(child) else None


def _right_operand(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """`x W`: rows of x and of the cotangent are examples or positions."""
    flipped = _orientation(use, parameter, leaf)
    a = saved(use.node, "mat1" if use.node.name() == "AddmmBackward0" else "self")
    if flipped is None or a is None or layout.axis != 0 or saved(use.node, "alpha") not in (None, 1):
        return None
    a = summable(layout.canonical(a.detach()[None], examples)[0]).unsqueeze(2)  # (N, T, 1, I)
    return lambda c: OuterProduct(
        a, summable(layout.canonical(c, examples)).unsqueeze(3), transposed=not flipped, budget=budget
    )


def _left_operand(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """`W x`: columns of x and of the cotangent are examples or positions."""
    flipped = _orientation(use, parameter, leaf)
    a = saved(use.node, "mat2")
    if flipped is None or a is None or layout.axis != 1:
        return None
    a = summable(layout.canonical(a.detach()[None], examples)[0]).unsqueeze(2)
    return lambda c: OuterProduct(
        a, summable(layout.canonical(c, examples)).unsqueeze(3), transposed=flipped, budget=budget
    )


def _convolution_weight(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """Patches of the input against cotangents at the output positions, a group at a time; one to three dimensions."""
    x = saved(use.node, "input")
    if x is None or saved(use.node, "transposed") or layout.axis != 0 or _orientation(use, parameter, leaf) is None:
        return None
    groups = int(saved(use.node, "groups"))
    a = _patches(use.node, x.detach(), parameter.shape[2:], groups)  # (N R, G, I, L)
    a = layout.canonical(a[None], examples)[0]  # (N, R, G, I, L)
    a = summable(a).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (N, T, G, I)

    def jacobian(c: Tensor) -> OuterProduct:
        g = layout.canonical(c.flatten(3).unflatten(2, (groups, -1)), examples)  # (K, N, R, G, O, L)
        return OuterProduct(a, summable(g).permute(0, 1, 2, 5, 3, 4).flatten(2, 3), budget=budget)

    return jacobian


def _patches(node: Node, x: Tensor, kernel: torch.Size, groups: int) -> Tensor:
    """All patches that a convolution sees, `(N, G, I, L)`: inputs of a patch by output positions.

    Views of the padded input with overlapping strides, so that any number of dimensions is one line; copied once, by
    the flattening.
    """
    stride, padding, dilation = (tuple(map(int, saved(node, n))) for n in ("stride", "padding", "dilation"))
    x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)]).contiguous()
    outputs = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *kernel, *outputs),
        (
            *x.stride()[:2],
            *(n * d for n, d in zip(steps, dilation, strict=True)),
            *(n * s for n, s in zip(steps, stride, strict=True)),
        ),
    )
    return view.reshape(len(x), groups, x.shape[1] // groups * math.prod(kernel), math.prod(outputs))


def _convolution_bias(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """One number a channel, summed over positions: exact, where peers also approximate the bias."""
    if layout.axis != 0 or use.node.next_functions[use.slot][0] is not leaf:
        return None
    return lambda c: DenseJacobian(summable(layout.canonical(c.flatten(3), examples)).sum((2, 4)))


def _broadcast(
    use: Use, layout: Layout, examples: int, parameter: Tensor, leaf: Node, budget: int
) -> FromCotangent | None:
    """A parameter that is added: its Jacobian is the cotangent, summed over the axes it was broadcast along."""
    if use.node.next_functions[use.slot][0] is not leaf or saved(use.node, "beta") not in (None, 1):
        return None
    scale = 1.0
    if use.slot == 1 and use.node.name() in ("AddBackward0", "SubBackward0"):
        alpha = saved(use.node, "alpha")
        if alpha is None:
            return None
        scale = float(alpha) if use.node.name() == "AddBackward0" else -float(alpha)

    own = (1,) * (len(shape_at(use.node, 0)) - parameter.ndim) + tuple(parameter.shape)
    if own[layout.axis] != 1:  # the parameter has its own value for each example: nothing to sum along that axis
        return None

    def jacobian(c: Tensor) -> DenseJacobian:
        rest = own[: layout.axis] + own[layout.axis + 1 :]
        values = summable(layout.canonical(c, examples))  # (K, N, R, *rest)
        values = values.squeeze(2) if values.shape[2] == 1 else values.sum(2)  # a view where there is nothing to sum
        values = values.sum_to_size(*values.shape[:2], *rest)
        values = values.flatten(2) if rest else values[..., None]
        return DenseJacobian(values if scale == 1 else scale * values)

    return jacobian


RULES: dict[tuple[str, int], Callable[..., FromCotangent | None]] = {
    ("AddmmBackward0", 2): _right_operand,
    ("MmBackward0", 1): _right_operand,
    ("MmBackward0", 0): _left_operand,
    ("ConvolutionBackward0", 1): _convolution_weight,
    ("ConvolutionBackward0", 2): _convolution_bias,
    ("AddmmBackward0", 0): _broadcast,
    ("AddBackward0", 0): _broadcast,
    ("AddBackward0", 1): _broadcast,
    ("SubBackward0", 0): _broadcast,
    ("SubBackward0", 1): _broadcast,
}
