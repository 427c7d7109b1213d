"""The factors that ViViT is made of in BackPACK, SqrtGGNExact and SqrtGGNMC, and what follows from them."""

import copy

import pytest
import torch
from torch import nn
from vivit_problems import close

from lapkit.curvature import Bernoulli, Categorical, Draws, Gaussian, MonteCarloGGN, example_keys, seed_from, vivit

# BackPACK's own hooks make torch warn, since the inputs need no gradient.
pytestmark = [pytest.mark.peer("backpack"), pytest.mark.filterwarnings("ignore:Full backward hook is firing")]
EXAMPLES, SAMPLES, SEED = 4, 2, 5

NETWORKS = {
    "mlp": lambda c: ([nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, c)], (4,)),
    "convolutions": lambda c: (
        [nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, c)],
        (2, 4, 4),
    ),
    "one dimension": lambda c: (
        [nn.Conv1d(2, 3, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(9, c, bias=False)],
        (2, 7),
    ),
}
LOSSES = {  # theirs, of the mean; ours, and ours in theirs
    "cross entropy": (nn.CrossEntropyLoss(), Categorical(), 1.0, 3),
    "square": (nn.MSELoss(), Gaussian(0.5**0.5), 2 / 3, 3),
    "binary": (nn.BCEWithLogitsLoss(), Bernoulli(), 1.0, 1),
}


class Problem:
    def __init__(self, network, loss):
        torch.manual_seed(1)
        self.loss, self.likelihood, self.factor, outputs = LOSSES[loss]
        modules, shape = NETWORKS[network](outputs)
        self.model, self.x = nn.Sequential(*modules).eval(), torch.randn(EXAMPLES, *shape)
        self.y = {
            "cross entropy": torch.tensor([0, 2, 1, 1]),
            "square": torch.randn(EXAMPLES, outputs),
            "binary": torch.tensor([[0.0], [1], [1], [0]]),
        }[loss]

    def ours(self, **options):
        generator = torch.Generator().manual_seed(SEED)
        return vivit(self.model, self.likelihood, (self.x, self.y), generator=generator, **options)

    def theirs(self, extension):
        """`V` `(P, K N)` by name, of the mean loss, and each example's gradient `(P, N)` without a factor 1/N."""
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        model, loss = extend(copy.deepcopy(self.model)), extend(copy.deepcopy(self.loss))
        attribute = "sqrt_ggn_exact" if "Exact" in type(extension).__name__ else "sqrt_ggn_mc"
        with backpack(extension, BatchGrad()):
            loss(model(self.x), self.y).backward()
            return {
                name: (getattr(p, attribute).flatten(2).flatten(0, 1).T, EXAMPLES * p.grad_batch.flatten(1).T)
                for name, p in model.named_parameters()
            }

    def inject(self, monkeypatch):
        """Let BackPACK take the targets that lapkit draws."""
        from backpack.core.derivatives import bcewithlogitsloss, crossentropyloss, mseloss

        draws = Draws(seed_from(torch.Generator().manual_seed(SEED)), example_keys((self.x, self.y), EXAMPLES))
        f = self.model(self.x).detach()
        targets = torch.stack([self.likelihood.sample(f, draws, m) for m in range(SAMPLES)])

        class Drawn:
            def sample(self, sample_shape):
                return targets

        for kind in (
            bcewithlogitsloss.BCELossWithLogitsDerivatives,
            crossentropyloss.CrossEntropyLossDerivatives,
            mseloss.MSELossDerivatives,
        ):
            monkeypatch.setattr(kind, "_make_distribution", lambda self, f: Drawn())


def check(problem, analysis, factors):
    """Their Gram matrix has our eigenvalues, and their factors have our eigenvectors, gradients and curvatures."""
    for spectrum in analysis.values():
        v, g = (torch.cat([factors[n][i] for n in spectrum.parameters.names]) for i in (0, 1))
        values = torch.linalg.eigvalsh(v.T @ v).flip(0)
        k = int((values > 1e-6 * values[0]).sum())
        close(problem.factor * spectrum.eigenvalues[:k], values[:k])
        e, known = spectrum.eigenvectors(k), spectrum.directions(k)
        close(v @ (v.T @ e), e * values[:k])  # equal eigenvalues have eigenvectors of anyone's choice
        close(problem.factor * known.gradients, g.T @ e)
        each = (v.T @ e).unflatten(0, (-1, EXAMPLES)).square().sum(0) * EXAMPLES
        close(problem.factor * known.curvatures, each)


@pytest.mark.parametrize("groups", [None, "parameters", "modules"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_exact(network, loss, groups):
    from backpack.extensions import SqrtGGNExact

    problem = Problem(network, loss)
    check(problem, problem.ours(groups=groups), problem.theirs(SqrtGGNExact()))


@pytest.mark.parametrize("groups", [None, "parameters"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_monte_carlo(network, loss, groups, monkeypatch):
    from backpack.extensions import SqrtGGNMC

    problem = Problem(network, loss)
    problem.inject(monkeypatch)
    ours = problem.ours(groups=groups, columns=MonteCarloGGN(SAMPLES))
    check(problem, ours, problem.theirs(SqrtGGNMC(mc_samples=SAMPLES)))


@pytest.mark.parametrize("network", NETWORKS)
def test_sub_sample(network):
    """BackPACK scales by the number of the subset's examples in a batch of all; ours is the mean over the subset."""
    from backpack.extensions import SqrtGGNExact

    problem = Problem(network, "cross entropy")
    spectrum = problem.ours(curvature_examples=[2, 0]).spectrum
    factors = problem.theirs(SqrtGGNExact(subsampling=[2, 0]))
    v, g = (torch.cat([factors[n][i] for n in factors]) for i in (0, 1))
    values = torch.linalg.eigvalsh(v.T @ v).flip(0)[: spectrum.rank]
    close(spectrum.eigenvalues, values * float(spectrum.gram_trace / v.square().sum()), 1e-8)
    assert float(spectrum.gram_trace / v.square().sum()) == pytest.approx(EXAMPLES / 2)
    close(spectrum.directions(2).gradients, g.T @ spectrum.eigenvectors(2))
