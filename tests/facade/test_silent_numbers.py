"""Numbers that could go wrong without a word: extreme priors in single precision, and calls that make no sense."""

import copy

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.curvature import PerOutputGaussian
from lapkit.invariance import InvariantModel, evidence_over_transform, posterior_directions
from lapkit.transforms import AffineTransform

PRIORS = {
    "tensors apart": torch.tensor([1e-30, 1.0, 1e30, 1e-5]),
    "tiny tensors": torch.full((4,), 1e-30),
    "tiny weights": torch.full((26,), 1e-30),
    "weights apart": torch.where(torch.arange(26) % 2 == 0, 1e-30, 1.0),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("structure", ["full", "blockdiag"])
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_slopes_of_the_evidence_are_finite_in_single_precision(structure, name, size):
    """The quotient of curvature and prior, 1e40, is beyond single precision; so is `delta^(-3/2)` in its derivative."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).float()
    x, y = size * torch.randn(20, 3, dtype=torch.float32), torch.randn(20, 2, dtype=torch.float32)
    slopes, ratios = [], []
    for dtype in (torch.float32, torch.float64):
        la = Laplace(copy.deepcopy(model).to(dtype), "regression", "all", structure).fit([(x.to(dtype), y.to(dtype))])
        log = PRIORS[name].to(dtype).log().requires_grad_()
        la.prior_precision = log.exp()
        ratios.append(la.log_det_ratio)
        (slope,) = torch.autograd.grad(ratios[-1], log)
        slopes.append(slope.double())
    torch.testing.assert_close(ratios[0].double(), ratios[1], rtol=1e-3, atol=0)  # of what single precision has summed
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-2, atol=1e-2)


def test_the_prior_is_no_less_precise_than_the_weights():
    la = Laplace(nn.Linear(3, 2), "regression", "all", "full").fit([(torch.randn(5, 3), torch.randn(5, 2))])
    for dtype in (torch.float16, torch.float32):
        la.prior_precision = torch.tensor(0.3, dtype=dtype)
        assert la.log_det_prior_precision.dtype == torch.float64
        torch.testing.assert_close(
            la.log_det_posterior_precision - la.log_det_prior_precision, la.log_det_ratio, rtol=1e-12, atol=0
        )


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h + torch.tanh(h))


@pytest.mark.peer("backpack")
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_branch_that_backpack_does_not_see_is_refused(structure):
    """It would count the other branch alone."""
    data = [(torch.randn(6, 4), torch.randn(6, 2))]
    with pytest.raises(ValueError, match=r"adds up branches.*tanh.*backend='lapkit'"):
        Laplace(Joined(), "regression", "all", structure, backend="backpack").fit(data)


@pytest.mark.peer("backpack")
def test_a_branch_that_backpack_does_not_see_has_right_gradients():
    model, data = Joined(), [(torch.randn(6, 4), torch.randn(6, 2))]
    one, two = (
        Laplace(model, "regression", "all", "full", curvature="ef", backend=backend).fit(data)
        for backend in ("backpack", "lapkit")
    )
    torch.testing.assert_close(one.posterior_precision.to_dense(), two.posterior_precision.to_dense())


@pytest.mark.peer("backpack", "curvlinops")
@pytest.mark.parametrize("backend", ["backpack", "curvlinops"])
def test_other_backends_fit_in_inference_mode(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    data = [(torch.randn(6, 3), torch.arange(6) % 2)]
    expected = Laplace(model, "classification", "all", "diag").fit(data).posterior_precision.to_dense()
    with torch.inference_mode():
        found = Laplace(model, "classification", "all", "diag", backend=backend).fit(data)
    torch.testing.assert_close(found.posterior_precision.to_dense(), expected)


class Rewards(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.net(x) if x.ndim == 2 else self.net(x.flatten(0, 1)).reshape(len(x), 2)


def test_rewards_that_cancel_are_refused():
    """Of the last layer's curvature nothing would be left."""
    with pytest.raises(ValueError, match="both rewards of a pair, which cancel"):
        Laplace(Rewards(), "reward_modeling", "all", "kron_reduce")


def test_a_reward_model_is_evaluated_on_preferences():
    model, pairs = Rewards(), torch.randn(20, 2, 3)
    preferred = torch.where(torch.arange(20) % 3 == 0, model(pairs).argmin(1), model(pairs).argmax(1))
    missing = torch.where(torch.arange(20) == 4, -100, preferred)
    la = Laplace(model, "reward_modeling", "all", "kron").fit([(pairs, preferred)])
    for y in (preferred, missing):
        found = la.evaluate([(pairs[:7], y[:7]), (pairs[7:], y[7:])], validation=[(pairs, y)]).to_dict()["rows"]
        kept = y >= 0
        nll = -la.predictive_distribution(pairs[kept]).log_prob(y[kept]).mean()
        assert found["Laplace"]["NLL"] == pytest.approx(float(nll))
        mode = model(pairs).detach()[kept].log_softmax(-1)
        assert found["MAP"]["NLL"] == pytest.approx(float(nn.functional.nll_loss(mode, y[kept])))


def test_no_direction_is_no_bound():
    model = InvariantModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), AffineTransform(), n_samples=3)
    data = [(torch.randn(6, 1, 4, 4), torch.arange(6) % 2)]
    la = Laplace(model, "classification", "all", "diag").fit(data)
    for n_samples in (0, -1):
        with pytest.raises(ValueError, match="at least one direction"):
            posterior_directions(la, n_samples)
    with pytest.raises(ValueError, match="Expected directions"):
        evidence_over_transform(la, data, torch.zeros(0, la.n_params))


