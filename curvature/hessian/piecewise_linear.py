"""Weights in which the outputs are piecewise linear, as those of ReLU networks: there the Hessian is `J^T L J`.

No residual is left, so that the diagonal takes one derivative for each output instead of two for each weight.

Reference:
    Dangel, Backpropagation Beyond the Gradient, appendix B.1.3, whose residuals are those of curved activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.tape import Graph
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable

# Linear, or piecewise so, in all of their operands together; names without "Backward" and the number behind it.
KINDS = """
    Abs AdaptiveAvgPool2D AdaptiveMaxPool2D Add Alias AvgPool2D AvgPool3D Cat Clamp ClampMin Clone ConstantPadNd
    Embedding Expand Flip Hardtanh IndexSelect LeakyRelu MaxPool2DWithIndices MaxPool3DWithIndices Mean Neg Permute
    Relu ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack Sub Sum T Threshold ToCopy Transpose Unbind
    UnsafeSplit UnsafeView Unsqueeze UpsampleBilinear2D UpsampleNearest2D View
"""
LINEAR = frozenset(KINDS.split())
# Linear in each operand by itself.
PRODUCTS = frozenset(["Addmm", "Baddbmm", "Bmm", "Convolution", "Mm", "Mul", "Mv", "PreluKernel"])
NORMS = frozenset(["CudnnBatchNorm", "NativeBatchNorm"])  # likewise, where their statistics are fixed


def piecewise_linear_in(graph: Graph, name: str) -> bool:
    """Whether no node between a parameter and the outputs bends: a sufficient condition, read off the tape."""
    slots: dict[Node, set[int]] = defaultdict(set)
    todo, seen = [graph.leaves[name]], {graph.leaves[name]}
    while todo:
        for consumer, slot in graph.consumers[todo.pop()]:
            slots[consumer].add(slot)
            if not _straight(consumer, slots[consumer]):
                return False
            if consumer not in seen:
                seen.add(consumer)
                todo.append(consumer)
    return True


def _straight(node: Node, slots: set[int]) -> bool:
    """Whether a node is piecewise linear in the operands at these places."""
    kind = node.name().lstrip("_").partition("Backward")[0]
    if kind in LINEAR:
        return True
    if kind == "Div":
        return slots == {0}
    if kind in NORMS:
        return len(slots) == 1 and internals.saved(node, "training") is False
    return kind in PRODUCTS and len(slots) == 1


def loss_hessian(loss: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """`d^2 loss_n / df_n^2` of each example by itself.

    Args:
        loss: the sum over examples, as a function of outputs.
        f: outputs, `(N, *, C)`.

    Returns:
        `(N, M, M)` with M outputs an example.
    """
    f, size = f.clone().requires_grad_(), f[0].numel()
    gradient = torch.autograd.grad(loss(f), f, create_graph=True)[0].flatten(1)
    if not gradient.requires_grad:
        return f.new_zeros(len(f), size, size)
    rows = [torch.autograd.grad(gradient[:, m].sum(), f, retain_graph=True)[0].flatten(1) for m in range(size)]
    return torch.stack(rows, dim=1)


def signed_roots(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Columns `(K, N, M)` whose products sum to the positive part of `(N, M, M)` matrices, and to the negative part."""
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    noise = 10 * values.shape[1] * torch.finfo(values.dtype).eps * values.abs().amax(1, keepdim=True)
    roots = []
    for part in (values, -values):
        columns = (vectors * torch.where(part > noise, part, 0).sqrt()[:, None]).permute(2, 0, 1)
        roots.append(columns[columns.flatten(1).any(1)])
    return roots[0], roots[1]


def square_sums(backprop: Backprop, columns: Tensor, names: set[str]) -> dict[str, Tensor]:
    """`sum_{k,n} (J_n^T s_kn)^2` for some of the parameters.

    Args:
        backprop: the forward pass.
        columns: `(K, N, M)`.
        names: of the parameters.

    Returns:
        Sums in the parameters' shapes.
    """
    sums: dict[str, Tensor] = {}

    def take(name: str, jacobian: LayerJacobian) -> None:
        if name in names:
            found = jacobian.square_sum()
            sums[name] = sums[name] + found if name in sums else found

    if len(columns):
        columns = columns.reshape(len(columns), *backprop.output.shape).to(backprop.output.dtype)
        backprop(columns, take, backprop.plan(len(columns)))
    return {name: summable(total).view(backprop.tensors[name].shape) for name, total in sums.items()}
