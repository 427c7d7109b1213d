"""Small networks with everything that ViViT gives, by autograd one example at a time and dense algebra."""

import functools
import zlib

import oracles
import torch
from networks import brute_force
from networks.cases import CASES
from torch import nn

from lapkit.curvature import Bernoulli, Categorical, Gaussian, vivit

EXAMPLES = 5


class Tied(nn.Module):
    """A weight that is used twice, once transposed, and a table that is read and multiplied by."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = self.inner(self.table(x)).tanh()
        z = (z @ self.inner.weight).tanh().mean(1)
        return nn.functional.linear(z, self.table.weight)[:, :3]


class Named(nn.Module):
    """Takes a mapping; a matrix of weights that no closed form is known for."""

    def __init__(self):
        super().__init__()
        self.first, self.mixing, self.second = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 3)

    def forward(self, left, right):
        z = self.first(left) * right
        return self.second(torch.cdist(z[:, None], self.mixing[None].expand(len(z), -1, -1))[:, 0])


def perceptron(*_, outputs=3):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, outputs))


def convolutional():
    layers = [
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 3, 2, padding=1, groups=3),
        nn.AvgPool2d(2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3))


def normal(*shape):
    return lambda n: torch.randn(n, *shape)


def tokens(n):
    return torch.randint(6, (n, 4))


def named(n):
    return {"left": torch.randn(n, 3), "right": torch.randn(n, 4)}


OWN = {  # model, inputs, likelihood
    "mlp": (perceptron, normal(3), Categorical()),
    "regression": (perceptron, normal(3), Gaussian(0.3)),
    "yes or no": (functools.partial(perceptron, outputs=1), normal(3), Bernoulli()),
    "convolutions": (convolutional, normal(2, 4, 4), Categorical()),
    "tied": (Tied, tokens, Categorical()),
    "named": (Named, named, Categorical()),
    "words": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), normal(2, 2), Categorical()),
}
CATALOGUE = ["vit", "gcn", "ragged gcn", "lstm outputs"]  # attention, graphs in one list, recurrence
NETWORKS = [*OWN, *CATALOGUE]


def targets(likelihood, f):
    if isinstance(likelihood, Categorical):
        return torch.randint(f.shape[-1], f.shape[:-1])
    y = torch.randn(f.shape)
    return (y > 0).to(f) if isinstance(likelihood, Bernoulli) else y


class Problem:
    """One network with a batch.

    Args:
        name: of the network.
        weights: of the examples.
    """

    def __init__(self, name, weights=None, examples=EXAMPLES):
        torch.manual_seed(zlib.crc32(name.encode()))
        if name in OWN:
            build, inputs, self.likelihood = OWN[name]
            self.model, self.x, self.cut = build().eval(), inputs(examples), brute_force.rows
        else:
            case = CASES[name]
            self.model, self.x, self.likelihood, self.cut = case.build(), case.inputs(examples), Categorical(), case.cut
        self.examples, self.weights = examples, weights
        self.f = self.run(self.model, self.x).detach()
        self.y = targets(self.likelihood, self.f)
        self.batch = (self.x, self.y) if weights is None else (self.x, self.y, weights)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.size = sum(p.numel() for p in self.model.parameters())

    @staticmethod
    def run(model, x):
        return model(**x) if isinstance(x, dict) else model(x)

    def analysis(self, **options):
        return vivit(self.model, self.likelihood, self.batch, **options)

    @functools.cached_property
    def scale(self):
        return torch.ones(self.examples) if self.weights is None else self.weights

    @functools.cached_property
    def jacobian(self):
        """`(N, T C, P)`."""
        _, rows = brute_force.jacobian(self.model, self.x, self.examples, self.run, self.cut)
        return rows.flatten(1, -2)

    @functools.cached_property
    def each_curvature(self):
        """`G_n`, `(N, P, P)`."""
        of_one = lambda f, y: self.likelihood.loss(f[None], y[None])[0]  # noqa: E731
        y = self.likelihood.check(self.f, self.y)
        positions = self.f.shape[1:-1].numel()
        f = self.f.flatten(0, -2)
        hessians = oracles.output_hessian(of_one, f, y.flatten(0, self.f.ndim - 2)).split(positions)
        blocks = torch.stack([torch.block_diag(*part) for part in hessians])
        return torch.stack([w * j.T @ h @ j for w, j, h in zip(self.scale, self.jacobian, blocks, strict=True)])

    @functools.cached_property
    def each_gradient(self):
        """`g_n`, `(N, P)`."""
        f = self.f.clone().requires_grad_()
        loss = self.likelihood.loss(f, self.likelihood.check(f, self.y))
        (residuals,) = torch.autograd.grad((self.scale * loss).sum(), f)
        return torch.einsum("nc,ncp->np", residuals.flatten(1), self.jacobian)

    def places(self, names):
        """Where the weights of some parameters stand in flat order."""
        ends = torch.tensor([p.numel() for p in self.model.parameters()]).cumsum(0).tolist()
        spans = {n: range(e - p.numel(), e) for e, (n, p) in zip(ends, self.model.named_parameters(), strict=True)}
        return torch.tensor([i for name in self.names if name in names for i in spans[name]])


def close(actual, expected, tolerance=1e-8):
    """To eight digits of the largest entry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = max(float(expected.abs().max()), 1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
