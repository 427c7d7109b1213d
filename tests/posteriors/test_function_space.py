"""The Gaussian process over functions is the Laplace approximation with the full GGN: dense algebra in the weights."""

import copy
import re

import gpytorch
import oracles
import pytest
import torch
from dense_laplace import KINDS, NETS, problem, untouched
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Bernoulli, Categorical, Gaussian
from lapkit.posteriors import GaussianPrior, closed_form
from lapkit.posteriors.function_space import laplace_gp
from lapkit.posteriors.function_space.subset import chosen_examples

NOISE = 0.7
LIKELIHOODS = {"classification": Categorical(), "regression": Gaussian(NOISE), "binary": Bernoulli()}
STRUCTURES = ("scalar", "layerwise", "diag")


def noise_of(kind):
    return NOISE if kind == "regression" else 1.0


def precision(case, structure):
    length = {"scalar": 1, "layerwise": len(case.all), "diag": sum(case.sizes())}[structure]
    return torch.tensor(1.7) if length == 1 else 0.3 + 2 * torch.rand(length)


def joint_covariance(case, P):
    rows = case.new_jacobian.flatten(0, 1)
    return rows @ torch.linalg.solve(P, rows.T)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_and_evidence_are_those_of_the_weights(kind, net, structure):
    case = problem(kind, net)
    delta = precision(case, structure)
    with untouched(case.model):
        gp = laplace_gp(case.model, LIKELIHOODS[kind], case.data, GaussianPrior(delta, 0.2))
        found, joint = gp.functions(case.new_x), gp.joint(case.new_x)
        evidence = gp.log_marginal_likelihood()
    P = case.precision("full", delta, noise_of(kind))
    torch.testing.assert_close(found.mean, case.model(case.new_x).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.covariance, case.function_covariance(P), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(joint.covariance, joint_covariance(case, P), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(joint.mean, found.mean)
    wanted = case.log_evidence("full", delta, noise_of(kind), prior_mean=0.2)
    torch.testing.assert_close(evidence.detach(), wanted, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_facade_with_the_full_structure(kind):
    case = problem(kind)
    la = Laplace(case.model, LIKELIHOODS[kind], "all", "full", prior_precision=2.5, temperature=0.6).fit(case.data)
    gp = laplace_gp(case.model, la.likelihood, case.data, la.prior, temperature=la.temperature)
    torch.testing.assert_close(gp.log_marginal_likelihood().detach(), la.log_marginal_likelihood(), rtol=0, atol=1e-9)
    wanted, found = la.function_distribution(case.new_x), gp.functions(case.new_x)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-8, atol=1e-11)


def test_softmax_weights_are_whole_blocks_and_not_their_diagonal():
    case = problem("classification")
    J, new = case.jacobian, case.new_jacobian
    found = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(0.5)).functions(case.new_x).covariance
    diagonal = torch.einsum("ncp,nc,ncq->pq", J, case.hessians.diagonal(dim1=1, dim2=2), J)
    P = diagonal + 0.5 * torch.eye(len(diagonal))
    approximate = torch.einsum("ncp,pq,ndq->ncd", new, torch.linalg.inv(P), new)
    exact = case.function_covariance(case.precision("full", 0.5))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-11)
    assert (approximate - exact).norm() > 0.05 * exact.norm()


def test_rows_are_the_rank_of_the_hessian_and_at_most_the_weights():
    case = problem("classification")
    assert len(laplace_gp(case.model, Categorical(), case.data).observations) == 2 * len(case.x)
    many = [(torch.randn(40, 3), torch.randint(3, (40,))) for _ in range(5)]
    assert len(laplace_gp(case.model, Categorical(), many[:1]).observations) == sum(case.sizes())
    gp = laplace_gp(case.model, Categorical(), many)
    assert len(gp.observations) == sum(case.sizes())
    la = Laplace(case.model, "classification", "all", "full").fit(many)
    torch.testing.assert_close(gp.log_marginal_likelihood().detach(), la.log_marginal_likelihood(), rtol=1e-10, atol=0)
    wanted, found = la.function_distribution(case.new_x).covariance, gp.functions(case.new_x).covariance
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)


