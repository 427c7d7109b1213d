"""Weights in which the outputs are piecewise linear: which they are, and the diagonal of their Hessian."""

import sys

import pytest
import torch
from networks.registry import Model, gaussian
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lapkit.curvature import Categorical, FromLogProb, Gaussian, Parameters, hessian_diagonal
from lapkit.curvature.capture.tape import Graph
from lapkit.curvature.hessian.piecewise_linear import loss_hessian, piecewise_linear_in, signed_roots


def trained_norm(channels):
    """In eval mode with statistics of some data."""
    norm = nn.BatchNorm2d(channels)
    norm(torch.randn(8, channels, 4, 4) * 2 + 1)
    return norm


def residual(m, x):
    h = m.norm(m.first(x)).relu()
    h = h + F.leaky_relu(m.second(h), 0.1)
    return m.head(F.avg_pool2d(F.max_pool2d(torch.cat([h, -h], 1), 2), 2).flatten(1))


BATCH = sys.modules["lapkit.curvature.hessian.hessian_diagonal"]._BatchDiagonal  # the function hides its module

# name: network, shapes of an example, parameters in which the outputs are piecewise linear
NETWORKS = {
    "residual": (
        lambda: Model(residual, first=nn.Conv2d(2, 3, 3, padding=1, bias=False), norm=trained_norm(3),
                      second=nn.Conv2d(3, 3, 3, padding=1), head=nn.Linear(6, 3)),
        (2, 4, 4),
        "all",
    ),
    "relu after tanh": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        (4,),
        {"2.weight", "2.bias", "4.weight", "4.bias"},
    ),
    "twice in a row": (
        lambda: Model(lambda m, x: m.head(m.one(m.one(x).relu())), one=nn.Linear(4, 4), head=nn.Linear(4, 3)),
        (4,),
        {"head.weight", "head.bias"},
    ),
    "side by side": (
        lambda: Model(lambda m, x: m.head(m.one(x).relu() - m.one(x.flip(1))), one=nn.Linear(4, 4),
                      head=nn.Linear(4, 3)),
        (4,),
        "all",
    ),
    "its own statistics": (
        lambda: Model(lambda m, x: m.head(m.norm(m.first(x)).mean(2)), first=nn.Conv1d(2, 3, 2),
                      norm=nn.InstanceNorm1d(3, affine=True), head=nn.Linear(3, 3)),
        (2, 6),
        {"head.weight", "head.bias"},
    ),
    "gates": (
        lambda: Model(lambda m, x: m.head(m.one(x) * m.two(x) / (1 + m.one(x).square())), one=nn.Linear(4, 4),
                      two=nn.Linear(4, 4), head=nn.Linear(4, 3)),
        (4,),
        {"two.weight", "two.bias", "head.weight", "head.bias"},
    ),
    "divisors": (
        lambda: Model(lambda m, x: m.head(x) / m.scale, head=nn.Linear(4, 3), scale=nn.Parameter(torch.rand(3) + 1)),
        (4,),
        {"head.weight", "head.bias"},
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), (4,), "all"),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 1, 5, batch_first=True), nn.Flatten(), nn.Linear(8, 3)),
        (2, 4),
        {"2.weight", "2.bias"},
    ),
}  # fmt: skip


def slow(model, likelihood, x, y):
    """One second derivative for each weight, by plain autograd."""
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(likelihood.loss(model(x), y).sum(), weights, create_graph=True)
    return torch.stack([
        torch.autograd.grad(g, w, retain_graph=True, materialize_grads=True)[0].flatten()[i]
        for gradient, w in zip(gradients, weights, strict=True)
        for i, g in enumerate(gradient.flatten())
    ])  # fmt: skip


def concave_here_convex_there(f, y):
    """`-log p` with second derivatives of both signs."""
    return -(f.square() - 0.3 * f.pow(4) + f[..., :1] * f[..., 1:2] * 2).sum(-1)


LIKELIHOODS = {
    "categorical": (Categorical(), torch.arange(5) % 3),
    "gaussian": (Gaussian(), torch.linspace(-1, 1, 15).reshape(5, 3)),
    "of both signs": (
        FromLogProb(concave_here_convex_there),
        torch.zeros(5, 3),
    ),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_diagonal(network, likelihood, weighted, monkeypatch):
    """Against plain autograd; whatever is piecewise linear is not sent through second derivatives of the network."""
    make, shape, expected = NETWORKS[network]
    model = make().eval()
    (likelihood, y), x = LIKELIHOODS[likelihood], gaussian(*shape)(5)
    names = {n for n, _ in model.named_parameters()}
    found = []
    kept = BATCH._without_residual

    def noted(self, routes):
        values = kept(self, routes)
        found.append(set(values))
        return values

    monkeypatch.setattr(BATCH, "_without_residual", noted)
    if weighted:
        weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0])
        data, order = [(x[:2], y[:2], weights[:2]), (x[2:], y[2:], weights[2:])], torch.tensor([0, 1, 1, 3, 4, 4, 4])
    else:
        data, order = [(x[:2], y[:2]), (x[2:], y[2:])], torch.arange(5)
    diagonal = hessian_diagonal(model, likelihood, data).diagonal()
    torch.testing.assert_close(diagonal, slow(model, likelihood, x[order], y[order]), rtol=1e-9, atol=1e-11)
    assert found == [names if expected == "all" else expected] * 2


def test_the_tape_tells():
    for make, shape, expected in NETWORKS.values():
        model = make().eval()
        graph = Graph(model(torch.randn(2, *shape)), Parameters.of(model))
        names = {n for n, _ in model.named_parameters()}
        assert {n for n in names if piecewise_linear_in(graph, n)} == (names if expected == "all" else expected)


def test_batch_statistics_bend():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    graph = Graph(model(torch.randn(5, 4)), Parameters.of(model))
    assert not piecewise_linear_in(graph, "0.weight")


def test_signed_roots():
    f, y = torch.randn(5, 3), torch.zeros(5, 3)
    hessian = loss_hessian(lambda f: LIKELIHOODS["of both signs"][0].loss(f, y).sum(), f)
    positive, negative = (torch.einsum("kni,knj->nij", root, root) for root in signed_roots(hessian))
    torch.testing.assert_close(positive - negative, hessian)
    assert negative.abs().amax() > 0.1
    torch.testing.assert_close(positive @ negative, torch.zeros(5, 3, 3))
    wide = loss_hessian(lambda f: Categorical().loss(f, torch.arange(5) % 3).sum(), f)
    assert [len(root) for root in signed_roots(wide)] == [2, 0]  # of rank C - 1, and convex
    linear = loss_hessian(lambda f: f.sum(), f)
    assert [len(root) for root in signed_roots(linear)] == [0, 0]
