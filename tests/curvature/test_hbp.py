"""Hessian backpropagation against autograd's Hessian, dense GGNs and a recursion written out module by module."""

import pytest
import torch
from hbp_cases import (
    CLOSE,
    ELEMENTWISE,
    EVERY,
    MODES,
    OTHERS,
    PIECEWISE_LINEAR,
    POSITIVE,
    SKIPS,
    Bump,
    autograd_hessian,
    check_blocks,
    dense_ggn,
    problem,
)
from oracles import ggn, jacobian, output_hessian
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.func import grad as gradient_of

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Parameters,
    Residual,
    hessian_blocks,
    hessian_diagonal,
    hessian_products,
)
from lapkit.curvature.hessian import hbp_derivatives
from lapkit.curvature.hessian.hbp_trace import Tracer
from lapkit.curvature.products.vectors import NotTwiceDifferentiable


@pytest.mark.parametrize("network", EVERY)
def test_hessian(network, unchanged):
    model, x, y = problem(EVERY[network])
    model.train()
    with unchanged(model):
        blocks = hessian_blocks(model, Categorical(), [(x[:1], y[:1]), (x[1:], y[1:])])
    model.eval()
    check_blocks(blocks, autograd_hessian(model, Categorical(), x, y), Parameters.of(model))


@pytest.mark.parametrize("network", EVERY)
def test_ggn(network):
    model, x, y = problem(EVERY[network])
    blocks = hessian_blocks(model, Categorical(), [(x, y)], mode="ggn")
    check_blocks(blocks, dense_ggn(model, Categorical(), x, y), Parameters.of(model))


@pytest.mark.parametrize("nested", [False, True])
def test_an_activation_may_stand_in_several_places_of_a_skip(nested):
    act = nn.Tanh()
    inner = [nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3)]
    inner = [nn.Sequential(*inner[:2]), nn.Sequential(*inner[2:])] if nested else inner
    model, x, y = problem(lambda: (nn.Sequential(nn.Linear(3, 3), act, Residual(*inner), act, nn.Linear(3, 2)), (3,)))
    blocks = hessian_blocks(model, Categorical(), [(x, y)])
    check_blocks(blocks, autograd_hessian(model, Categorical(), x, y), Parameters.of(model))
    products = hessian_products(model, Categorical(), [(x, y)])
    torch.testing.assert_close(products.to_dense(), blocks.to_dense(), **CLOSE)


PAIRS = [(n, "pch-abs") for n in POSITIVE] + [(n, mode) for n in ("mlp", "nested skips") for mode in MODES[:2]]


@pytest.mark.parametrize(("network", "mode"), [*PAIRS, ("gate", "hessian")])
def test_products_are_those_of_the_blocks(network, mode):
    model, x, y = problem(EVERY[network])
    blocks = hessian_blocks(model, Categorical(), [(x, y)], mode=mode)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    vectors = torch.randn(sum(blocks.sizes), 3)
    for budget in (None, 10):  # activations kept, or computed again
        products = hessian_products(model, Categorical(), data, mode=mode, memory_budget=budget)
        torch.testing.assert_close(products.matmul(vectors), blocks.matmul(vectors), **CLOSE)
        torch.testing.assert_close(products.matmul(vectors[:, 0]), blocks.matmul(vectors[:, 0]), **CLOSE)


@pytest.mark.parametrize("network", POSITIVE)
def test_loewner_order(network):
    """PCH-abs >= PCH-clip >= GGN >= 0 and PCH-clip >= Hessian, for each block."""
    model, x, y = problem(POSITIVE[network])
    found = {mode: hessian_blocks(model, Categorical(), [(x, y)], mode=mode).blocks for mode in MODES}
    for name in found["ggn"]:
        h, g, absolute, clip = (found[mode][name][0] for mode in MODES)
        for larger, smaller in ((absolute, clip), (clip, g), (g, torch.zeros_like(g)), (clip, h)):
            assert float(torch.linalg.eigvalsh(larger - smaller)[0]) > -1e-10