def test_examples_weigh_in():
    case = problem("classification")
    weights = torch.rand(len(case.x)) * 2
    data = [(x, y, w) for (x, y), w in zip(case.data, weights.split(5), strict=True)]
    gp = laplace_gp(case.model, Categorical(), data, GaussianPrior(0.8))
    H = torch.einsum("n,ncp,ncd,ndq->pq", weights, case.jacobian, case.hessians, case.jacobian)
    P = H + 0.8 * torch.eye(len(H))
    torch.testing.assert_close(gp.joint(case.new_x).covariance, joint_covariance(case, P), rtol=1e-8, atol=1e-11)


def test_some_of_the_weights():
    case = problem("classification", "cnn")
    gp = laplace_gp(case.model, Categorical(), case.data, GaussianPrior([2.0, 0.5]), parameters=["5"])
    P = case.precision("full", [2.0, 0.5], names=case.head)
    wanted = case.function_covariance(P, case.head)
    torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-8, atol=1e-11)


def test_outputs_at_positions():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y, new = torch.randint(5, (6, 3)), torch.randint(2, (6, 3)), torch.randint(5, (2, 3))
    gp = laplace_gp(model, Categorical(), [(x, y)])
    la = Laplace(model, "classification", "all", "full").fit([(x, y)])
    found, wanted = gp.functions(new), la.function_distribution(new)
    assert found.covariance.shape == (2, 3, 2, 2)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(gp.log_marginal_likelihood().detach(), la.log_marginal_likelihood(), rtol=0, atol=1e-9)
    blocks = gp.joint(new).covariance.unflatten(0, (2, 3, 2)).unflatten(-1, (2, 3, 2))
    torch.testing.assert_close(blocks[1, 2, :, 1, 2], found.covariance[1, 2])


def test_inputs_of_several_parts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

        def forward(self, a, b):
            return (self.left(a) * self.right(b)).tanh()

    model, x = Two(), {"a": torch.randn(5, 2), "b": torch.randn(5, 4)}
    data = [(x, torch.arange(5) % 3)]
    gp = laplace_gp(model, Categorical(), data)
    la = Laplace(model, "classification", "all", "full").fit(data)
    wanted = la.function_distribution(x).covariance
    torch.testing.assert_close(gp.functions(x).covariance, wanted, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="functions"):
        gp(x["a"])


def test_pieces_and_batches_do_not_matter():
    case = problem("classification", "cnn")
    whole = laplace_gp(case.model, Categorical(), [(case.x, case.y)])
    cut = laplace_gp(
        case.model,
        Categorical(),
        list(zip(case.x.split(1)[:2] + case.x[2:].split(6), case.y.split(1)[:2] + case.y[2:].split(6), strict=True)),
    )
    small = laplace_gp(case.model, Categorical(), case.data, memory_budget=3000)
    wanted = whole.functions(case.new_x).covariance
    for other in (cut, small):
        torch.testing.assert_close(other.functions(case.new_x).covariance, wanted, rtol=1e-9, atol=1e-12)
        joint = other.joint(case.new_x).covariance
        torch.testing.assert_close(joint, whole.joint(case.new_x).covariance, rtol=1e-9, atol=1e-12)
        grouped = other.posterior(case.x[:6].reshape(2, 3, 16)).covariance
        torch.testing.assert_close(grouped[1], whole.joint(case.x[3:6]).covariance, rtol=1e-9, atol=1e-12)


def test_single_precision_keeps_its_digits_where_the_data_determine_much():
    """The posterior variance is a 1e-7 of the prior's; in float32 nothing of it would be left."""
    case = problem("regression")
    model = copy.deepcopy(case.model).float()
    data = [(x.float(), y.float()) for x, y in case.data]
    gp = laplace_gp(model, Gaussian(0.01), data, GaussianPrior(1e-4))
    with torch.no_grad():
        for p, q in zip(case.model.parameters(), model.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-6
    found = gp.functions(case.x.float()).covariance
    P = case.precision("full", 1e-4, 0.01)
    wanted = torch.einsum("ncp,pq,ndq->ncd", case.jacobian, torch.linalg.inv(P), case.jacobian)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3 * float(wanted.diagonal(dim1=1, dim2=2).max()))


def test_lost_digits_are_told():
    case = problem("regression")
    gp = laplace_gp(case.model, Gaussian(1e-4), case.data, GaussianPrior(1e-9))
    for predict in (gp.functions, gp.joint):
        with pytest.warns(UserWarning, match="few digits"):
            predict(case.x[:2])


