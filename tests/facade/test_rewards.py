"""Reward models: fitted to preferences between two, they predict the reward of one."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from lapkit import Laplace
from lapkit.curvature import BradleyTerry
from lapkit.posteriors import GaussianPrior

DELTA = 0.8


class RewardModel(nn.Module):
    """The reward of each input; of pairs `(N, 2, D)` both, `(N, 2)`."""

    def __init__(self, width=5):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x) if x.ndim == 2 else self.net(x.flatten(0, 1)).reshape(len(x), 2)


@pytest.fixture
def problem():
    model, pairs = RewardModel(), torch.randn(11, 2, 3)
    return model, [(pairs[:6], torch.arange(6) % 2), (pairs[6:], torch.tensor([1, 1, 0, 1, 0]))], torch.randn(4, 3)


def jacobian(model, x):
    """Of all outputs, `(N, K, P)`, by reverse mode of the whole."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda w: functional_call(model, w, (x,)))(named)
    return torch.cat([j.flatten(2) for j in found.values()], dim=-1)


def precision(model, data):
    """`sum_n p (1 - p) d d^T + delta I`, with d the derivative of the difference of the rewards."""
    pairs = torch.cat([x for x, _ in data])
    j = jacobian(model, pairs)
    d = j[:, 1] - j[:, 0]
    rewards = model(pairs).detach()
    p = (rewards[:, 1] - rewards[:, 0]).sigmoid()
    return torch.einsum("n,np,nq->pq", p * (1 - p), d, d) + DELTA * torch.eye(d.shape[1])


def test_the_likelihood_is_that_of_a_difference():
    f, y = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    likelihood = BradleyTerry()
    sign = 2.0 * y - 1
    torch.testing.assert_close(likelihood.log_prob(f, y), nn.functional.logsigmoid(sign * (f[:, 1] - f[:, 0])))
    root = likelihood.hessian_root(f, y)
    assert len(root) == 1
    for n in range(6):
        exact = hessian(lambda g, n=n: likelihood.loss(g[None], y[n : n + 1])[0])(f[n])
        torch.testing.assert_close(torch.einsum("kc,kd->cd", root[:, n], root[:, n]), exact)
        torch.testing.assert_close(likelihood.hessian_product(f, y, torch.ones_like(f).cumsum(1))[n],
                                   exact @ torch.tensor([1.0, 2.0]))  # fmt: skip


@pytest.mark.parametrize("structure", ["full", "lowrank", "gp", "diag"])
def test_posterior_evidence_and_rewards_are_those_of_dense_algebra(problem, structure):
    model, data, x = problem
    la = Laplace(model, "reward_modeling", "all", structure, prior_precision=DELTA).fit(data)
    expected = precision(model, data)
    expected = torch.diag(expected.diagonal()) if structure == "diag" else expected
    j, rewards = jacobian(model, x)[:, 0], model(x).detach()
    mean, covariance = la(x)
    torch.testing.assert_close(mean, rewards)
    torch.testing.assert_close(covariance, torch.einsum("np,pq,nq->n", j, expected.inverse(), j)[:, None, None])
    together = la(x, joint=True)
    torch.testing.assert_close(together[0], rewards[:, 0])
    torch.testing.assert_close(together[1], j @ expected.inverse() @ j.T)
    log_prior = len(expected) * torch.tensor(DELTA).log() - DELTA * la.mean.square().sum()
    log_likelihood = sum(BradleyTerry().log_prob(model(p).detach(), y).sum() for p, y in data)
    torch.testing.assert_close(la.log_marginal_likelihood(), log_likelihood + (log_prior - torch.logdet(expected)) / 2)


def test_a_preference_depends_on_the_difference(problem):
    """A constant added to all rewards has a variance of its own, in which preferences have no part."""
    model, data, _ = problem
    la = Laplace(model, "reward_modeling", "all", "full", prior_precision=DELTA).fit(data)
    pairs = data[0][0]
    mean, covariance = la(pairs)
    assert mean.shape == (6, 2)
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    logit = (mean[:, 1] - mean[:, 0]) / (1 + torch.pi / 8 * variance).sqrt()
    preferred = la.predictive_distribution(pairs).probs
    torch.testing.assert_close(preferred, torch.stack([(-logit).sigmoid(), logit.sigmoid()], -1))
    loose = Laplace(model, "reward_modeling", "all", "full", prior_precision=DELTA).fit(data)
    last = torch.ones(la.n_params).index_fill(0, torch.tensor([la.n_params - 1]), 1e-6)
    loose.prior = GaussianPrior(DELTA * last)
    torch.testing.assert_close(loose.predictive_distribution(pairs).probs, preferred)
    assert (loose(pairs)[1].diagonal(dim1=1, dim2=2) > 1e5).all()
    both = la.uncertainty(pairs)
    assert both.total.shape == (6,)
    assert (both.epistemic > 0).all()