def test_a_kind_of_transform_has_one_range():
    with pytest.raises(ValueError, match="each at most once"):
        AffineTransform(("rotation", "rotation"))


def test_an_evidence_is_finite_or_an_error():
    """Zero loss times a precision of 1e40 is NaN in single precision."""
    model, x = nn.Linear(3, 2).float(), torch.randn(5, 3, dtype=torch.float32)
    for y in (model(x).detach(), torch.randn(5, 2, dtype=torch.float32)):
        la = Laplace(model, "regression", "all", "full").fit([(x, y)])
        with pytest.raises(ValueError, match=r"evidence is .*range of torch\.float32"):
            la.log_marginal_likelihood(sigma_noise=1e-20)
        assert torch.isfinite(la.log_marginal_likelihood(sigma_noise=1e-10, prior_precision=1e-10))


@pytest.mark.parametrize("options", [{"n_steps": 0}, {"noise_bounds": (2.0, 1.0)}, {"noise_bounds": (-1.0, 1.0)}])
def test_noises_of_outputs_need_steps_and_bounds(options):
    data = [(torch.randn(9, 3), torch.randn(9, 2))]
    la = Laplace(nn.Linear(3, 2), PerOutputGaussian(torch.ones(2)), "all", "full").fit(data)
    with pytest.raises(ValueError, match="at least one step, and noise bounds that ascend"):
        la.optimize_prior_precision(tune_noise=True, noise_loader=data, **options)


def test_data_that_say_nothing_are_spoken_of():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    for y, w in ((torch.full((5,), -100), torch.ones(5)), (torch.arange(5) % 2, torch.zeros(5))):
        with pytest.warns(UserWarning, match="say nothing of the weights.*No label counts"):
            la = Laplace(model, "classification", "all", "kron").fit([(x, y, w)])
        torch.testing.assert_close(la.posterior_variance, torch.ones(8))  # the prior's
    sure = nn.Linear(3, 2)
    with torch.no_grad():
        sure.weight.zero_()
        sure.bias.copy_(torch.tensor([1e4, 0.0]))
    with pytest.warns(UserWarning, match="a probability of one to all digits"):
        Laplace(sure, "classification", "all", "diag").fit([(x, torch.zeros(5, dtype=torch.long))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["full", "blockdiag", "kron", "diag", "lowrank", "ekfac", "gp"])
def test_a_fit_in_inference_mode_is_for_any_use(structure, dtype):
    model, x, y = nn.Linear(3, 1).to(dtype), torch.randn(9, 3, dtype=dtype), torch.randn(9, 1, dtype=dtype)
    with torch.inference_mode():
        la = Laplace(model, "regression", "all", structure).fit([(x, y)])
    other = Laplace(model, "regression", "all", structure).fit([(x, y)])
    gradients = []
    for each in (la, other):
        each.prior_precision = torch.tensor([0.5, 2.0])
        noise = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        precision = torch.tensor([0.3, 0.4, 0.5, 0.6], dtype=dtype, requires_grad=True)
        one, two = each.log_marginal_likelihood(sigma_noise=noise), each.log_marginal_likelihood(precision)
        gradients.append(torch.autograd.grad(one, noise) + torch.autograd.grad(two, precision))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "blockdiag", "lowrank"])
def test_what_an_evidence_returns_is_the_callers_own(structure):
    la = Laplace(nn.Linear(3, 2).double(), "classification", "all", structure)
    la.fit([(torch.randn(9, 3).double(), torch.arange(9) % 2)])
    before = float(la.log_marginal_likelihood())
    for name in ("log_det_ratio", "log_det_posterior_precision", "log_likelihood", "scatter", "posterior_variance"):
        found = getattr(la, name)
        found += 1000
    assert float(la.log_marginal_likelihood()) == before