@pytest.mark.parametrize(("prior", "error"), [(1e-2, 3e-6), (1e-4, 1e-4)])
def test_digits_are_kept_where_the_observations_are_nearly_dependent(prior, error):
    """A hundred points on a line, determined to 1e-10 of the prior; against the Jacobian's singular values."""
    x = torch.linspace(-3, 3, 100)[:, None]
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    with torch.no_grad():
        model[0].weight.mul_(3)
    left, singular, _ = torch.linalg.svd(oracles.jacobian(model, x)[:, 0], full_matrices=False)
    wanted = left.square() @ (singular.square() / (singular.square() / 0.01**2 + prior))
    gp = laplace_gp(model, Gaussian(0.01), [(x, (2 * x).sin())], GaussianPrior(prior))
    for found in (gp.functions(x).variance[:, 0], gp.joint(x).variance[:, 0], gp(x).variance):
        torch.testing.assert_close(found.detach(), wanted, rtol=error, atol=0)
    gp = laplace_gp(model, Gaussian(0.01), [(x, (2 * x).sin())], GaussianPrior(1e-6))
    for predict in (gp.functions, gp.joint, gp):
        with pytest.warns(UserWarning, match="few digits"):
            predict(x)


# -- gpytorch at work


@pytest.mark.parametrize("kind", KINDS)
def test_gpytorchs_own_prediction_and_marginal_likelihood(kind):
    case = problem(kind)
    gp = laplace_gp(case.model, LIKELIHOODS[kind], case.data, GaussianPrior(0.9))
    P = case.precision("full", 0.9, noise_of(kind))
    for fast in (False, True):
        with gpytorch.settings.fast_pred_var(fast):
            found = gp(case.new_x)
        assert isinstance(found, gpytorch.distributions.MultitaskMultivariateNormal)
        torch.testing.assert_close(found.covariance_matrix, joint_covariance(case, P), rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(found.mean, case.model(case.new_x).detach())
    with gpytorch.settings.prior_mode():
        theta = torch.einsum("ncp,mdp->ncmd", case.new_jacobian, case.new_jacobian) / 0.9
        torch.testing.assert_close(gp(case.new_x).covariance_matrix.detach(), theta.flatten(2).flatten(0, 1))
    gp.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    value = mll(gp(*gp.train_inputs), gp.train_targets) * len(gp.observations)
    wanted = case.log_evidence("full", 0.9, noise_of(kind))
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_gradient_of_the_evidence_in_precision_and_noise(structure):
    case = problem("regression")
    delta = precision(case, structure)
    gp = laplace_gp(case.model, Gaussian(NOISE), case.data, GaussianPrior(delta))
    gp.log_marginal_likelihood().backward()
    logs = torch.as_tensor(delta).reshape(-1).log().requires_grad_()
    log_noise = (2 * torch.tensor(NOISE).log()).requires_grad_()
    value = _dense_evidence(case, logs.exp(), (log_noise / 2).exp())
    wanted = torch.autograd.grad(value, (logs, log_noise))
    torch.testing.assert_close(gp.covar_module.raw_prior_precision.grad, wanted[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gp.likelihood.raw_noise.grad[0], wanted[1], rtol=1e-8, atol=1e-9)


def _dense_evidence(case, delta, noise):
    sizes = torch.tensor(case.sizes())
    prior = delta.expand(int(sizes.sum())) if len(delta) == 1 else delta
    prior = delta.repeat_interleave(sizes) if len(delta) == len(sizes) else prior
    J = case.jacobian.flatten(0, 1)
    residual = (case.y - case.f).flatten()
    fits = torch.distributions.Normal(0, noise).log_prob(residual).sum()
    P = J.T @ J / noise**2 + prior.diag()
    return fits - (prior * case.mean() ** 2).sum() / 2 + (prior.log().sum() - torch.logdet(P)) / 2


def test_gpytorchs_optimisers_find_what_the_facade_finds():
    case = problem("regression")
    la = Laplace(case.model, "regression", "all", "full").fit(case.data)
    best = la.optimize_prior_precision(tune_noise=True)
    gp = laplace_gp(case.model, Gaussian(1.0), case.data).train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimiser = torch.optim.LBFGS(gp.parameters(), max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure():
        optimiser.zero_grad()
        loss = -mll(gp(*gp.train_inputs), gp.train_targets)
        loss.backward()
        return loss

    optimiser.step(closure)
    gp.eval()
    assert gp.log_marginal_likelihood().item() == pytest.approx(best.log_evidence, abs=1e-5)
    assert gp.covar_module.prior_precision.item() == pytest.approx(float(la.prior_precision), rel=1e-2)
    assert gp.target_likelihood.noise.item() == pytest.approx(float(la.sigma_noise), rel=1e-2)
    wanted = la.function_distribution(case.new_x).covariance
    torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-2, atol=1e-4)
    assert all(p.grad is None for p in case.model.parameters())


def test_predictions_follow_the_hyper_parameters():
    """gpytorch's caches are those of the values at which they were made."""
    case = problem("classification")
    gp = laplace_gp(case.model, Categorical(), case.data)
    gp.functions(case.new_x), gp(case.new_x)
    gp.covar_module.prior_precision = 3.0
    wanted = case.function_covariance(case.precision("full", 3.0))
    torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-8, atol=1e-11)
    one = gp(case.new_x[:1]).covariance_matrix
    torch.testing.assert_close(one, wanted[0], rtol=1e-8, atol=1e-11)
    with torch.no_grad():
        gp.covar_module.raw_prior_precision.fill_(0.0)
    wanted = case.function_covariance(case.precision("full", 1.0))
    torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-8, atol=1e-11)


