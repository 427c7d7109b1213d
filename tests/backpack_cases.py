"""Networks and losses that BackPACK supports, and what it finds of them.

With c times our loss being theirs: individual gradients have c, their squares c^2, curvatures c, columns sqrt(c).
"""

import copy
from functools import partial

import torch
from torch import nn

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    Draws,
    Gaussian,
    SqrtGGN,
    compute,
    example_keys,
    seed_from,
)

EXAMPLES, SAMPLES, SEED = 4, 3, 5


def batch_norm():
    """With statistics of its own, used in eval mode."""
    layer = nn.BatchNorm2d(3)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(layer.weight)
    return layer


def residual():
    """A sum of two branches, by the modules that BackPACK has for it."""
    from backpack.custom_module.branching import Parallel

    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return [nn.Linear(4, 4), Parallel(nn.Identity(), inner), nn.Sigmoid(), nn.Linear(4, 3)], (4,)


NETWORKS = {  # modules and the shape of an input, with 3 outputs or one
    "mlp": lambda: ([nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)], (4,)),
    "activations": lambda: (
        [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.LeakyReLU(0.1), nn.Linear(5, 4), nn.ELU(),
         nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 4), nn.LogSigmoid(), nn.Dropout(), nn.Linear(4, 3)],
        (4,),
    ),
    "relu": lambda: (
        [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Dropout(), nn.Linear(4, 3)], (4,)
    ),
    "one output": lambda: ([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)], (4,)),
    "conv1d": lambda: (
        [nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool1d(2), nn.Conv1d(3, 4, 2, stride=2, bias=False),
         nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 3)],
        (2, 9),
    ),
    "conv2d": lambda: (
        [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, (2, 3), stride=(2, 1), dilation=(1, 2)), batch_norm(),
         nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
         nn.Linear(8, 3)],
        (2, 6, 9),
    ),
    "conv2d pooled": lambda: (
        [nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Conv2d(3, 2, 2),
         nn.Sigmoid(), nn.AvgPool2d(2, stride=1), nn.Flatten(), nn.Linear(8, 3)],
        (2, 4, 4),
    ),
    "residual": residual,
    "embedding": lambda: ([nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3)], (4,)),
    "conv2d groups": lambda: (
        [nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(16, 3)],
        (4, 4, 4),
    ),
    "conv3d": lambda: (
        [nn.Conv3d(1, 2, 2), nn.Sigmoid(), nn.MaxPool3d(2), nn.AvgPool3d((1, 2, 1)), nn.Flatten(), nn.Linear(4, 3)],
        (1, 3, 5, 5),
    ),
    "transposed": lambda: (
        [nn.ConvTranspose1d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)], (2, 3)
    ),
    "transposed 2d": lambda: (
        [nn.ConvTranspose2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3)],
        (2, 3, 3),
    ),
    "transposed 3d": lambda: (
        [nn.ConvTranspose3d(1, 2, 2, dilation=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 3)], (1, 2, 2, 2)
    ),
}  # fmt: skip
FACTORED = ["mlp", "relu", "one output", "conv2d pooled"]  # their factors: no batch norm, no groups
CHAINS = ["mlp", "activations", "one output", "conv2d pooled", "conv1d", "conv3d"]  # without batch norm
LOSSES = {  # theirs, ours, and ours in theirs
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum"), Categorical(), 1.0),
    "cross_entropy mean": (nn.CrossEntropyLoss(), Categorical(), 1 / EXAMPLES),
    "square sum": (nn.MSELoss(reduction="sum"), Gaussian(0.5**0.5), 2.0),
    "square mean": (nn.MSELoss(), Gaussian(0.5**0.5), 2 / EXAMPLES / 3),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli(), 1.0),  # of one output
    "binary mean": (nn.BCEWithLogitsLoss(), Bernoulli(), 1 / EXAMPLES),
}

DENSE = [name for name in LOSSES if "binary" not in name]  # those whose Hessian KFRA and products of theirs have


def close(ours, theirs):
    """To ten digits of the largest entry."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * max(float(theirs.abs().max()), 1e-3))


class Problem:
    def __init__(self, network, loss):
        torch.manual_seed(1)
        modules, shape = NETWORKS[network]()
        self.model = nn.Sequential(*modules).eval()
        self.loss, self.likelihood, self.factor = LOSSES[loss]
        words = any(isinstance(m, nn.Embedding) for m in modules)
        self.x = torch.randint(7, (EXAMPLES, *shape)) if words else torch.randn(EXAMPLES, *shape)
        self.outputs = self.model(self.x).shape[1]
        kind = loss.split()[0]
        self.y = {
            "cross_entropy": torch.tensor([0, 2, 1, 1]),
            "square": torch.randn(EXAMPLES, self.outputs),
            "binary": torch.tensor([[0.0], [1], [1], [0]]),
        }[kind]
        self.parameters = dict(self.model.named_parameters())
        self.data = [(self.x[:1], self.y[:1]), (self.x[1:], self.y[1:])]

    def ours(self, **quantities):
        generator = torch.Generator().manual_seed(SEED)
        return compute(self.model, self.likelihood, self.data, quantities, generator=generator)

    def columns(self, columns, count):
        """Those of the GGN for each parameter, (K, N, *shape)."""
        maker = partial(SqrtGGN, columns=columns)
        (found,) = compute(
            self.model, self.likelihood, [(self.x, self.y)], {"v": maker}, generator=torch.Generator().manual_seed(SEED)
        ).values()
        rows = found.operator().columns.T
        assert len(rows) == count * EXAMPLES  # all there, not compressed
        pieces = rows.split([p.numel() for p in self.parameters.values()], dim=1)
        shapes = {name: (count, EXAMPLES, *p.shape) for name, p in self.parameters.items()}
        return {name: v.reshape(shape) for (name, shape), v in zip(shapes.items(), pieces, strict=True)}

    def theirs(self, *extensions, read=None):
        """By parameter what `read` finds on it, inside the context of the extensions."""
        from backpack import backpack, extend

        model = extend(copy.deepcopy(self.model))
        loss = extend(copy.deepcopy(self.loss))(model(self.x), self.y)
        with backpack(*extensions):
            loss.backward()
            return {name: read(p) for name, p in model.named_parameters()}

    def drawn(self):
        """The targets that lapkit draws for its Monte Carlo columns, (M, N, ...)."""
        draws = Draws(seed_from(torch.Generator().manual_seed(SEED)), example_keys((self.x, self.y), EXAMPLES))
        f = self.model(self.x).detach()
        return torch.stack([self.likelihood.sample(f, draws, m) for m in range(SAMPLES)])

    def inject(self, monkeypatch):
        """Let BackPACK take those."""
        from backpack.core.derivatives import bcewithlogitsloss, crossentropyloss, mseloss

        targets = self.drawn()

        class Drawn:
            def sample(self, sample_shape):
                assert tuple(sample_shape) == (SAMPLES,)
                return targets

        for kind in (
            bcewithlogitsloss.BCELossWithLogitsDerivatives,
            crossentropyloss.CrossEntropyLossDerivatives,
            mseloss.MSELossDerivatives,
        ):
            monkeypatch.setattr(kind, "_make_distribution", lambda self, f: Drawn())


def every(networks, losses=LOSSES):
    """Every network with one loss, and one network with every loss that fits its outputs."""
    first, *others = networks
    return [("one output" if "binary" in loss else first, loss) for loss in losses] + [
        (network, "square sum" if network == "one output" else "cross_entropy sum") for network in others
    ]
