"""The exact Hessian diagonal of networks of any form, against one second derivative for each weight."""

import sys

import pytest
import torch
from networks.registry import Model, gaussian
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lapkit.curvature import (
    Categorical,
    Gaussian,
    HessianDiagonal,
    HeteroscedasticGaussian,
    Parameters,
    hessian_blocks,
    hessian_diagonal,
)
from lapkit.curvature.hessian.hessian_routes import LookupRoute, ProductRoute
from lapkit.curvature.products.vectors import NotTwiceDifferentiable

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def attention(m, x):
    q, k, v = m.qkv(m.embed(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return m.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def tokens(n):
    return torch.randint(7, (n, 5))


NETWORKS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)),
        gaussian(4),
    ),
    "relu": lambda: (nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), gaussian(4)),
    "convolution with groups": lambda: (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 3)),
        gaussian(4, 4, 4),
    ),
    "three dimensions and transposed": lambda: (
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.Sigmoid(), nn.ConvTranspose3d(2, 1, 2), nn.Flatten(), nn.Linear(8, 3)),
        gaussian(1, 2, 2, 2),
    ),
    "residual": lambda: (
        Model(lambda m, x: m.head(x + m.one(x).tanh() * m.gate), one=nn.Linear(4, 4), head=nn.Linear(4, 3),
                 gate=nn.Parameter(torch.randn(4))),
        gaussian(4),
    ),
    "norms": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.BatchNorm1d(6), nn.PReLU(), nn.Linear(6, 3)),
        gaussian(4),
    ),
    "attention": lambda: (
        Model(attention, embed=nn.Embedding(7, 3, padding_idx=2), qkv=nn.Linear(3, 12), head=nn.Linear(4, 3)),
        tokens,
    ),
    "transformer": lambda: (
        Model(lambda m, x: m.head(m.layer(x)[:, 0]), head=nn.Linear(4, 3),
                 layer=nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)),
        gaussian(3, 4),
    ),
    "tied": lambda: (
        Model(lambda m, x: m.one(m.embed(x).mean(1)).tanh() @ m.embed.weight.T, embed=nn.Embedding(7, 4),
                 one=nn.Linear(4, 4)),
        tokens,
    ),
    "used twice": lambda: (
        Model(lambda m, x: m.head(m.one(m.one(x).tanh())), one=nn.Linear(4, 4), head=nn.Linear(4, 3)),
        gaussian(4),
    ),
    "lstm": lambda: (
        Model(lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3)),
        gaussian(3, 2),
    ),
    "matrix before data": lambda: (
        Model(lambda m, x: m.head((m.w @ x.T).tanh().T), w=nn.Parameter(torch.randn(5, 4)), head=nn.Linear(5, 3)),
        gaussian(4),
    ),
    "inputs x outputs": lambda: (
        Model(lambda m, x: (x @ m.w).tanh() @ m.v, w=nn.Parameter(torch.randn(4, 5)),
                 v=nn.Parameter(torch.randn(5, 3))),
        gaussian(4),
    ),
    "time first": lambda: (
        Model(lambda m, x: m.head(m.one(x.transpose(0, 1)).tanh().sum(0)), one=nn.Linear(8, 3),
                 head=nn.Linear(3, 3)),
        gaussian(3, 8),
    ),
}  # fmt: skip


def slow(model, likelihood, x, y):
    """One second derivative for each weight, by plain autograd."""
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(likelihood.loss(model(x), y).sum(), weights, create_graph=True)
        entries = [
            torch.autograd.grad(g, w, retain_graph=True, materialize_grads=True)[0].flatten()[i]
            for gradient, w in zip(gradients, weights, strict=True)
            for i, g in enumerate(gradient.flatten())
        ]
    return torch.stack(entries)


@pytest.mark.parametrize("network", NETWORKS)
def test_definition(network, unchanged):
    model, inputs = NETWORKS[network]()
    model.eval()
    x, y = inputs(5), torch.tensor([0, 1, 2, 2, 1])
    wanted = slow(model, Categorical(), x, y)
    for data in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        model.train()
        with unchanged(model):
            found = hessian_diagonal(model, Categorical(), data)
        model.eval()
        assert found.count == 5
        torch.testing.assert_close(found.diagonal(), wanted, **CLOSE)
    torch.testing.assert_close(
        hessian_diagonal(model, Categorical(), [(x, y)], memory_budget=2_000).diagonal(), wanted, **CLOSE
    )


@pytest.fixture
def routes(monkeypatch):
    """Which way each parameter goes."""
    taken = {}

    def remember(backprop, name):
        taken[name] = output_route(backprop, name)
        return taken[name]

    module = sys.modules[hessian_diagonal.__module__]
    output_route = module.output_route
    monkeypatch.setattr(module, "output_route", remember)
    return taken