@pytest.mark.parametrize("network", PIECEWISE_LINEAR)
def test_piecewise_linear_networks_have_their_ggn_for_hessian(network):
    model, x, y = problem(PIECEWISE_LINEAR[network])
    one, *others = (hessian_blocks(model, Categorical(), [(x, y)], mode=mode).to_dense() for mode in MODES)
    for other in others:
        torch.testing.assert_close(other, one, **CLOSE)


# The recursion of the definition, one example and one module at a time.


def derivative(function, z):
    """Jacobian `(out, in)` of a function of one tensor."""
    rows = torch.autograd.functional.jacobian(function, z)
    return rows.reshape(-1, z.numel())


def recursion(modules, prefix, z, y, likelihood, change, blocks):
    """Down a chain: the loss Hessian, its gradient, and blocks by the way. Returns a function of (H, delta)."""
    inputs = [z]
    for _, module in modules:
        inputs.append(module(inputs[-1].clone()).detach())

    def back(H, delta):
        for (name, module), z in zip(reversed(modules), reversed(inputs[:-1]), strict=True):
            if isinstance(module, Residual):
                inner = [(f"{name}.inner.{n}", m) for n, m in module.inner.named_children()]
                down, _ = recursion(inner, name, z, y, likelihood, change, blocks)
                J = derivative(lambda v, module=module: module.inner(v.clone()), z)
                through, _ = down(H, delta)
                H, delta = H + H @ J + J.T @ H + through, delta + J.T @ delta
                continue
            for local, p in module.named_parameters():

                def output(w, module=module, local=local, z=z):
                    return functional_call(module, {local: w}, (z.clone(),))

                J = derivative(output, p.detach())
                blocks[f"{name}.{local}"] = blocks.get(f"{name}.{local}", 0) + J.T @ H @ J
            J = derivative(lambda v, module=module: module(v.clone()), z)
            residual = torch.diag(change(bends(module, z) * delta)) if isinstance(module, SMOOTH) else 0
            H, delta = J.T @ H @ J + residual, J.T @ delta
        return H, delta

    return back, inputs[-1]


SMOOTH = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, Bump)


def bends(module, z):
    """phi''(z) of an elementwise module."""
    return vmap(gradient_of(gradient_of(lambda v: module(v.clone()[None])[0])))(z.flatten())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", {**ELEMENTWISE, **SKIPS})
def test_definition(network, mode):
    model, x, y = problem({**ELEMENTWISE, **SKIPS}[network], examples=2)
    change = {"hessian": lambda r: r, "ggn": torch.zeros_like, "pch-abs": torch.abs, "pch-clip": torch.relu}[mode]
    likelihood, wanted = Categorical(), {}

    def flat(name, module):
        if isinstance(module, nn.Sequential):
            return [f for n, m in module.named_children() for f in flat(f"{name}.{n}" if name else n, m)]
        return [(name, module)]

    for z, label in zip(x, y, strict=True):
        back, f = recursion(flat("", model), "", z[None], label, likelihood, change, wanted)
        loss = lambda f, t=label: likelihood.loss(f[None], t[None])[0]  # noqa: E731
        back(hessian(loss)(f[0]), gradient_of(loss)(f[0]))
    blocks = hessian_blocks(model, likelihood, [(x, y)], mode=mode)
    for name, (found,) in blocks.blocks.items():
        torch.testing.assert_close(found, wanted[name], **CLOSE)


def test_modes_differ():
    """Or the comparisons above would say nothing."""
    model, x, y = problem(ELEMENTWISE["mlp"])
    found = [hessian_blocks(model, Categorical(), [(x, y)], mode=mode).blocks["0.weight"][0] for mode in MODES]
    assert len({round(float(block.trace()), 6) for block in found}) == len(MODES)


# Likelihoods, outputs, weights.


