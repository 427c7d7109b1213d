"""The exact fallback: an operation's own backward, with the cotangent masked to one example at a time.

It serves every operation without a closed form, as long as examples do not mix: slower, never wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.layout import AnyLayout
from lapkit.curvature.capture.tape import Use
from lapkit.curvature.jacobians.jacobian import DenseJacobian, summable
from lapkit.curvature.memory import chunk_length

Arrived = dict[int, Tensor]  # cotangents (K, *shape) by output number of a node
PullBack = Callable[[Arrived], Tensor]


def local_pull_back(use: Use, parameter: Tensor, leaf: Node) -> PullBack:
    """The vector-Jacobian product from one node's cotangents `(*shape)` to a parameter, through one of its operands.

    Args:
        use: the node and operand.
        parameter: the weight.
        leaf: its node in the graph.

    Returns:
        A function from cotangents, by output number, to a gradient in the parameter's shape.
    """
    node, total = use.node, internals.outputs_of(use.node)
    child, number = node.next_functions[use.slot]
    assert child is not None  # a slot is found by walking up from a parameter, so something is below it

    def pull_back(given: Arrived) -> Tensor:
        arguments = tuple(given[o] if o in given else _zeros(node, o, parameter) for o in range(total))
        gradient = internals.local_vjp(node, arguments, use.slot)
        if gradient is None:
            return torch.zeros_like(parameter)
        if child is leaf:
            return gradient
        return torch.autograd.grad(GradientEdge(child, number), parameter, gradient, retain_graph=True)[0]

    return pull_back


def local_jacobian(
    pull_back: PullBack,
    layouts: dict[int, AnyLayout],
    examples: int,
    cotangents: Arrived,
    *,
    budget: int,
    together: bool,
) -> DenseJacobian:
    """The Jacobian of a parameter through a node's own backward.

    Args:
        pull_back: what `local_pull_back` returns.
        layouts: where the examples stand in the node's cotangents, by output number.
        examples: their number N.
        cotangents: `(K, *shape)`, by output number.
        budget: bytes that the masked copies may take.
        together: several examples at once under vmap, or one after the other.

    Returns:
        Values `(K, N, P)`.
    """
    columns = len(next(iter(cotangents.values())))
    size = sum(c[0].numel() * c.element_size() for c in cotangents.values())
    step = chunk_length(examples, 4 * size, budget)
    rows = []
    for k in range(columns):
        for chunk in torch.arange(examples).split(step):
            masked = {o: _masked(c[k], layouts[o], examples, chunk) for o, c in cotangents.items()}
            rows.append(_each(pull_back, masked, together=together))
    return DenseJacobian(summable(torch.cat(rows)).unflatten(0, (columns, examples)))


def _masked(cotangent: Tensor, layout: AnyLayout, examples: int, chunk: Tensor) -> Tensor:
    """Copies of a cotangent `(n, *shape)`, each zero outside one example of the chunk."""
    owners = layout.owners(cotangent.shape[layout.axis], examples)
    mask = (chunk[:, None] == owners).to(cotangent)
    return cotangent * mask.reshape(len(chunk), *[1] * layout.axis, -1, *[1] * (cotangent.ndim - layout.axis - 1))


def _each(pull_back: PullBack, masked: Arrived, *, together: bool) -> Tensor:
    """Gradients `(n, P)` for n masked cotangents."""
    if together:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            rows = torch.func.vmap(pull_back)(masked)
    else:
        count = len(next(iter(masked.values())))
        rows = torch.stack([pull_back({o: c[i] for o, c in masked.items()}) for i in range(count)])
    return rows.reshape(len(rows), -1).detach()  # a parameter may have no axis to flatten


def _zeros(node: Node, output: int, like: Tensor) -> Tensor:
    return torch.zeros(internals.shape_at(node, output), dtype=like.dtype, device=like.device)