def test_what_makes_no_sense_says_so(problem):
    model, data, x = problem
    la = Laplace(model, "reward_modeling", "all", "full").fit(data)
    with pytest.raises(ValueError, match="A preference is one between two"):
        la.predictive_distribution(x)
    with pytest.raises(ValueError, match="A preference is one between two"):
        la.uncertainty(x)
    with pytest.raises(ValueError, match="fitted to pairs"):
        Laplace(model, "reward_modeling", "all").fit([(x, torch.zeros(4).long())])
    with pytest.raises(ValueError, match="fitted to pairs"):
        Laplace(model.net, "reward_modeling", "all").fit(data)
    with pytest.raises(ValueError, match="Labels lie between 0 and 2"):
        Laplace(model, "reward_modeling", "all").fit([(data[0][0], torch.tensor([0, 1, 2, 0, 1, 0]))])
    with pytest.raises(ValueError, match="no observation noise"):
        la.sigma_noise = 0.3


def test_samples_are_rewards(problem):
    model, data, x = problem
    la = Laplace(model, "reward_modeling", "all", "full", prior_precision=3.0).fit(data)
    mean, covariance = la(x)
    samples = la.predictive_samples(x, 20000, torch.Generator().manual_seed(0))
    assert samples.shape == (20000, 4, 1)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(samples.var(0), covariance[:, 0], atol=0.02, rtol=0.05)
    mean, variance = la(x, pred_type="nn", n_samples=50, generator=torch.Generator().manual_seed(0))
    assert mean.shape == variance.shape == (4, 1)


@pytest.mark.filterwarnings("ignore:The largest prior precision of the grid")
def test_from_preferences_to_rewards():
    """Preferences are by a known reward: it is found again, and where there were none its variance is larger."""
    model, pairs = RewardModel(8), torch.randn(300, 2, 3).clamp(-1.5, 1.5)

    def reward(x):
        return 3 * x[..., 0] - 2 * x[..., 1].square()

    gap = reward(pairs[:, 1]) - reward(pairs[:, 0])
    y = (torch.rand(300) < gap.sigmoid()).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pairs), y).backward()
        optimizer.step()
    data = [(pairs[:150], y[:150]), (pairs[150:], y[150:])]
    la = Laplace(model, "reward_modeling", "all", "kron").fit(data)
    la.optimize_prior_precision()
    x = torch.randn(200, 3).clamp(-1.5, 1.5)
    mean, variance = la(x)
    assert torch.corrcoef(torch.stack([mean[:, 0], reward(x)]))[0, 1] > 0.85
    assert la(4 * x)[1].mean() > 2 * variance.mean()
    held_out = [(pairs[:50], y[:50])]
    found = la.optimize_prior_precision("gridsearch", val_loader=held_out, grid_size=5)
    assert torch.isfinite(found.grid.scores).all()
    assert found.grid.scores.std() > 0


# -- beside laplace-torch


@pytest.mark.peer("laplace")
@pytest.mark.filterwarnings("ignore:By default .link_approx. is .probit.:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_rewards_and_evidence_are_those_of_laplace_torch(problem, structure):
    import laplace

    import lapkit.compat.laplace as compat

    model, data, x = problem
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([p for p, _ in data]), torch.cat([y for _, y in data])), batch_size=4
    )
    found = []
    for library in (laplace, compat):
        la = library.Laplace(
            copy.deepcopy(model), "reward_modeling", "all", structure, prior_precision=DELTA,
        )  # fmt: skip
        la.fit(loader)
        found.append([*la(x), la(data[0][0], fitting=True), la.log_marginal_likelihood().detach()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours))


@pytest.mark.peer("laplace")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_kronecker_factors_of_rewards(problem):
    """Both rewards of a pair go into the inputs' factor there, and N pairs into its divisor: it is twice as large."""
    import laplace

    model, data, _ = problem
    pairs, y = torch.cat([p for p, _ in data]), torch.cat([y for _, y in data])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pairs, y), batch_size=len(y))
    theirs = laplace.Laplace(copy.deepcopy(model), "reward_modeling", "all", "kron")
    theirs.fit(loader)
    ours = Laplace(model, "reward_modeling", "all", "kron").fit(data)
    exact = Laplace(model, "reward_modeling", "all", "blockdiag").fit(data)
    names = ours.fitted.parameters.names
    blocks = zip(names, theirs.H_facs.kfacs, ours.fitted.curvature.blocks, exact.fitted.curvature.blocks, strict=True)
    for name, factors, own, best in blocks:
        if "bias" in name:  # theirs has a block for each reward, though preferences see their difference alone
            torch.testing.assert_close(own.to_dense(), best.to_dense())
        else:
            torch.testing.assert_close(2 * own.to_dense(), torch.kron(*factors))
            assert abs(own.diagonal().sum() / best.diagonal().sum() - 1) < 0.3