def test_likelihoods():
    """Any loss that can be differentiated twice; a heteroscedastic one is not convex."""
    model, x, _ = problem(ELEMENTWISE["mlp"])
    model.append(nn.Linear(3, 2))
    for likelihood, y in (
        (Gaussian(), torch.randn(4, 2)),
        (Bernoulli(), torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0]])),
        (HeteroscedasticGaussian(), torch.randn(4, 1)),
    ):
        blocks = hessian_blocks(model, likelihood, [(x, y)])
        check_blocks(blocks, autograd_hessian(model, likelihood, x, y), Parameters.of(model))


class ClassesLast(nn.Module):
    """The outputs as the likelihood sees them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).movedim(1, -1).flatten(1, -2)


LABELS = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
SEVERAL_OUTPUTS = {  # modules, inputs, labels, axis of classes
    "sequence": ((nn.Linear, 2, 4), (nn.Tanh,), (nn.Linear, 4, 3), (2, 4, 2), LABELS, None),
    "image": ((nn.Conv2d, 1, 2, 2), (nn.Tanh,), (nn.Conv2d, 2, 3, 1), (2, 1, 3, 3), LABELS.view(2, 2, 2), None),
    "classes first": ((nn.Conv1d, 1, 2, 1), (nn.Tanh,), (nn.Conv1d, 2, 3, 2), (2, 1, 5), LABELS, 1),
}


@pytest.mark.parametrize("mode", ["hessian", "ggn"])
@pytest.mark.parametrize("case", SEVERAL_OUTPUTS)
def test_outputs_at_several_positions(case, mode):
    *layers, shape, y, axis = SEVERAL_OUTPUTS[case]
    model, x, likelihood = nn.Sequential(*[kind(*sizes) for kind, *sizes in layers]), torch.randn(shape), Categorical()
    blocks = hessian_blocks(model, likelihood, [(x, y)], mode=mode, output_axis=axis)
    whole = model if case == "sequence" else ClassesLast(model)
    wanted = autograd_hessian(whole, likelihood, x, y.flatten(1))
    if mode == "ggn":
        f = whole(x)
        L = output_hessian(lambda v, t: likelihood.loss(v.view(1, 4, 3), t[None])[0], f.flatten(1), y.flatten(1))
        wanted = ggn(jacobian(whole, x), L)
    check_blocks(blocks, wanted, Parameters.of(model))


def test_weights_of_examples():
    """A weight of two is an example that is there twice."""
    model, x, y = problem(ELEMENTWISE["mlp"])
    twice = [(torch.cat([x, x[:2]]), torch.cat([y, y[:2]]))]
    weighted = [(x, y, torch.tensor([2.0, 2.0, 1.0, 1.0]))]
    for mode in MODES:
        one, two = (hessian_blocks(model, Categorical(), data, mode=mode).to_dense() for data in (twice, weighted))
        torch.testing.assert_close(one, two, **CLOSE)
    products = hessian_products(model, Categorical(), weighted, mode="pch-abs")
    torch.testing.assert_close(
        products.to_dense(), hessian_blocks(model, Categorical(), twice, mode="pch-abs").to_dense(), **CLOSE
    )


def test_selected_parameters():
    model, x, y = problem(SKIPS["skip"])
    whole = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-clip")
    chosen = Parameters.of(model, ["2.inner.2", "3"])
    part = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-clip", parameters=chosen)
    assert list(part.blocks) == ["2.inner.2.weight", "2.inner.2.bias", "3.weight", "3.bias"]
    for name, (block,) in part.blocks.items():
        torch.testing.assert_close(block, whole.blocks[name][0], **CLOSE)


def test_sub_blocks():
    model, x, y = problem(ELEMENTWISE["groups, padding, pooling"])
    whole = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-abs")
    for sub_blocks in (2, {"1.weight": 3, "7.weight": 8}):
        cut = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-abs", sub_blocks=sub_blocks)
        products = hessian_products(model, Categorical(), [(x, y)], mode="pch-abs", sub_blocks=sub_blocks)
        assert [len(p) for p in cut.blocks.values()] == ([2] * 4 if sub_blocks == 2 else [3, 1, 3, 1])
        for name, parts in cut.blocks.items():
            start, rows = 0, 0
            for part, product in zip(parts, products.blocks[name], strict=True):
                here = slice(start, start + len(part))
                torch.testing.assert_close(part, whole.blocks[name][0][here, here], **CLOSE)
                torch.testing.assert_close(product.to_dense(), part, **CLOSE)
                start, rows = start + len(part), rows + 1
            assert start == len(whole.blocks[name][0])
            assert all(len(part) % (model.get_parameter(name)[0].numel()) == 0 for part in parts)
        vectors = torch.randn(sum(cut.sizes), 2)
        torch.testing.assert_close(products.matmul(vectors), cut.matmul(vectors), **CLOSE)


@pytest.mark.parametrize("averaging", [None, "outer", "inner"])
def test_chunks(averaging, monkeypatch):
    """Examples and rows a few at a time, where more matrices would not fit into the budget."""
    model, x, y = problem(ELEMENTWISE["max pooling"], examples=7)
    whole = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-abs", averaging=averaging)
    sizes, call = [], Tracer.__call__
    monkeypatch.setattr(Tracer, "__call__", lambda self, x, *rest: sizes.append(len(x)) or call(self, x, *rest))
    cut = hessian_blocks(model, Categorical(), [(x, y)], mode="pch-abs", averaging=averaging, memory_budget=12_000)
    torch.testing.assert_close(cut.to_dense(), whole.to_dense(), **CLOSE)
    widest = 12  # values between two modules
    assert max(sizes) == 12_000 // (4 * 8 * widest**2)


def test_diagonal_of_blocks_is_the_diagonal():
    for build in (ELEMENTWISE["groups, padding, pooling"], OTHERS["layer norm"], SKIPS["nested skips"]):
        model, x, y = problem(build)
        blocks = hessian_blocks(model, Categorical(), [(x, y)])
        diagonal = hessian_diagonal(model, Categorical(), [(x, y)])
        torch.testing.assert_close(diagonal.diagonal(), blocks.diagonal(), **CLOSE)


def test_operations_that_cannot_be_mapped_over_go_one_by_one():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 2 * x * g

    class Own(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    class Plain(nn.Module):
        def forward(self, x):
            return x**2

    torch.manual_seed(1)
    layers = [nn.Linear(3, 4), nn.Linear(4, 2)]
    x, y = torch.randn(3, 3), torch.tensor([0, 1, 1])
    plain = hessian_blocks(nn.Sequential(layers[0], Plain(), layers[1]), Categorical(), [(x, y)], mode="pch-abs")
    own = nn.Sequential(layers[0], Own(), layers[1])
    with pytest.warns(UserWarning, match="one by one"):
        blocks = hessian_blocks(own, Categorical(), [(x, y)], mode="pch-abs")
    torch.testing.assert_close(blocks.to_dense(), plain.to_dense(), **CLOSE)


def test_batches_of_columns_that_come_out_wrong_are_not_used(monkeypatch):
    model, x, y = problem(ELEMENTWISE["mlp"])
    wanted = hessian_blocks(model, Categorical(), [(x, y)])
    monkeypatch.setattr(hbp_derivatives, "vmap", lambda f: lambda columns: 1.01 * vmap(f)(columns))
    with pytest.warns(UserWarning, match="one by one"):
        blocks = hessian_blocks(model, Categorical(), [(x, y)])
    torch.testing.assert_close(blocks.to_dense(), wanted.to_dense(), **CLOSE)


@pytest.mark.parametrize("mode", ["hessian", "ggn"])
def test_operations_without_a_second_derivative_are_refused(mode):
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return torch.cdist(x[:, None], self.centres[None].expand(len(x), -1, -1))[:, 0]

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Distances(), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(NotTwiceDifferentiable, match="cdist"):
        hessian_blocks(model, Categorical(), [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))], mode=mode)
