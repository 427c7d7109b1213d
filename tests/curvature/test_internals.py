"""One test for each private name of torch that the engine reads, so that a torch without it is seen here first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature.capture import internals


def node_of(output):
    return output.grad_fn


def test_all_names_for_unbatching_are_there():
    """Where they are not, the engine collects cotangents at public edges: see test_engine.py."""
    assert internals.CAN_UNBATCH


@pytest.mark.parametrize("in_dim", [0, 1])
def test_unbatch(in_dim):
    """is_batchedtensor, get_unwrapped, maybe_get_bdim: what a node's prehook sees inside torch.func.vmap."""
    w = torch.randn(3, requires_grad=True)
    hidden = w.exp()
    output = hidden.sin()
    cotangents, seen = torch.randn(4, 3), []
    look = lambda g: seen.append((g[0].shape, internals.unbatch(g[0], 4)))  # noqa: E731
    handles = [node_of(t).register_prehook(look) for t in (output, hidden)]
    given = cotangents if in_dim == 0 else cotangents.T
    torch.func.vmap(lambda c: torch.autograd.grad(output, w, c, retain_graph=True), in_dims=in_dim)(given)
    for handle in handles:
        handle.remove()
    assert [logical for logical, _ in seen] == [(3,), (3,)]
    arrived, physical = (tensor for _, tensor in seen)
    torch.testing.assert_close(arrived, cotangents)
    torch.testing.assert_close(physical, cotangents * hidden.detach().cos())
    assert not torch.func.vmap(lambda c: c + 0)(physical).requires_grad  # an ordinary tensor that outlives the vmap


def test_unbatch_a_cotangent_that_is_the_same_for_all_columns():
    c = torch.randn(3)
    torch.testing.assert_close(internals.unbatch(c, 4), c.expand(4, 3))


def test_leaf_of():
    """AccumulateGrad.variable: the parameter that a leaf of the tape belongs to."""
    w = torch.randn(3, requires_grad=True)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.variable = w  # another kind of node may use the name for itself
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    node = Keeps.apply(w).grad_fn
    assert internals.leaf_of(node) is None
    leaf = node.next_functions[0][0]
    assert internals.leaf_of(leaf) is w
    assert torch.autograd.graph.get_gradient_edge(w).node is leaf


X, W, B = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(4, 3), (3, 2), (2,)])
)

