"""Whether what was found in one pass holds for the next one with the same operations and shapes.

Where examples stand must not depend on the data. That is so for operations that are known to leave each example where
it is, or whose places are part of the graph's signature, as long as no operand from the data can move examples about.
Any other graph is read and verified anew for every batch: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.tape import Graph, Use, operation

ELEMENTWISE = """
    Abs Acos Add Addcdiv Addcmul Alias Asin Atan Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp Expm1
    Gelu Glu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P Log2 LogSigmoid MaskedFill Maximum
    Minimum Mish Mul NanToNum Neg Pow PreluKernel Reciprocal Relu Rsqrt Rsub Selu Sigmoid Sign Silu Sin Sinh Softplus
    Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Where
"""
REDUCTIONS = """
    Amax Amin Cumprod Cumsum LinalgVectorNorm LogSoftmax Logsumexp Max Mean Min Norm Prod SafeSoftmax Softmax Std
    StdMean Sum Var VarMean
"""
LAYERS = """
    Addmm Baddbmm Bmm Convolution CudnnBatchNorm CudnnRnn Embedding FusedRmsNorm Linear MiopenBatchNorm
    MkldnnRnnLayer Mm Mv NativeBatchNorm NativeGroupNorm NativeLayerNorm ThnnFusedGruCell ThnnFusedLstmCell
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D
    MaxPool2DWithIndices MaxPool3DWithIndices PixelShuffle PixelUnshuffle
"""
VIEWS = """
    AsStrided Cat Col2Im ConstantPadNd Diagonal Expand Flip Im2Col Permute ReflectionPad1D ReflectionPad2D
    ReflectionPad3D Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Select Slice Split
    SplitWithSizes Squeeze Stack T Transpose Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View
"""
STEADY = frozenset((ELEMENTWISE + REDUCTIONS + LAYERS + VIEWS).split()) | {"torch::autograd::AccumulateGrad"}
FAMILIES = ("ScaledDotProduct", "UpsampleNearest", "UpsampleLinear", "UpsampleBilinear", "UpsampleTrilinear")

# Operands of which one may be from the data and move what the other holds, with the names under which they are saved.
PAIRS = {
    "Mm": ((0, "self"), (1, "mat2")),
    "Bmm": ((0, "self"), (1, "mat2")),
    "Mv": ((0, "self"), (1, "vec")),
    "Addmm": ((1, "mat1"), (2, "mat2")),
    "Baddbmm": ((1, "batch1"), (2, "batch2")),
    "Convolution": ((0, "input"), (1, "weight")),
}

# Operands that are combined entry by entry. One that has two axes of examples picks, as a matrix would.
MASKS = {"Mul": ("self", "other"), "Div": ("other",), "Where": ("condition",), "MaskedFill": ("mask",)}
MASKS["Addcmul"] = ("tensor1", "tensor2")


def holds_for_others(graph: Graph, uses: Iterable[Use], own: set[int], examples: int) -> bool:
    """Whether the layouts found in a pass hold for every pass with the same signature and shapes.

    Args:
        graph: its tape.
        uses: where parameters meet the data; what is above them holds examples.
        own: addresses of the memory of the model's own tensors, which stay the same.
        examples: their number N.

    Returns:
        False if anything on the tape might move examples as the data says.
    """
    if not all(operation(node) in STEADY or operation(node).startswith(FAMILIES) for node in graph.nodes):
        return False
    if any(_exchanges(node) for node in graph.nodes):
        return False
    carrying: set[Node] = set()
    todo = [use.node for use in uses]
    while todo:
        node = todo.pop()
        if node not in carrying:
            carrying.add(node)
            todo.extend(consumer for consumer, _ in graph.consumers[node])
    return not any(_moved_by_data(node, carrying, own, examples) for node in carrying)


def _exchanges(node: Node) -> bool:
    """Whether examples that stand along the first axis are turned round, perhaps for some batches only."""
    if operation(node) not in ("Flip", "Roll"):
        return False
    return 0 in (internals.saved(node, "dims") or (0,))


def _moved_by_data(node: Node, carrying: set[Node], own: set[int], examples: int) -> bool:
    """Whether activations meet an operand from the data that could exchange examples, such as a permutation matrix."""
    kind = operation(node)
    if kind == "Embedding":  # activations as the table
        return node.next_functions[0][0] in carrying
    if kind.startswith("ScaledDotProduct"):
        return internals.shape_at(node, 0)[0] % examples != 0
    if kind in MASKS:
        operands = (internals.saved(node, name) for name in MASKS[kind])
        return any(_from_data(o, own) and _two_axes(o, examples) for o in operands)
    pair = PAIRS.get(kind)
    if pair is None:
        return False
    for (slot, name), (other, _) in (pair, pair[::-1]):
        if node.next_functions[slot][0] is not None or node.next_functions[other][0] not in carrying:
            continue
        if _from_data(internals.saved(node, name), own):
            return True
    return False


def _from_data(operand: Any, own: set[int]) -> bool:
    """Whether an operand is a tensor that is neither differentiated nor the model's own."""
    if not isinstance(operand, Tensor) or operand.requires_grad:
        return False
    return operand.untyped_storage().data_ptr() not in own


def _two_axes(operand: Tensor, examples: int) -> bool:
    """Whether an operand has one example's numbers for another; a gate has one axis of examples, first if at all."""
    shape = list(operand.shape)
    flattened = bool(shape) and shape[0] not in (1, examples)
    return shape.count(examples) > 1 or (flattened and sum(n % examples == 0 for n in shape) > 1)
