"""A noise for each output, tuned together with the prior precision."""

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.curvature import HeteroscedasticGaussian, PerOutputGaussian

NOISE = torch.tensor([0.2, 1.5], dtype=torch.float64)


class Case:
    """Targets with noise of two sizes, and the least squares fit to them of a network that is linear in its weights."""

    def __init__(self, examples=60):
        self.x = torch.randn(examples, 3)
        self.model = nn.Linear(3, 2)
        inputs = torch.cat([self.x, torch.ones(examples, 1)], dim=1)
        self.y = (
            torch.randn(examples, 3) @ torch.zeros(3, 2) + self.x @ torch.randn(3, 2) + NOISE * torch.randn(examples, 2)
        )
        best = torch.linalg.lstsq(inputs, self.y).solution
        with torch.no_grad():
            self.model.weight.copy_(best[:3].T)
            self.model.bias.copy_(best[3])
        cut = examples * 2 // 5
        self.inputs, self.data = inputs, [(self.x[:cut], self.y[:cut]), (self.x[cut:], self.y[cut:])]

    def laplace(self, structure="full", **options):
        return Laplace(self.model, PerOutputGaussian(torch.ones(2)), "all", structure, **options).fit(self.data)

    def log_evidence(self, log_noise, log_delta, temperature=1.0):
        """By dense algebra; the weights of both outputs are apart, and the prior is one for all."""
        noise, delta = log_noise.exp(), log_delta.exp()
        f = self.model(self.x).detach()
        fits = torch.distributions.Normal(f, noise).log_prob(self.y).sum() / temperature
        gram = self.inputs.T @ self.inputs
        for c in range(2):
            fits = fits - torch.logdet(gram / noise[c] ** 2 / temperature + delta * torch.eye(4)) / 2
        w = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return fits + (8 * log_delta - delta * w @ w) / 2


@pytest.mark.parametrize(("temperature", "examples"), [(1.0, 60), (0.5, 60), (1.0, 6)])
def test_the_evidence_has_no_slope_at_what_is_found(temperature, examples):
    """Also with four weights for the six targets of each output, where MacKay's formula alone would not do."""
    case = Case(examples)
    la = case.laplace(temperature=temperature)
    found = la.optimize_prior_precision(tune_noise=True, noise_loader=case.data)
    assert found.converged
    assert found.likelihood is la.likelihood
    noise = la.likelihood.noise * la.likelihood.scale
    if examples > 6:
        torch.testing.assert_close(noise, NOISE, rtol=0.35, atol=0)
    logs = noise.log().requires_grad_(), la.prior_precision.log().requires_grad_()
    value = case.log_evidence(*logs, temperature)
    torch.testing.assert_close(la.log_marginal_likelihood(), value.detach())
    for slope in torch.autograd.grad(value, logs):
        assert slope.abs().max() < 2e-3  # nats, of 60 / temperature that a noise has to tell


def test_one_factor_for_all_is_worse_and_needs_no_data():
    case = Case()
    one = case.laplace()
    one.optimize_prior_precision(tune_noise=True)
    assert torch.equal(one.likelihood.noise, torch.ones(2))
    each = case.laplace()
    each.optimize_prior_precision(tune_noise=True, noise_loader=case.data)
    assert each.log_marginal_likelihood() > one.log_marginal_likelihood() + 10


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "blockdiag", "lowrank", "gp"])
def test_every_structure_finds_nearly_the_same(structure):
    case = Case()
    exact, other = case.laplace(), case.laplace(structure)
    for la in (exact, other):
        assert la.optimize_prior_precision(tune_noise=True, noise_loader=case.data).converged
    torch.testing.assert_close(other.likelihood.noise, exact.likelihood.noise, rtol=0.02, atol=0)
    if structure in ("lowrank", "gp"):
        torch.testing.assert_close(other.likelihood.noise, exact.likelihood.noise, rtol=1e-6, atol=0)


def test_weights_count_as_examples():
    case = Case()
    weighted, repeated = case.laplace(), case.laplace()
    twice = [(x, y, 2 * torch.ones(len(x))) for x, y in case.data]
    weighted.fit(twice).optimize_prior_precision(tune_noise=True, noise_loader=twice)
    repeated.fit(case.data * 2).optimize_prior_precision(tune_noise=True, noise_loader=case.data * 2)
    torch.testing.assert_close(weighted.likelihood.noise, repeated.likelihood.noise)


def test_what_cannot_be_tuned_says_so():
    case = Case()
    la = case.laplace()
    with pytest.raises(ValueError, match="belongs to tune_noise=True"):
        la.optimize_prior_precision(noise_loader=case.data)
    with pytest.raises(ValueError, match="same batches again"):
        la.optimize_prior_precision(tune_noise=True, noise_loader=case.data[:1])
    one = Laplace(case.model, "regression", "all", "full").fit(case.data)
    with pytest.raises(ValueError, match="PerOutputGaussian"):
        one.optimize_prior_precision(tune_noise=True, noise_loader=case.data)
    with pytest.raises(ValueError, match="curvature='ggn'"):
        case.laplace(curvature="ef").optimize_prior_precision(tune_noise=True, noise_loader=case.data)
    mixed = Laplace(case.model, HeteroscedasticGaussian(), "all", "full").fit([(case.x, case.y[:, :1])])
    for change in (lambda: mixed.optimize_prior_precision(tune_noise=True), lambda: setattr(mixed, "sigma_noise", 1.0)):
        with pytest.raises(ValueError, match=r"the network predicts.*train"):
            change()


def test_an_error_leaves_all_as_it_was():
    case = Case()
    la = case.laplace()
    before = la.fitted, la.prior, la.likelihood, la.posterior

    class Broken(list):
        seen = 0

        def __iter__(self):
            Broken.seen += 1
            if Broken.seen > 4:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        la.optimize_prior_precision(tune_noise=True, noise_loader=Broken(case.data))
    assert all(old is new for old, new in zip(before, (la.fitted, la.prior, la.likelihood, la.posterior), strict=True))


def interpolating():
    """A network with more weights than targets, trained until it reproduces them."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        value = (model(x) - y).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return model, [(x, y)]


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_network_that_reproduces_its_targets_warns(subset):
    """One noise for all, and one for each output: there is none to be seen in what was trained on."""
    model, data = interpolating()
    with pytest.warns(UserWarning, match="far too small|edge of the search") as told:
        Laplace(model, "regression", subset, "full").fit(data).optimize_prior_precision(tune_noise=True)
    assert told[0].filename == __file__
    each = Laplace(model, PerOutputGaussian(torch.ones(2)), subset, "full").fit(data)
    with pytest.warns(UserWarning, match="reproduces its targets") as told:
        each.optimize_prior_precision(tune_noise=True, noise_loader=data, n_steps=30)
    assert all(one.filename == __file__ for one in told)
