"""The few private names of torch that the engine reads, all in this module, each with one test.

A private name that vanishes from a later torch costs speed or a closed form, never a wrong number: `unbatch` is
replaced by collecting cotangents at public `GradientEdge`s (`CAN_UNBATCH`), and a node whose saved operands cannot be
read takes the generic local path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_leaves", "tree_unflatten"]  # as other modules take them from here

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)  # the one is refused where the other is not

_functorch = getattr(torch._C, "_functorch", None)
CAN_UNBATCH = all(
    getattr(_functorch, name, None) is not None for name in ("is_batchedtensor", "get_unwrapped", "maybe_get_bdim")
)


def eagerly() -> AbstractContextManager[Any]:
    """Compiled parts run as they are written: what `torch.compile` makes of them is one opaque node of the tape.

    Where its module was never imported, nothing is compiled, and importing it would take longer than many a fit.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward pass; True where this torch does not tell."""
    everywhere = vars(torch.nn.modules.module)
    found = [vars(module).get(name, True) for name in ("_forward_hooks", "_forward_pre_hooks")]
    found += [everywhere.get(name, True) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
    return any(map(bool, found))


def unbatch(cotangent: Tensor, columns: int) -> Tensor:
    """The physical tensor, columns first, behind a cotangent that a hook sees inside `torch.func.vmap`.

    Args:
        cotangent: what a node prehook received, of logical shape `(*shape)`.
        columns: how many cotangents are mapped over.

    Returns:
        A plain tensor `(columns, *shape)`.
    """
    if _functorch is None or not _functorch.is_batchedtensor(cotangent):
        return cotangent.detach().expand(columns, *cotangent.shape)
    physical = _functorch.get_unwrapped(cotangent)
    return physical.movedim(_functorch.maybe_get_bdim(cotangent), 0).detach()


def saved(node: Node, name: str) -> Any:
    """What `node` kept from the forward pass under `name`, or None if this torch does not expose it."""
    return getattr(node, f"_saved_{name}", None)


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient `node` would accumulate, or None for any other node."""
    # A custom function may keep something of its own under this name.
    return node.variable if node.name() == "torch::autograd::AccumulateGrad" else None  # type: ignore[attr-defined]


def shape_at(node: Node, output: int) -> torch.Size:
    """Shape of the forward output number `output` of `node`, that is of the cotangent it expects there."""
    return torch.Size(node._input_metadata[output].shape)


def dtype_at(node: Node, output: int) -> torch.dtype:
    """Type of the forward output number `output` of `node`."""
    dtype: torch.dtype = node._input_metadata[output].dtype
    return dtype


def local_vjp(node: Node, cotangents: tuple[Tensor | None, ...], slot: int) -> Tensor | None:
    """Vector-Jacobian product of one node alone, with respect to its operand `slot`.

    The engine sums a gradient over broadcast axes after it leaves a node; a node that is called directly does not, so
    the sum is made here.

    Args:
        node: an autograd node whose graph is retained.
        cotangents: one cotangent for each forward output of the node.
        slot: position of the operand in `node.next_functions`.

    Returns:
        The cotangent of that operand, or None if the node passes nothing to it.
    """
    # A custom `torch.autograd.Function` is applied, a built-in node is called; neither is in torch's annotations.
    call: Callable[..., Any] = getattr(node, "apply", node)  # type: ignore[arg-type]
    gradients = call(*cotangents)
    gradient = gradients[slot] if isinstance(gradients, tuple) else gradients
    if gradient is None:
        return None
    child, output = node.next_functions[slot]
    assert child is not None  # a slot is found by walking up from a parameter, so something is below it
    return gradient.sum_to_size(shape_at(child, output))


def outputs_of(node: Node) -> int:
    """How many forward outputs `node` has, that is how many cotangents a direct call takes."""
    return len(node._input_metadata)