def test_exact_beyond_gpytorchs_limit_and_iterative_where_allowed():
    case = problem("classification")
    with gpytorch.settings.max_cholesky_size(1):
        gp = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(2.0))
        wanted = case.function_covariance(case.precision("full", 2.0))
        torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-8, atol=1e-11)
        evidence = gp.log_marginal_likelihood().detach()
        torch.testing.assert_close(evidence, case.log_evidence("full", 2.0), rtol=1e-10, atol=1e-9)
        with gpytorch.settings.max_eager_kernel_size(1):
            found = gp(case.new_x).covariance_matrix
        torch.testing.assert_close(found, joint_covariance(case, case.precision("full", 2.0)), rtol=1e-8, atol=1e-11)
        loose = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(2.0), iterative=True)
        found = loose(case.new_x).covariance_matrix
        torch.testing.assert_close(found, joint_covariance(case, case.precision("full", 2.0)), rtol=0, atol=1e-4)


# -- a subset of the data


def test_a_subset_is_a_data_set_of_its_own():
    case = problem("classification")
    places = [1, 4, 5, 12]
    gp = laplace_gp(case.model, Categorical(), case.data, subset_of_data=places)
    own = laplace_gp(case.model, Categorical(), [(case.x[places], case.y[places])])
    torch.testing.assert_close(gp.log_marginal_likelihood(), own.log_marginal_likelihood())
    torch.testing.assert_close(gp.functions(case.new_x).covariance, own.functions(case.new_x).covariance)
    whole = laplace_gp(case.model, Categorical(), case.data).functions(case.new_x).variance
    assert (gp.functions(case.new_x).variance >= whole - 1e-12).all()


def test_a_number_of_examples_is_drawn_evenly_and_repeatably():
    data = [(torch.arange(3), torch.arange(3)), (torch.arange(3, 8), torch.arange(3, 8))]

    def draw(generator):
        return torch.cat([x for x, _ in chosen_examples(data, 3, generator)]).tolist()

    assert draw(torch.Generator().manual_seed(1)) == draw(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(generator) for _ in range(800)]
    assert all(len(set(one)) == 3 for one in drawn)
    counts = torch.tensor(drawn).flatten().bincount(minlength=8)
    assert (counts - 300).abs().max() < 5 * (800 * 3 / 8 * 5 / 8) ** 0.5
    case = problem("regression")
    gp = laplace_gp(case.model, Gaussian(), case.data, subset_of_data=4, generator=generator)
    assert gp.totals.count == 4


@pytest.mark.parametrize(
    ("subset", "error", "words"),
    [
        (0, ValueError, "at least one"),
        (14, ValueError, "13 examples"),
        ([], ValueError, "at least one"),
        ([1, 1], ValueError, "twice"),
        ([13], ValueError, "13 examples"),
        ([-1], ValueError, "zero"),
        (0.5, TypeError, "number of examples"),
        (torch.rand(3), TypeError, "integers"),
        ([True, False], TypeError, "integers"),
    ],
)
def test_impossible_subsets(subset, error, words):
    case = problem("classification")
    with pytest.raises(error, match=words):
        list(chosen_examples(case.data, subset))


