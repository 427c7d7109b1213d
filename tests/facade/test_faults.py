"""Interrupts, users' exceptions and extreme numbers: a right answer or a clear error, and the model unchanged."""

import copy
import math

import pytest
import torch
from dense_laplace import problem, untouched
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.marglik import marglik_training

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")
WRITTEN_OUT = ("diag", "kron", "blockdiag", "full", "lowrank")  # those that dense_laplace has by dense matrices
LINKS = ("probit", "probit_centered", "mean_field", "bridge", "bridge_norm", "mc")
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


class Interrupted:
    """A loader in which something happens before a batch, the first so many times that it is run through."""

    def __init__(self, batches, event, times=1, before=1):
        self.batches, self.event, self.times, self.before = batches, event, times, before

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.before and self.times > 0:
                self.times -= 1
                raise self.event
            yield batch


class Fails:
    """A `forward_fn` that raises from its n-th call on, while it is armed."""

    def __init__(self):
        self.calls_left = math.inf

    def __call__(self, model, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise ZeroDivisionError("the user's own")
        return model(x)


def with_gradients(model):
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def finite_probabilities(la, x):
    for link in LINKS:
        p = la(x, link_approx=link, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(p.sum(-1), torch.ones(len(x)))
    assert torch.isfinite(la(x, pred_type="nn", n_samples=3)).all()


# -- interrupts and exceptions


@every_structure
@pytest.mark.parametrize(
    "event", [KeyboardInterrupt(), ZeroDivisionError("the user's own")], ids=["interrupt", "error"]
)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_fit_that_is_interrupted_can_be_run_again(structure, event, subset):
    case = problem("classification")
    model = with_gradients(case.fresh)
    la, loader = Laplace(model, "classification", subset, structure), Interrupted(case.data, event)
    with untouched(model), pytest.raises(type(event)):
        la.fit(loader)
    with pytest.raises(RuntimeError, match="has not been fitted"):
        la.log_marginal_likelihood()
    expected = Laplace(model, "classification", subset, structure).fit(case.data).log_marginal_likelihood()
    with untouched(model):
        assert torch.equal(la.fit(loader).log_marginal_likelihood(), expected)


@every_structure
@pytest.mark.parametrize("override", [True, False])
def test_an_interrupt_leaves_an_earlier_fit(structure, override):
    case = problem("classification")
    model = with_gradients(case.fresh)
    la = Laplace(model, "classification", "all", structure).fit(case.data)
    before, p = la.log_marginal_likelihood(), la(case.new_x)
    error = ValueError if structure == "ekfac" and not override else KeyboardInterrupt  # it does not add up
    with untouched(model), pytest.raises(error):
        la.fit(Interrupted(case.data, KeyboardInterrupt()), override=override)
    assert torch.equal(la.log_marginal_likelihood(), before)
    assert torch.equal(la(case.new_x), p)


@every_structure
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_exception_of_the_model(structure, calls):
    """In its first call, in that of a check, in that of the next batch; then while predicting."""
    case, forward_fn = problem("classification"), Fails()
    model = with_gradients(case.fresh)
    la = Laplace(model, "classification", "all", structure, forward_fn=forward_fn)
    forward_fn.calls_left = calls
    with untouched(model), pytest.raises(ZeroDivisionError):
        la.fit(case.data)
    forward_fn.calls_left = math.inf
    la.fit(case.data)
    expected = la(case.new_x)
    for pred_type in ("glm", "nn"):
        forward_fn.calls_left = 0 if pred_type == "glm" else calls
        with untouched(model), pytest.raises(ZeroDivisionError):
            la(case.new_x, pred_type=pred_type, n_samples=5)
        forward_fn.calls_left = math.inf
        assert torch.equal(la(case.new_x), expected)


@every_structure
def test_numbers_that_turn_bad_in_a_later_batch(structure):
    case = problem("classification")
    model = with_gradients(case.fresh)
    la = Laplace(model, "classification", "all", structure).fit(case.data)
    before = la.log_marginal_likelihood()
    (x, y), bad = case.data[1], float("nan")
    for batch in ((x * bad, y), (x[:0], y[:0])):
        with (
            untouched(model),
            pytest.raises(ValueError, match=r"NaN or infinite|at least one example|empty|no example"),
        ):
            la.fit([case.data[0], batch])
        assert torch.equal(la.log_marginal_likelihood(), before)


class EndsAt:
    """`after_fit` that interrupts at a certain evidence."""

    def __init__(self, number):
        self.left = number

    def __call__(self, la):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@every_structure
def test_training_goes_on_after_an_interrupt(structure, tmp_path):
    case = problem("classification")
    options = {"hessian_structure": structure, "n_epochs": 6, "burn_in": 1, "frequency": 2, "n_hypersteps": 2}
    whole, model = case.fresh, case.fresh
    expected = marglik_training(whole, case.data, "classification", **options)
    path = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        marglik_training(model, case.data, "classification", checkpoint=path, after_fit=EndsAt(2), **options)
    found = marglik_training(case.fresh, case.data, "classification", checkpoint=path, after_fit=EndsAt(0), **options)
    assert found.log_evidences == expected.log_evidences
    assert found.losses == expected.losses
    assert torch.equal(found.laplace.mean, expected.laplace.mean)


# -- small data


@pytest.mark.parametrize("structure", WRITTEN_OUT)
def test_a_class_that_is_absent(structure):
    case, model = problem("classification"), problem("classification").fresh
    y = case.y.clamp_max(1)  # the third class never occurs
    la = Laplace(model, "classification", "all", structure).fit([(case.x, y)])
    likelihood = torch.distributions.Categorical(logits=case.f).log_prob(y).sum()
    expected = case.log_evidence(structure) - case.log_likelihood() + likelihood  # curvature knows no targets
    torch.testing.assert_close(la.log_marginal_likelihood(), expected)
    finite_probabilities(la, case.new_x)


@every_structure
def test_one_parameter_and_one_example(structure):
    """f = w x, so that H = x^2 / s^2, whatever is kept of it."""
    w, x, y, s, delta = 0.7, 2.0, 1.5, 0.5, 3.0
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, w)
    la = Laplace(model, "regression", "all", structure, sigma_noise=s, prior_precision=delta)
    la.fit([(torch.tensor([[x]]), torch.tensor([[y]]))])
    precision = x * x / s**2 + delta
    likelihood = -0.5 * ((y - w * x) / s) ** 2 - math.log(s * math.sqrt(2 * math.pi))
    expected = likelihood - 0.5 * (math.log(precision / delta) + delta * w * w)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    mean, variance = la(torch.tensor([[4.0]]))
    assert (float(mean), float(variance)) == pytest.approx((4 * w, 16 / precision), rel=1e-10)


# -- large and small numbers


@every_structure
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logits_without_bounds(structure, scale):
    """All curvature has gone where one class is certain: the evidence is that of the prior, the variance too."""
    case, model = problem("classification"), problem("classification").fresh
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    la = Laplace(model, "classification", "last_layer", structure).fit(case.data)
    likelihood = -F.cross_entropy(model(case.x), case.y, reduction="sum")
    scatter = sum(p.square().sum() for p in model[-1].parameters())
    torch.testing.assert_close(
        la.log_marginal_likelihood(), (likelihood - 0.5 * scatter).detach(), rtol=1e-8, atol=1e-8
    )
    finite_probabilities(la, case.new_x)


@every_structure
def test_logits_beyond_the_type(structure):
    model, x = nn.Linear(3, 3).double(), torch.full((4, 3), 1e300)
    nn.init.constant_(model.weight, 1e30)
    with untouched(model), pytest.raises(ValueError, match="NaN or infinite"):
        Laplace(model, "classification", "all", structure).fit([(x, torch.arange(4) % 3)])


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prior_that_leaves_nothing_to_learn(structure, dtype):
    case = problem("classification")
    model, delta = case.fresh.to(dtype), 1e30
    la = Laplace(model, "classification", "all", structure, prior_precision=delta).fit([(case.x.to(dtype), case.y)])
    evidence = -0.5 * delta * case.mean().square().sum()
    torch.testing.assert_close(la.log_marginal_likelihood().double(), evidence, rtol=1e-5, atol=0)
    torch.testing.assert_close(la.posterior_variance.double(), torch.full_like(case.mean(), 1e-30), rtol=1e-5, atol=0)
    expected = model(case.new_x.to(dtype)).softmax(-1).detach()
    torch.testing.assert_close(la(case.new_x.to(dtype)), expected)


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prior_that_says_nothing(structure, dtype):
    """Numbers are finite and variances positive; where digits do not suffice, an error says what helps."""
    case = problem("regression")
    model = case.fresh.to(dtype)
    la = Laplace(model, "regression", "all", structure, prior_precision=1e-30)
    la.fit([(case.x.to(dtype), case.y.to(dtype))])
    assert torch.isfinite(la.log_marginal_likelihood())
    try:
        mean, covariance = la(case.new_x.to(dtype))
    except ValueError as error:
        assert "larger prior precision" in str(error)  # noqa: PT017 (an answer is right as well)
        return
    torch.testing.assert_close(mean, model(case.new_x.to(dtype)).detach())
    assert torch.isfinite(covariance).all()
    assert (covariance.diagonal(dim1=1, dim2=2) >= 0).all()


def test_tiny_priors_do_not_overflow_the_evidence():
    """In float32 the quotient 1e10 / 1e-30 is infinite, its logarithm is not."""
    model, x = nn.Linear(2, 1, bias=False).float(), 1e5 * torch.eye(2, dtype=torch.float32)
    nn.init.zeros_(model.weight)
    for structure in STRUCTURES:
        la = Laplace(model, "regression", "all", structure, prior_precision=1e-30).fit([(x, x[:, :1] * 0)])
        ratio = 2 * math.log(1e10 / 1e-30)
        assert float(la.log_det_ratio) == pytest.approx(ratio, rel=1e-5), structure


@every_structure
def test_negative_eigenvalues_by_rounding(structure):
    """Inputs and units that repeat in float32: most eigenvalues are zero but for rounding, of either sign."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:1].expand(8, 6))
    x = torch.randn(40, 1, dtype=torch.float32).expand(40, 6) * 30
    y, options = torch.arange(40) % 3, {"prior_precision": 1e-2}
    la = Laplace(model, "classification", "all", structure, **options).fit([(x, y)])
    exact = Laplace(copy.deepcopy(model).double(), "classification", "all", structure, **options)
    mine = la.log_marginal_likelihood(), la(x[:4])
    assert (la.posterior_variance > 0).all()
    exact.fit([(x.double(), y)])
    torch.testing.assert_close(mine[0].double(), exact.log_marginal_likelihood(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mine[1].double(), exact(x[:4].double()), rtol=1e-3, atol=1e-3)


def test_a_kronecker_evidence_keeps_its_digits_in_single_precision():
    """Not as the difference of two logarithms that grow with the number of weights."""
    model, x = nn.Linear(400, 400, bias=False).float(), torch.randn(30, 400, dtype=torch.float32)
    la = Laplace(model, "regression", "all", "kron").fit([(x, model(x).detach())])
    exact = la.fitted.curvature.to(dtype=torch.float64)
    for delta in (30.0, 3.0, 0.3, 0.03, 0.003):
        la.prior_precision = delta
        assert float(la.log_det_ratio) == pytest.approx(float(exact.logdet_ratio(delta)), rel=2e-7)
