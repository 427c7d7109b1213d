"""Closed forms of nodes that the CPU does not have, and what a closed form declines."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lapkit.curvature.capture.layout import Layout
from lapkit.curvature.capture.tape import Use
from lapkit.curvature.rules.site import Site
from lapkit.curvature.rules.table import RULES

N = 3


class Stored:
    """A node of another device: a name, what it saved, what is below it."""

    def __init__(node, name, shape, leaf_at, leaf, /, **saved):
        node.name = lambda: f"{name}Backward0"
        node._input_metadata = [torch.empty(shape)]
        node.next_functions = tuple((leaf, 0) if slot == leaf_at else (None, 0) for slot in range(3))
        for key, value in saved.items():
            setattr(node, f"_saved_{key}", value)


def statistics(x):
    return {"running_mean": x.mean((0, 2)), "running_var": x.var((0, 2)), "training": False, "weight": None}


def elsewhere(name):
    """A node that the CPU does not have, its parameter at slot 1, and the same function in operations that it has."""
    x, w = torch.randn(N, 4, 5), torch.randn(4)
    if name == "Linear":
        x, w = torch.randn(N, 2, 4), torch.randn(5, 4)
        return w, (N, 2, 5), {"input": x, "weight": w}, lambda w: F.linear(x, w)
    if name == "FusedRmsNorm":
        x = torch.randn(N, 2, 4)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return w, x.shape, {"input": x, "result1": scale, "weight": w}, lambda w: F.rms_norm(x, [4], w, 1e-5)
    if name == "ConvolutionOverrideable":
        kernel = torch.randn(3, 4, 2)
        kept = {"stride": (1,), "padding": (0,), "dilation": (1,), "transposed": False, "groups": 1}
        return kernel, (N, 3, 4), {"input": x, **kept}, lambda w: F.conv1d(x, w)
    kept = statistics(x)
    mean, var = kept["running_mean"], kept["running_var"]
    return w, x.shape, {"input": x, "epsilon": 1e-3, **kept}, lambda w: F.batch_norm(x, mean, var, w, eps=1e-3)


@pytest.mark.parametrize(
    "name", ["Linear", "FusedRmsNorm", "ConvolutionOverrideable", "CudnnBatchNorm", "MiopenBatchNorm"]
)
def test_nodes_of_other_devices(name):
    weight, shape, kept, function = elsewhere(name)
    leaf = Stored("Leaf", weight.shape, None, None)
    node = Stored(name, shape, 1, leaf, **kept)
    site = Site(Use("w", node, 1), Layout(0), N, weight, leaf, 2**28)
    cotangents = torch.randn(2, *shape)
    found = RULES[f"{name}Backward0", 1](site)(cotangents).to_dense()
    for k, n in itertools.product(range(2), range(N)):
        (row,) = torch.func.vjp(lambda w: function(w)[n], weight)[1](cotangents[k, n])  # noqa: B023
        torch.testing.assert_close(found[k, n], row.flatten(), rtol=1e-10, atol=1e-10)


def test_a_value_for_each_example_is_declined():
    """There is nothing to sum over where examples meet parameters of their own."""
    parameter = torch.randn(N, 4)
    leaf = Stored("Leaf", parameter.shape, None, None)
    for name, slot in (("Add", 0), ("Mul", 1)):
        node = Stored(name, (N, 4), slot, leaf, self=torch.randn(N, 4))
        assert RULES[f"{name}Backward0", slot](Site(Use("w", node, slot), Layout(0), N, parameter, leaf, 1)) is None


def test_statistics_of_the_batch_are_declined():
    weight, shape, kept, _ = elsewhere("CudnnBatchNorm")
    leaf = Stored("Leaf", weight.shape, None, None)
    node = Stored("CudnnBatchNorm", shape, 1, leaf, **{**kept, "training": True})
    assert RULES["CudnnBatchNormBackward0", 1](Site(Use("w", node, 1), Layout(0), N, weight, leaf, 1)) is None


# The few uses whose derivative is the cotangent itself, whatever the node saved.
NOTHING_NEEDED = {
    *(("AddBackward0", 0), ("SubBackward0", 0), ("LinearBackward0", 2), ("AddcmulBackward0", 0)),
    *(("ConvolutionBackward0", 2), ("ConvolutionOverrideableBackward0", 2)),
}


@pytest.mark.parametrize("use", sorted({*RULES} - NOTHING_NEEDED))
def test_a_missing_operand_is_declined(use):
    """A torch that does not show what a node saved costs speed, not correctness."""
    (name, slot), parameter = use, torch.randn(4)
    leaf = Stored("Leaf", parameter.shape, None, None)
    node = Stored(name.removesuffix("Backward0"), (N, 4), max(slot, 0), leaf)
    assert RULES[use](Site(Use("w", node, max(slot, 0)), Layout(0), N, parameter, leaf, 2**28)) is None
