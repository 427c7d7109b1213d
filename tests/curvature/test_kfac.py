"""Kronecker factors in both settings: the definition, networks for which they are exact, merging, weights."""

import copy
from itertools import pairwise

import oracles
import pytest
import torch
from fitting import fit
from networks.registry import Mean
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    DenseJacobian,
    Gaussian,
    GGNBlocks,
    GGNKronecker,
    KroneckerProduct,
    KroneckerSum,
    OuterProduct,
    Parameters,
)

SETTINGS = ["expand", "reduce"]
CALLED = [  # networks in which linear maps and convolutions are modules, each called with its own weight
    "linear",
    "mlp",
    "in_place_relu",
    "dead_relu_layer",
    "residual",
    "conv1d",
    "conv2d_stride_dilation_groups",
    "conv2d_depthwise_same",
    "conv2d_circular",
    "conv3d",
    "batch_norm",
    "layer_and_group_norm_prelu",
    "sequence_pooled",
    "time_major",
    "examples_in_the_middle",
    "weight_used_twice",
    "scaled_dot_product",
    "transformer_layer",
    "lstm",
    "single_output_vector",
]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def kronecker(setting):
    return lambda parameters: GGNKronecker(parameters, setting)


def patches(layer, x):
    """What a module multiplies its weight with, `(T, G, I)`: for convolutions the outputs of one-hot kernels."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, layer.in_features)
    kernel = layer.weight.shape[1:]
    units = torch.eye(kernel.numel()).unflatten(1, kernel)
    outputs = [layer._conv_forward(x, u.expand(layer.groups, *kernel), None)[0].flatten(1).T for u in units]
    return torch.stack(outputs, dim=-1)


def positions(layer, g):
    """Cotangents of a module's output `(K, 1, ...)` as `(K, T, G, O)`."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, 1, layer.out_features)
    return g.flatten(3)[:, 0].unflatten(1, (layer.groups, -1)).movedim(3, 1)


