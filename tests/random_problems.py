"""Networks, data and likelihoods by chance: widths, depth, activations, biases and kind of targets from a seed."""

import random

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lapkit.curvature import Bernoulli, Categorical, Gaussian, compute, hessian_blocks

SEEDS = range(9)
ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU]
KINDS = {
    "categorical": (Categorical(), lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "gaussian": (Gaussian(), lambda f, y: F.mse_loss(f, y, reduction="sum") / 2),
    "bernoulli": (Bernoulli(), lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum")),
}


def close(actual, expected, rtol=1e-10):
    """To so many digits of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(float(expected.abs().max()), 1e-12))


class RandomProblem:
    """A network, data and a likelihood by chance."""

    def __init__(self, seed, activations=ACTIVATIONS, kind=None, layers=()):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        self.classes, self.examples = chance.randint(2, 4), chance.randint(3, 6)
        modules, width = [], chance.randint(2, 4)
        shape = (width,)
        if seed % 3 == 1:
            shape, channels = (1, 4, 3), chance.randint(1, 3)
            first = nn.Conv2d(1, channels, 2, bias=chance.random() < 0.7)
            modules += [first, chance.choice(activations)(), nn.Flatten()]
            width = 6 * channels
        for _ in range(chance.randint(1, 2)):
            inner = chance.randint(2, 5)
            modules += [nn.Linear(width, inner, bias=chance.random() < 0.7), *(layer(inner) for layer in layers)]
            modules.append(chance.choice(activations)())
            width = inner
        modules.append(nn.Linear(width, self.classes))
        self.model = nn.Sequential(*modules).eval()
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.8)
        self.kind = kind or list(KINDS)[seed % 3 if seed < 6 else (seed + 1) % 3]
        self.likelihood, self.loss = KINDS[self.kind]
        self.x = torch.randn(self.examples, *shape)
        self.y = {
            "categorical": torch.randint(self.classes, (self.examples,)),
            "gaussian": torch.randn(self.examples, self.classes),
            "bernoulli": torch.randint(2, (self.examples, self.classes)).double(),
        }[self.kind]
        cut = chance.randint(1, self.examples - 1)
        self.batches = [(self.x[:cut], self.y[:cut]), (self.x[cut:], self.y[cut:])]
        self.sizes = [p.numel() for p in self.model.parameters()]
        self.names = [name for name, _ in self.model.named_parameters()]

    def compute(self, data=None, **quantities):
        return compute(self.model, self.likelihood, data or self.batches, quantities)

    def operators(self, data=None, **quantities):
        return {name: result.operator() for name, result in self.compute(data, **quantities).items()}

    def gradient(self):
        """Of the summed loss, by autograd."""
        loss = self.loss(self.model(self.x), self.y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()))])

    def hessian(self):
        """Of the summed loss, by autograd."""
        start = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()

        def loss(vector):
            pieces = vector.split(self.sizes)
            shaped = {n: v.view(p.shape) for (n, p), v in zip(self.model.named_parameters(), pieces, strict=True)}
            return self.loss(functional_call(self.model, shaped, self.x), self.y)

        return torch.func.hessian(loss)(start)

    def diagonal_blocks(self, matrix):
        return [rows.split(self.sizes, 1)[i] for i, rows in enumerate(matrix.split(self.sizes))]

    def hbp(self, mode):
        """Blocks by name."""
        found = hessian_blocks(self.model, self.likelihood, self.batches, mode=mode).blocks
        return {name: parts[0] for name, parts in found.items()}