# (operation, name of its node, {saved name: expected})
SAVED = {
    "addmm": (
        lambda x, w, b: torch.addmm(b, x, w, alpha=3, beta=2),
        "AddmmBackward0",
        {"mat1": X, "alpha": 3, "beta": 2},
    ),
    "mm": (lambda x, w, b: x @ w, "MmBackward0", {"self": X, "mat2": None}),
    "mm from the left": (lambda x, w, b: w.T @ x.T, "MmBackward0", {"mat2": X.T}),
    "add": (lambda x, w, b: torch.add(x[:, :2], b, alpha=3), "AddBackward0", {"alpha": 3}),
    "sub": (lambda x, w, b: torch.sub(x[:, :2], b, alpha=3), "SubBackward0", {"alpha": 3}),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_operands(case):
    operation, name, expected = SAVED[case]
    node = node_of(operation(X, W.clone().requires_grad_(), B.clone().requires_grad_()))
    assert node.name() == name
    for key, value in expected.items():
        saved = internals.saved(node, key)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(saved, value)
        else:
            assert saved == value


def test_saved_transposes():
    w = W.clone().requires_grad_()
    assert node_of(w.t()).name() == "TBackward0"
    for node in (node_of(w.transpose(0, 1)), node_of(w.transpose(-1, 0)), node_of(w.mT)):
        assert node.name() == "TransposeBackward0"
        assert (int(internals.saved(node, "dim0")) - int(internals.saved(node, "dim1"))) % 2 == 1
    node = node_of(w.permute(1, 0))
    assert node.name() == "PermuteBackward0"
    assert tuple(internals.saved(node, "dims")) == (1, 0)


def test_saved_convolution():
    x, w = torch.randn(2, 4, 5, 6), torch.randn(6, 2, 2, 3, requires_grad=True)
    node = node_of(F.conv2d(x, w, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2))
    assert node.name() == "ConvolutionBackward0"
    torch.testing.assert_close(internals.saved(node, "input"), x)
    for name, value in {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}.items():
        assert tuple(map(int, internals.saved(node, name))) == value
    assert int(internals.saved(node, "groups")) == 2
    assert not internals.saved(node, "transposed")
    assert internals.saved(node_of(F.conv_transpose2d(x, torch.randn(4, 2, 2, 2, requires_grad=True))), "transposed")


def test_a_name_that_is_not_saved_is_none():
    assert internals.saved(node_of(X @ W.clone().requires_grad_()), "nonsense") is None


def test_shapes_types_and_number_of_outputs():
    """_input_metadata"""
    w = W.clone().requires_grad_()
    assert internals.shape_at(node_of(X @ w), 0) == (4, 2)
    assert internals.dtype_at(node_of(X @ w), 0) == X.dtype
    assert internals.dtype_at(node_of((X @ w).to(torch.bfloat16).exp()), 0) == torch.bfloat16
    assert internals.outputs_of(node_of(X @ w)) == 1
    assert internals.outputs_of(node_of(torch.linalg.qr(w).Q)) == 2
    pieces = w.split([1, 2])
    assert internals.outputs_of(node_of(pieces[0])) == 2
    assert [internals.shape_at(node_of(pieces[1]), i) for i in range(2)] == [(1, 2), (2, 2)]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x


LOCAL = {
    "mul": lambda x, w: x * w,
    "broadcast over rows": lambda x, w: x * w[0],
    "broadcast of a scalar": lambda x, w: x + w.sum(),
    "custom function": Double.apply,
    "layer norm": lambda x, w: F.layer_norm(x, (3,), w[0]),
}


@pytest.mark.parametrize("case", LOCAL)
def test_local_vjp(case):
    """Calling one node alone, with the sum over broadcast axes that the engine would make after it."""
    w = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    output = LOCAL[case](x, w)
    cotangent = torch.randn(4, 3)
    # The operand is whatever stands in the slot that leads to w; its own gradient is what autograd sends on.
    node = node_of(output)
    slots = [i for i, (child, _) in enumerate(node.next_functions) if child is not None and leads_to(child, w)]
    (slot,) = slots
    child, number = node.next_functions[slot]
    edge = torch.autograd.graph.GradientEdge(child, number)
    (expected,) = torch.autograd.grad(output, edge, cotangent, retain_graph=True)
    padding = (None,) * (internals.outputs_of(node) - 1)
    torch.testing.assert_close(internals.local_vjp(node, (cotangent, *padding), slot), expected)


def leads_to(node, leaf):
    if getattr(node, "variable", None) is leaf:
        return True
    return any(leads_to(child, leaf) for child, _ in node.next_functions if child is not None)


def test_local_vjp_of_an_operand_that_receives_nothing():
    class Blind(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x + w

        @staticmethod
        def backward(ctx, g):
            return g, None

    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    node = node_of(Blind.apply(x, w))
    assert internals.local_vjp(node, (torch.ones(3),), 1) is None


def test_local_vjp_under_vmap():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    output = layer(x)
    cotangents = torch.randn(5, 4, 2)
    rows = torch.func.vmap(lambda c: internals.local_vjp(node_of(output), (c,), 0))(cotangents)
    torch.testing.assert_close(rows, cotangents.sum(1))


def test_operations_below_autograd():
    """TorchDispatchMode, trees of arguments and the two operations that views become: what tangents are recorded by."""
    seen = []

    class Record(internals.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, args))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    with Record():
        x.view(6)
    function, arguments = seen[0]
    assert function in internals.VIEWS
    leaves, form = internals.tree_flatten(arguments)
    assert leaves[0] is x
    assert internals.tree_unflatten(leaves, form) == arguments
    assert internals.tree_leaves({"a": [1, 2]}) == [1, 2]


def test_hooks_are_seen():
    """_forward_hooks, _forward_pre_hooks of a module, and those of all modules."""
    layer = nn.Linear(2, 2)
    assert not internals.hooked(layer)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *given: None)
        assert internals.hooked(layer)
        handle.remove()
        assert not internals.hooked(layer)
