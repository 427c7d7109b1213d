"""Networks and losses for curvlinops, and what it finds of them."""

import torch
from networks.registry import Mean
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Draws,
    EmpiricalFisher,
    Gaussian,
    MonteCarloGGN,
    example_keys,
    seed_from,
)

SAMPLES, SEED, DAMPING = 3, 7, 0.3


NETWORKS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)), (4,)),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), Mean(1), nn.Linear(4, 3)), (3, 4)
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 1)), nn.Tanh(),
            nn.Conv2d(4, 3, 2, dilation=2, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 3),
        ),
        (2, 5, 6),
    ),
}  # fmt: skip
LOSSES = {  # theirs, ours, the factors of a curvature and of products of two gradients
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum"), Categorical(), lambda n: (1, 1)),
    "cross_entropy mean": (nn.CrossEntropyLoss(), Categorical(), lambda n: (1 / n, 1 / n)),
    "square sum": (nn.MSELoss(reduction="sum"), Gaussian(0.5**0.5), lambda n: (2, 4)),
    "square mean": (nn.MSELoss(), Gaussian(0.5**0.5), lambda n: (2 / n / 3, 4 / n / 3)),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli(), lambda n: (1, 1)),
    "binary mean": (nn.BCEWithLogitsLoss(), Bernoulli(), lambda n: (1 / n / 3, 1 / n / 3)),
}
CASES = [("mlp", loss) for loss in LOSSES] + [(n, "cross_entropy sum") for n in NETWORKS if n != "mlp"]
SETTINGS = ["expand", "reduce"]


def close(ours, theirs, rtol=1e-10):
    """To ten digits of the largest entry."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


EXAMPLES = 60  # enough for factors of full rank, with gaps between their eigenvalues


class Problem:
    def __init__(self, network, loss, examples=7):
        torch.manual_seed(2)
        self.model, shape = NETWORKS[network]()
        self.loss, self.likelihood, factors = LOSSES[loss]
        self.factor, self.square = factors(examples)
        self.x = torch.randn(examples, *shape)
        self.y = {
            "cross_entropy": torch.arange(examples) % 3,
            "square": torch.randn(examples, 3),
            "binary": torch.randint(2, (examples, 3)).double(),
        }[loss.split()[0]]
        self.batch = [(self.x, self.y)]
        self.batches = [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]
        self.names = [name for name, _ in self.model.named_parameters()]

    def theirs(self, kind, data, names=None, **options):
        chosen = [p for n, p in self.model.named_parameters() if names is None or n in names]
        return kind(self.model, self.loss, chosen, data, check_deterministic=False, **options)

    def drawn(self):
        """The targets that lapkit draws for its Monte Carlo columns, (M, N, ...)."""
        draws = Draws(seed_from(generator()), example_keys((self.x, self.y), len(self.x)))
        f = self.model(self.x).detach()
        return torch.stack([self.likelihood.sample(f, draws, m) for m in range(SAMPLES)])

    def kinds(self):
        """Their Fisher types: our columns and the factor."""
        return {
            "type-2": (GGN(), self.factor),
            "mc": (MonteCarloGGN(SAMPLES), self.factor),
            "empirical": (EmpiricalFisher(), self.square),
        }

    def inject(self, monkeypatch):
        """Let their factors be of those, one after the other and from the first again."""
        import curvlinops

        targets = self.drawn()
        count = iter(range(10**6))
        monkeypatch.setattr(
            curvlinops.KFACLinearOperator, "draw_label", lambda self, output: targets[next(count) % SAMPLES]
        )


def generator():
    return torch.Generator().manual_seed(SEED)


def dense(operator):
    return torch.as_tensor(operator @ torch.eye(operator.shape[1])).detach()