def seen(model, x, y):
    """Inputs `(T, G, I)` and cotangents `(K, T, G, O)` of each example, of each module that is called, by hooks."""
    model = copy.deepcopy(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    calls, found = [], {name: [] for name in layers}
    for name, layer in layers.items():  # a copy goes on, so that nothing changes the output in place
        layer.register_forward_hook(lambda m, x, out, name=name: calls.append((name, x[0], out)) or out.clone())
    for one, label in zip(x, y, strict=True):
        calls.clear()
        f = model(one[None]).reshape(1, -1)
        loss = bernoulli if f.shape[1] == 1 else lambda f, y: F.cross_entropy(f[None], y[None])
        values, vectors = torch.linalg.eigh(oracles.output_hessian(loss, f, label[None])[0])
        own = {name: ([], []) for name in layers}
        for name, a, out in calls:
            columns = (vectors * values.clamp_min(0).sqrt()).T
            g = [torch.autograd.grad(f, out, s[None], retain_graph=True)[0] for s in columns]
            own[name][0].append(patches(layers[name], a.detach()))
            own[name][1].append(positions(layers[name], torch.stack(g)))
        for name, (a, g) in own.items():
            if a:
                found[name].append((torch.cat(a), torch.cat(g, dim=1)))
    return {f"{name}.weight".lstrip("."): uses for name, uses in found.items() if uses}


def bernoulli(f, y):
    return F.binary_cross_entropy_with_logits(f, y[None].to(f))


def defined(uses, setting):
    """B and A, written out."""
    if setting == "expand":
        b = sum(torch.einsum("ktgo,ktgp->gop", g, g) for _, g in uses)
        return b, sum(torch.einsum("tgi,tgj->gij", a, a) for a, _ in uses) / sum(len(a) for a, _ in uses)
    b = sum(torch.einsum("kgo,kgp->gop", g.sum(1), g.sum(1)) for _, g in uses)
    return b, sum(torch.einsum("gi,gj->gij", a.mean(0), a.mean(0)) for a, _ in uses) / len(uses)


@pytest.mark.parametrize("network", CALLED, indirect=True)
def test_factors_are_what_the_definition_says(network):
    model, inputs = network
    x = inputs(4)
    outputs = copy.deepcopy(model)(x).reshape(4, -1).shape[1]
    likelihood, y = (Bernoulli() if outputs == 1 else Categorical()), torch.arange(4) % max(outputs, 2)
    uses = seen(model, x, y)
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    for setting in SETTINGS:
        (result,) = fit(model, batches, kronecker(setting), likelihood=likelihood)
        checked = 0
        for name in result.names:
            if name in uses:
                for actual, expected in zip(result.factors(name), defined(uses[name], setting), strict=True):
                    close(actual, expected)
                checked += 1
        assert checked == len(uses) > 0


def deep_linear(*sizes):
    return [nn.Linear(i, o) for i, o in pairwise(sizes)]


# network: the setting it makes exact, the model, the inputs of one example, and the targets of one example
EXACT = {
    "expand, positions apart": ("expand", lambda: nn.Sequential(*deep_linear(4, 5, 3)), (6, 4), (6, 3)),
    "expand, two axes of positions": ("expand", lambda: nn.Sequential(*deep_linear(3, 2, 2)), (2, 3, 3), (2, 3, 2)),
    "expand, one position": ("expand", lambda: nn.Sequential(*deep_linear(4, 5, 5, 2)), (4,), (2,)),
    "reduce, one position": ("reduce", lambda: nn.Sequential(*deep_linear(4, 5, 5, 2)), (4,), (2,)),
    "reduce, mean at the end": ("reduce", lambda: nn.Sequential(*deep_linear(4, 5, 3), Mean(1)), (6, 4), (3,)),
    "reduce, mean between": (
        "reduce",
        lambda: nn.Sequential(*deep_linear(4, 5), Mean(1), *deep_linear(5, 3)),
        (6, 4),
        (3,),
    ),
    "reduce, convolution": (
        "reduce",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), Mean(2, 3), nn.Linear(3, 2)),
        (2, 4, 3),
        (2,),
    ),
    "reduce, convolution in groups": (
        "reduce",
        lambda: nn.Sequential(nn.Conv1d(4, 2, 3, groups=2, stride=2), Mean(2)),
        (4, 9),
        (2,),
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_for_deep_linear_networks_with_squared_loss(case):
    """The other setting is not, where there are positions to tell them apart."""
    setting, build, shape, target = EXACT[case]
    model, x, y = build(), torch.randn(5, *shape), torch.randn(5, *target)
    other = SETTINGS[1 - SETTINGS.index(setting)]
    exact, right, wrong = (
        r.operator()
        for r in fit(
            model, [(x[:2], y[:2]), (x[2:], y[2:])], GGNBlocks, *map(kronecker, (setting, other)), likelihood=Gaussian()
        )
    )
    groups = [len(b.left) for b in right.blocks]
    for block, own, name in zip(exact.blocks, right.blocks, [n for n, _ in model.named_parameters()], strict=True):
        expected = block.to_dense()
        if groups != [1] * len(groups) and "weight" in name:  # a product for each group has no entries across groups
            mask = torch.kron(torch.eye(2), torch.ones(len(expected) // 2, len(expected) // 2))
            expected = expected * mask
        close(own.to_dense(), expected)
    if len(shape) > 1:
        gaps = [
            (b.to_dense() - w.to_dense()).norm() / b.to_dense().norm()
            for b, w in zip(exact.blocks, wrong.blocks, strict=True)
        ]
        assert max(gaps) > 0.05


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_of_halves_add_up_to_that_of_the_whole(network, setting):
    model, inputs = network
    x = inputs(5)
    outputs = copy.deepcopy(model)(x).reshape(5, -1).shape[1]
    likelihood, y = (Bernoulli() if outputs == 1 else Categorical()), torch.arange(5) % max(outputs, 2)
    (whole,) = fit(model, [(x, y)], kronecker(setting), likelihood=likelihood)
    (one,), (two,) = (
        fit(model, [(x[p], y[p])], kronecker(setting), likelihood=likelihood) for p in (slice(2), slice(2, 5))
    )
    total = one + two
    assert total.count == 5
    close(total.operator().to_dense(), whole.operator().to_dense())


def test_results_are_stored(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    (result,) = fit(model, [(torch.randint(5, (6, 2)), torch.arange(6) % 3)], GGNKronecker)
    result.save(tmp_path / "factors.safetensors")
    again = KroneckerSum.load(tmp_path / "factors.safetensors")
    assert torch.equal(again.operator().to_dense(), result.operator().to_dense())
    close((again + result).operator().to_dense(), (result + result).operator().to_dense())


def test_settings_do_not_add_up():
    model, data = nn.Linear(4, 3), [(torch.randn(3, 4), torch.arange(3))]
    one, two = fit(model, data, *map(kronecker, SETTINGS))
    with pytest.raises(ValueError, match="'setting' is expand in one and reduce in the other"):
        one + two
    with pytest.raises(ValueError, match="'expand' or 'reduce', got 'sum'"):
        GGNKronecker(Parameters.of(model), "sum")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", ["mlp", "conv2d_stride_dilation_groups", "embedding_and_attention"], indirect=True)
def test_a_weight_counts_an_example_as_often(network, setting):
    """Also not at all: what is left of zero weights is the fit without these examples."""
    model, inputs = network
    x, y = inputs(4), torch.tensor([0, 1, 2, 1])
    times = torch.tensor([2, 0, 1, 3])
    (weighted,) = fit(
        model, [(x[:2], y[:2], times[:2].double()), (x[2:], y[2:], times[2:].double())], kronecker(setting)
    )
    repeated = torch.arange(4).repeat_interleave(times)
    (expected,) = fit(model, [(x[repeated], y[repeated])], kronecker(setting))
    close(weighted.operator().to_dense(), expected.operator().to_dense())
    (nothing,) = fit(model, [(x, y, torch.zeros(4))], kronecker(setting))
    assert not nothing.operator().to_dense().any()


def test_monte_carlo_and_class_subsets():
    """All classes make up the whole; a mean over samples tends to it."""
    model, x, y = nn.Sequential(*deep_linear(4, 5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    parts = [
        fit(model, [(x, y)], lambda p, c=c: GGNKronecker(p, columns=GGN(classes=(c,))))[0].tensors["output/0.weight"]
        for c in range(3)
    ]
    (whole,) = fit(model, [(x, y)], GGNKronecker)
    close(sum(parts), whole.tensors["output/0.weight"])


def test_an_embedding_has_a_diagonal_factor():
    """How often each row is read, against the exact block in a network that makes it exact: one word an example."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.tensor([[0], [3], [3], [1]]), torch.randn(4, 3)
    exact, kron = (
        r.operator()
        for r in fit(model, [(x[:1], y[:1]), (x[1:], y[1:])], GGNBlocks, GGNKronecker, likelihood=Gaussian())
    )
    block = kron.blocks[0]
    assert isinstance(block, KroneckerProduct)
    close(block.left, torch.tensor([[1.0, 1, 0, 2, 0]]) / 4)
    close(block.to_dense(), exact.blocks[0].to_dense())


class Tied(nn.Module):
    """A table that is also the weight of the last product."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 3)

    def forward(self, x):
        return self.embed(x).mean(1) @ self.embed.weight.T


class Untied(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.embed, self.head = (nn.Parameter(weight.detach().clone()) for _ in range(2))

    def forward(self, x):
        return F.embedding(x, self.embed).mean(1) @ self.head.T


def test_an_embedding_tied_to_a_product_keeps_the_traces_of_its_uses():
    """`diag(p) (x) M / sum p` with both partial traces of the exact blocks that the two uses have by themselves."""
    tied = Tied()
    x, y = torch.stack([torch.randperm(6)[:2] for _ in range(7)]), torch.arange(7) % 6
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    (exact,) = fit(Untied(tied.embed.weight), data, GGNBlocks)
    uses = sum(block.to_dense() for block in exact.operator().blocks).reshape(6, 3, 6, 3)
    rows, moment = torch.einsum("vdvd->v", uses), torch.einsum("vdve->de", uses)
    (result,) = fit(tied, data, GGNKronecker)
    close(result.operator().to_dense(), torch.kron(torch.diag(rows / rows.sum()), moment))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_left_as_they_are_are_rotated_by_the_identity(transposed):
    rows, right = 4, torch.linalg.qr(torch.randn(1, 3, 3)).Q.contiguous()
    inputs, outputs = (rows, 3) if transposed else (3, rows)
    product = OuterProduct(torch.randn(5, 2, 1, inputs), torch.randn(2, 5, 2, 1, outputs), transposed)
    for jacobian in (product, DenseJacobian(product.to_dense())):
        expected = jacobian.to_dense() @ torch.kron(torch.eye(rows), right[0])
        close(jacobian.rotate(None, right).to_dense(), expected)
        close(jacobian.rotate(torch.eye(rows)[None], right).to_dense(), expected)