def test_the_shorter_way_is_taken(routes):
    """Linear and convolution weights and tables through their outputs; a weight used twice entry by entry."""
    expected = {
        "mlp": {"0.weight": (ProductRoute, 5), "2.weight": (ProductRoute, 4), "4.weight": (ProductRoute, 3)},
        "convolution with groups": {"0.weight": (ProductRoute, 16), "4.weight": (ProductRoute, 3)},
        "attention": {"embed.weight": (LookupRoute, 15), "head.weight": (ProductRoute, 3)},
        "inputs x outputs": {"w": (ProductRoute, 5), "v": (ProductRoute, 3)},
        "used twice": {"one.weight": (type(None), 0), "head.weight": (ProductRoute, 3)},
        "tied": {"embed.weight": (type(None), 0), "one.weight": (ProductRoute, 4)},
    }
    for network, ways in expected.items():
        routes.clear()
        model, inputs = NETWORKS[network]()
        hessian_diagonal(model, Categorical(), [(inputs(4), torch.tensor([0, 1, 2, 0]))])
        for name, (kind, count) in ways.items():
            assert isinstance(routes[name], kind), (network, name)
            assert routes[name] is None or routes[name].count == count


def test_a_wrong_way_is_found(monkeypatch):
    model, inputs = NETWORKS["mlp"]()
    right = ProductRoute.rows
    monkeypatch.setattr(ProductRoute, "rows", lambda self, which, second: 1.1 * right(self, which, second))
    with pytest.raises(RuntimeError, match=r"second derivative of '0.weight' .* is not the direct one"):
        hessian_diagonal(model, Categorical(), [(inputs(3), torch.tensor([0, 1, 2]))])


def test_likelihoods_positions_and_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(4, 3)
    for likelihood, y in ((Gaussian(), torch.randn(4, 2)), (HeteroscedasticGaussian(), torch.randn(4, 1))):
        torch.testing.assert_close(
            hessian_diagonal(model, likelihood, [(x, y)]).diagonal(), slow(model, likelihood, x, y), **CLOSE
        )
    sequence, labels = torch.randn(2, 5, 3), torch.randint(2, (2, 5))
    torch.testing.assert_close(
        hessian_diagonal(model, Categorical(), [(sequence, labels)]).diagonal(),
        slow(model, Categorical(), sequence, labels),
        **CLOSE,
    )
    y = torch.tensor([0, 1, 0, 1])
    weighted = hessian_diagonal(model, Categorical(), [(x, y, torch.tensor([2.0, 1, 1, 0]))])
    repeated = hessian_diagonal(model, Categorical(), [(x[[0, 0, 1, 2]], y[[0, 0, 1, 2]])])
    torch.testing.assert_close(weighted.diagonal(), repeated.diagonal(), **CLOSE)


def test_images():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))
    x, y = torch.randn(2, 1, 3, 3), torch.randint(3, (2, 2, 2))
    found = hessian_diagonal(model, Categorical(), [(x, y)])
    torch.testing.assert_close(found.diagonal(), hessian_blocks(model, Categorical(), [(x, y)]).diagonal(), **CLOSE)


def test_selected_parameters_and_result(tmp_path):
    model, inputs = NETWORKS["mlp"]()
    data = [(inputs(4), torch.tensor([0, 1, 2, 0]))]
    whole = hessian_diagonal(model, Categorical(), data)
    part = hessian_diagonal(model, Categorical(), data, parameters=Parameters.of(model, ["2", "4.bias"]))
    assert part.names == ("2.weight", "2.bias", "4.bias")
    for name in part.names:
        assert part[name].shape == model.get_parameter(name).shape
        torch.testing.assert_close(part[name], whole[name], **CLOSE)
    assert (whole.diagonal() < 0).any()
    torch.testing.assert_close((whole + whole).diagonal(), 2 * whole.diagonal())
    whole.save(tmp_path / "diagonal.safetensors")
    assert torch.equal(HessianDiagonal.load(tmp_path / "diagonal.safetensors").diagonal(), whole.diagonal())


def test_refusals():
    model, inputs = NETWORKS["mlp"]()
    with pytest.raises(ValueError, match="data is empty"):
        hessian_diagonal(model, Categorical(), [])
    with pytest.raises(ValueError, match="1 weights for a batch of 3"):
        hessian_diagonal(model, Categorical(), [(inputs(3), torch.tensor([0, 1, 2]), torch.ones(1))])
    distances = Model(
        lambda m, x: m.head(torch.cdist(m.one(x)[:, None], m.c[None].expand(len(x), -1, -1))[:, 0]),
        one=nn.Linear(3, 3), c=nn.Parameter(torch.randn(4, 3)), head=nn.Linear(4, 3),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="one by one"), pytest.raises(NotTwiceDifferentiable, match="cdist"):
        hessian_diagonal(distances, Categorical(), [(torch.randn(3, 3), torch.tensor([0, 1, 2]))])
