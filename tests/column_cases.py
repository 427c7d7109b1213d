"""Small problems for every likelihood, with outputs for examples alone and at three positions."""

import oracles
import torch
from torch import nn

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    FromLogProb,
    Gaussian,
    GGNDense,
    GGNDiagonal,
    Parameters,
    PerOutputGaussian,
    Poisson,
    accumulate,
)

EXAMPLES = {
    "categorical": (Categorical(), torch.tensor([0, 2, 1, 1])),
    "bernoulli": (Bernoulli(), torch.eye(4, 3, dtype=torch.float64)),
    "gaussian": (Gaussian(), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)),
    "gaussian with noise": (Gaussian(noise=0.3), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def problem_of(name):
    """A likelihood, a network, inputs and targets, and the output Hessians by autograd."""
    likelihood, y = EXAMPLES[name]
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 2)
    hessians = oracles.output_hessian(lambda f, t: likelihood.loss(f[None], t[None])[0], model(x), y)
    return likelihood, model, x, y, hessians


class Words(nn.Module):
    """Outputs `(N, T, C)` at T positions that know of each other; the same weights for all of them."""

    def __init__(self, classes=3):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3), nn.Linear(3, classes)

    def forward(self, x):
        z = self.inner(x).tanh()
        return self.outer(z + z.mean(1, keepdim=True))


N, T = 4, 3
COUNTS = (torch.arange(N * T * 3) % 4).reshape(N, T, 3).double()
LABELS = COUNTS[..., 0].long() % 3
MASKED = LABELS.where(torch.rand(N, T, generator=torch.Generator().manual_seed(0)) < 0.6, -100)
POSITIONS = {
    "categorical": (Categorical(), LABELS),
    "categorical with masks and weights": (
        Categorical(class_weights=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2),
        MASKED,
    ),
    "bernoulli": (Bernoulli(), COUNTS % 2),
    "bernoulli with missing answers": (
        Bernoulli(missing=3, pos_weight=torch.ones(3) * 2),
        COUNTS.where(COUNTS != 2, 0),
    ),
    "gaussian": (Gaussian(0.3), COUNTS),
    "noise for each output": (PerOutputGaussian(torch.tensor([0.5, 1.0, 2.0]), 0.7), COUNTS),
    "poisson": (Poisson(), COUNTS),
    "from log prob": (FromLogProb(lambda f, y: -((f - y) ** 4).sum(-1)), COUNTS),
}


def words_of(name):
    """A likelihood, a network of three positions, inputs and targets, and the exact GGN by autograd."""
    likelihood, y = POSITIONS[name]
    model, x = Words(), torch.randn(N, T, 2)
    rows = model(x).detach().flatten(0, 1)
    of_one = lambda f, t: likelihood.loss(f[None], t[None])[0]  # noqa: E731
    hessians = oracles.output_hessian(of_one, rows, y.flatten(0, 1))
    blocks = torch.stack([torch.block_diag(*part) for part in hessians.split(T)])  # positions do not mix
    return likelihood, model, x, y, oracles.ggn(oracles.jacobian(model, x), blocks)


def matrix(columns, likelihood, model, batches, generator=None):
    parameters = Parameters.of(model)
    quantity = GGNDense(parameters)
    accumulate(model, parameters, likelihood, columns, batches, [quantity], generator=generator)
    return quantity.result().operator().matrix


def diagonal(columns, likelihood, model, batches, seed=0):
    parameters = Parameters.of(model)
    quantity = GGNDiagonal(parameters)
    generator = torch.Generator().manual_seed(seed)
    accumulate(model, parameters, likelihood, columns, batches, [quantity], generator=generator)
    return quantity.result().operator().diagonal()