# -- refusals


def test_a_network_that_was_trained_on_is_noticed():
    model = nn.Linear(2, 3)
    gp = laplace_gp(model, Categorical(), [(torch.randn(4, 2), torch.arange(4) % 3)])
    with torch.no_grad():
        model.bias += 0.1
    with pytest.raises(RuntimeError, match="changed"):
        gp.functions(torch.randn(1, 2))


def test_data_that_change_later_do_not_matter():
    case = problem("classification")
    x = case.x.clone()
    gp = laplace_gp(case.model, Categorical(), [(x, case.y)])
    x.zero_()
    wanted = case.function_covariance(case.precision("full", 1.0))
    torch.testing.assert_close(gp.functions(case.new_x).covariance, wanted, rtol=1e-8, atol=1e-11)


def test_memory_is_bounded():
    case = problem("classification")
    with pytest.raises(ValueError, match="subset_of_data"):
        laplace_gp(case.model, Categorical(), case.data, memory_limit=2000)
    with pytest.raises(ValueError, match="at least 1"):
        laplace_gp(case.model, Categorical(), case.data, memory_limit=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prior": GaussianPrior([1.0, 2.0, 3.0])}, ValueError, "prior precision"),
        ({"prior": GaussianPrior(1.0, torch.zeros(3))}, ValueError, "prior mean"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"data": []}, ValueError, "empty"),
        ({"data": (torch.randn(3, 3), torch.arange(3))}, TypeError, "batch"),
        ({"likelihood": "classification"}, TypeError, "likelihood"),
        ({"model": None}, TypeError, "Module"),
        ({"parameters": ["nothing"]}, ValueError, "nothing"),
    ],
)
def test_bad_arguments(change, error, words):
    case = problem("classification")
    given = {"model": case.model, "likelihood": Categorical(), "data": case.data, "prior": None, **change}
    with pytest.raises(error, match=words):
        laplace_gp(given.pop("model"), given.pop("likelihood"), given.pop("data"), given.pop("prior"), **given)


def test_what_gpytorch_offers_and_the_mode_forbids():
    case = problem("regression")
    gp = laplace_gp(case.model, Gaussian(), case.data)
    found = gp(case.new_x)
    with pytest.raises(ValueError, match="observation_noise"):
        gp.likelihood(found)
    with pytest.raises(NotImplementedError, match="laplace_gp"):
        gp.set_train_data(case.new_x, torch.zeros(4))
    with pytest.raises(NotImplementedError, match="laplace_gp"):
        gp.get_fantasy_model(case.new_x, torch.zeros(4))
    with pytest.raises(ValueError, match=re.escape("(..., N, 3)")):
        gp(torch.randn(2, 4))


def test_links_and_state():
    case = problem("classification")
    gp = laplace_gp(case.model, Categorical(), case.data)
    probabilities = closed_form(gp.target_likelihood, gp.functions(case.new_x)).probs
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    assert set(gp.state_dict()) >= {"covar_module.raw_prior_precision", "likelihood.noise_covar.raw_noise"}
    assert [name for name, p in gp.named_parameters() if p.requires_grad] == ["covar_module.raw_prior_precision"]
    other = laplace_gp(case.model, Categorical(), case.data, GaussianPrior(4.0))
    other.load_state_dict(gp.state_dict())
    torch.testing.assert_close(other.functions(case.new_x).covariance, gp.functions(case.new_x).covariance)


@pytest.mark.gpu
def test_on_a_cuda_device():
    case = problem("classification", "cnn")
    model = copy.deepcopy(case.model).cuda()
    data = [(x.cuda(), y.cuda()) for x, y in case.data]
    gp = laplace_gp(model, Categorical(), data)
    wanted = case.function_covariance(case.precision("full", 1.0))
    found = gp.functions(case.new_x.cuda()).covariance
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-7, atol=1e-10)
    assert gp(case.new_x.flatten(1).cuda()).covariance_matrix.is_cuda
    x = case.new_x.flatten(1).cuda().requires_grad_()
    (gradient,) = torch.autograd.grad(gp.posterior(x).variance.sum(), x)
    assert gradient.is_cuda
    assert torch.isfinite(gradient).all()
