"""The facade, for every structure, subset and likelihood, against the dense oracle; and what it must leave alone."""

import copy
import itertools

import pytest
import reference_problem as ref
import torch
from dense_laplace import KINDS, NETS, STRUCTURES, problem, untouched
from scipy.stats import chi2, chisquare
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lapkit import Laplace, curvature

NOISE, DELTA, TEMPERATURE = 0.6, 0.7, 1.3
IMPROBABLE = 1e-6  # a right sampler fails a test once in a million seeds; seeds are fixed
SUBSETS = {"mlp": ["all", "last_layer", ["0.weight", "2"]], "cnn": ["all", "last_layer", ["0", "2.weight"]]}
NAMED = {"mlp": ["0.weight", "2.weight", "2.bias"], "cnn": ["0.weight", "0.bias", "2.weight"]}


def noise_of(kind):
    return NOISE if kind == "regression" else 1.0


def laplace(kind, structure="kron", net="mlp", subset="all", model=None, data=None, **options):
    case = problem(kind, net)
    options = {"sigma_noise": noise_of(kind), "prior_precision": DELTA} | options
    la = Laplace(model or case.model, kind, subset, structure, **options)
    return la.fit(case.data if data is None else data)


def probit(kind, f, covariance):
    scaled = f / torch.sqrt(1 + torch.pi / 8 * torch.stack([c.diagonal() for c in covariance]))
    return scaled.softmax(1) if kind == "classification" else scaled.sigmoid()


def close(ours, theirs, rtol=1e-8, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# -- numbers


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reference_problem(structure):
    """Given to ten digits and more; but where the evidence is flat, its maximiser is known to half as many."""
    name = {"blockdiag": "block_diagonal", "lowrank": "full"}.get(structure, structure)
    la = Laplace(ref.model(), "classification", subset_of_weights="all", hessian_structure=structure)
    la.fit(DataLoader(TensorDataset(ref.inputs(), ref.labels()), batch_size=4))
    assert float(la.log_det_posterior_precision) == pytest.approx(ref.LOG_DET_PRECISION[name], abs=1e-11)
    assert float(la.log_marginal_likelihood(1.0)) == pytest.approx(ref.LOG_EVIDENCE[name], abs=1e-11)
    variance = la.function_distribution(ref.inputs()[:1]).variance[0]
    assert variance.tolist() == pytest.approx(ref.PREDICTIVE_VARIANCE[name], abs=1e-8)
    found = la.optimize_prior_precision()
    assert float(la.prior_precision) == pytest.approx(ref.BEST_PRIOR_PRECISION[name], rel=1e-6)
    assert found.log_evidence == pytest.approx(ref.BEST_LOG_EVIDENCE[name], abs=1e-9)
    assert float(la.log_marginal_likelihood()) == pytest.approx(ref.BEST_LOG_EVIDENCE[name], abs=1e-9)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(3), ids=["all", "last_layer", "names"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_everything_against_the_dense_oracle(net, kind, number, structure):
    case, noise, subset = problem(kind, net), noise_of(kind), SUBSETS[net][number]
    names = NAMED[net] if number == 2 else case.subset(subset)
    prior_mean = torch.linspace(-1, 1, len(case.mean(names)))
    with untouched(case.model):
        la = laplace(kind, structure, net, subset, temperature=TEMPERATURE, prior_mean=prior_mean)
        f = la.function_distribution(case.new_x)
        answer = la(case.new_x)
    P = case.precision(structure, DELTA, noise, TEMPERATURE, names)
    mean, covariance = case.model(case.new_x).detach(), case.function_covariance(P, names)
    assert la.n_params == len(P)
    close(la.mean, case.mean(names))
    close(la.posterior_precision.to_dense(), P, atol=1e-10)
    close(f.covariance, covariance, atol=1e-10)
    if kind == "regression":
        close(answer[0], mean)
        close(answer[1], covariance, atol=1e-10)
    else:
        close(answer, probit(kind, mean, covariance))
    prior = case.prior_diagonal(DELTA, names)
    close(la.log_likelihood, case.log_likelihood(noise) / TEMPERATURE)
    close(la.scatter, (prior * (case.mean(names) - prior_mean) ** 2).sum())
    close(la.log_det_posterior_precision, torch.logdet(P))
    close(la.log_det_prior_precision, prior.log().sum())
    close(la.log_det_ratio, torch.logdet(P) - prior.log().sum())
    evidence = case.log_evidence(structure, DELTA, noise, TEMPERATURE, names, prior_mean)
    close(la.log_marginal_likelihood(), evidence)


# -- which weights


class Functional(nn.Module):
    """The last layer is no module: parameters in a function, and something after it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Parameter(torch.randn(3, 4))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(self.body(x).tanh(), self.head, self.shift) / 2


class HeadFirst(nn.Module):
    """The head is registered before the body, and its output is reshaped."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.body(x).tanh()[:, None])[:, 0].contiguous()


LAST_LAYERS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), {"2.weight", "2.bias"}),
    "identity and dropout after it": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Identity(), nn.Dropout(0.5)),
        {"1.weight", "1.bias"},
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.Flatten()),
        {"2.weight"},
    ),
    "nested": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 3)))),
        {"1.1.0.weight", "1.1.0.bias"},
    ),
    "functional": (Functional, {"head", "shift"}),
    "head first": (HeadFirst, {"head.weight", "head.bias"}),
    "one layer": (lambda: nn.Linear(3, 3), {"weight", "bias"}),
}


@pytest.mark.parametrize(("build", "head"), LAST_LAYERS.values(), ids=LAST_LAYERS.keys())
def test_the_last_layer_finds_itself(build, head):
    case, model = problem("classification"), build()
    with untouched(model):
        la = Laplace(model, "classification", hessian_structure="full", prior_precision=DELTA).fit(case.data)
    assert set(la.fitted.parameters.names) == head
    model.eval()
    chosen = {n: p.detach() for n, p in model.named_parameters() if n in head}
    H = 0
    for x in case.x:
        blocks = torch.func.jacrev(lambda c, x=x: functional_call(model, c, (x[None],))[0])(chosen)
        J, p = torch.cat([b.flatten(1) for b in blocks.values()], 1), model(x[None])[0].detach().softmax(0)
        H = H + J.T @ (p.diag() - torch.outer(p, p)) @ J
    close(la.posterior_precision.to_dense(), H + DELTA * torch.eye(len(H)), atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_parameters_have_no_part(structure):
    case, model = problem("classification"), problem("classification").fresh
    frozen = ("0.weight", "2.bias")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    names = [n for n in case.all if n not in frozen]
    with untouched(model):
        la = laplace("classification", structure, model=model)
        covariance = la.function_distribution(case.new_x).covariance
    assert la.fitted.parameters.names == tuple(names)
    P = case.precision(structure, DELTA, names=names)
    close(la.posterior_precision.to_dense(), P, atol=1e-10)
    close(covariance, case.function_covariance(P, names), atol=1e-10)


def test_what_is_frozen_when_the_data_come_counts():
    model = problem("classification").fresh
    la = Laplace(model, "classification", "all", "diag")
    model[0].requires_grad_(False)
    assert la.fit(problem("classification").data).fitted.parameters.names[0] == "2.weight"


def test_a_layer_replaced_before_the_fit_is_the_one_that_is_fitted():
    case, model = problem("classification"), problem("classification").fresh
    la = Laplace(model, "classification", ["4"], "full", prior_precision=DELTA)
    model[4] = copy.deepcopy(model[4])
    la.fit(case.data)
    close(la.posterior_precision.to_dense(), case.precision("full", DELTA, names=case.head), atol=1e-10)
    assert la.fitted.parameters.tensors[0] is model[4].weight


def test_names_may_come_from_a_generator():
    la = laplace("classification", subset=(name for name in ("4.bias", "0")))
    assert la.fitted.parameters.names == ("0.weight", "0.bias", "4.bias")
    assert la.fit(problem("classification").data).n_params == 23


# -- which curvature


@pytest.mark.parametrize("structure", ["diag", "full", "blockdiag"])
@pytest.mark.parametrize("kind", KINDS)
def test_empirical_fisher_is_the_sum_of_outer_products_of_log_likelihood_gradients(kind, structure):
    """With noise and temperature in the likelihood, whose gradients carry 1 / noise^2 and 1 / T once each."""
    case, noise = problem(kind), noise_of(kind)
    la = laplace(kind, structure, curvature="ef", temperature=TEMPERATURE)

    def log_likelihood(parameters, x, y):
        f = functional_call(case.model, parameters, (x[None],))[0]
        if kind == "classification":
            return f.log_softmax(0)[y] / TEMPERATURE
        if kind == "binary":
            return (y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)).sum() / TEMPERATURE
        return -((y - f) ** 2).sum() / (2 * noise**2) / TEMPERATURE

    parameters = {n: p.detach() for n, p in case.model.named_parameters()}
    gradients = [torch.func.grad(log_likelihood)(parameters, x, y) for x, y in zip(case.x, case.y, strict=True)]
    rows = torch.stack([torch.cat([part.flatten() for part in g.values()]) for g in gradients])
    wanted = case.keep(structure, rows.T @ rows) + DELTA * torch.eye(rows.shape[1])
    close(la.posterior_precision.to_dense(), wanted, atol=1e-10)


def outcomes(kind):
    """Every target of each example: gradients of the loss (K, N, C) there and probabilities (K, N)."""
    f = problem(kind).f
    if kind == "classification":
        p = f.softmax(1)
        return torch.stack([p - label for label in torch.eye(3)]), p.T
    p = f.sigmoid()
    answers = [torch.tensor(a) for a in itertools.product([0.0, 1.0], repeat=2)]
    return torch.stack([p - a for a in answers]), torch.stack([(a * p + (1 - a) * (1 - p)).prod(1) for a in answers])


@pytest.mark.parametrize("kind", KINDS)
def test_monte_carlo_curvature_is_unbiased(kind):
    """The deviation of M draws is known: by enumeration for classes, from the moments of a normal for regression."""
    case, M = problem(kind), 4000
    columns = curvature.MonteCarloGGN(samples=M)
    la = laplace(kind, "diag", curvature=columns, data=[(case.x, case.y)])
    ours = (la.posterior_precision.diagonal() - DELTA) * noise_of(kind) ** 2
    exact = case.curvature("diag").diagonal()
    if kind == "regression":
        variance = 2 * case.jacobian.square().sum(1).square().sum(0)
    else:
        gradients, p = outcomes(kind)
        squares = torch.einsum("knc,ncp->knp", gradients, case.jacobian).square()
        mean = torch.einsum("kn,knp->np", p, squares)
        variance = (torch.einsum("kn,knp->np", p, squares**2) - mean**2).sum(0)
    deviation = (variance / M).sqrt()
    assert ((ours - exact).abs() < 5 * deviation).all()
    assert (deviation < 0.1 * exact).all()  # else the bound would say nothing


def test_one_monte_carlo_column_is_the_gradient_at_one_drawn_label():
    """One example: the curvature is one of three outer products, as often as the model's probabilities say."""
    case, draws = problem("classification"), 300
    gradients, p = outcomes("classification")
    possible = torch.stack([torch.outer(v, v) for v in gradients[:, 0] @ case.jacobian[0]])
    generator, counts = torch.Generator().manual_seed(0), [0, 0, 0]
    la = Laplace(case.model, "classification", "all", "full", curvature="mc")
    for _ in range(draws):
        H = la.fit([(case.x[:1], case.y[:1])], generator=generator).fitted.curvature.to_dense()
        distances = (possible - H).abs().amax((1, 2))
        counts[int(distances.argmin())] += 1
        assert distances.min() < 1e-10
    assert chisquare(counts, (draws * p[:, 0]).tolist()).pvalue > IMPROBABLE


# -- the data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_fit_does_not_depend_on_batches_or_their_order(kind, structure):
    case = problem(kind)
    one = laplace(kind, structure, data=[(case.x, case.y)])
    shuffled = [(case.x[i], case.y[i]) for i in torch.randperm(len(case.x)).split(4)]
    one_by_one = list(zip(case.x.split(1), case.y.split(1), strict=True))
    for data in (shuffled, one_by_one):
        other = laplace(kind, structure, data=data)
        close(other.posterior_precision.to_dense(), one.posterior_precision.to_dense(), rtol=1e-10, atol=1e-12)
        close(other.log_marginal_likelihood(), one.log_marginal_likelihood(), rtol=1e-12)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("loader", ["generator", "DataLoader", "DataLoader without a length"])
def test_any_iterable_is_a_loader(subset, loader):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(case.x, case.y, strict=True))

    case = problem("classification")
    data = {
        "generator": (batch for batch in case.data),
        "DataLoader": DataLoader(TensorDataset(case.x, case.y), batch_size=4, shuffle=True),
        "DataLoader without a length": DataLoader(Stream(), batch_size=4),
    }[loader]
    la = laplace("classification", "full", subset=subset, data=data)
    assert la.fitted.count == len(case.x)
    wanted = case.precision("full", DELTA, names=case.subset(subset))
    close(la.posterior_precision.to_dense(), wanted, atol=1e-10)


class Unpacking(nn.Module):
    def __init__(self, net, unpack):
        super().__init__()
        self.net, self.unpack = net, unpack

    def forward(self, batch):
        return self.net(self.unpack(batch))


PACKINGS = {
    "dict": (
        lambda x: {"left": x[:, :1], "right": x[:, 1:]},
        lambda batch: torch.cat([batch["left"], batch["right"]], 1),
    ),
    "tuple": (lambda x: (x[:, :1], x[:, 1:]), lambda batch: torch.cat(batch, 1)),
    "nested": (lambda x: [x[:, :2], {"rest": x[:, 2:]}], lambda batch: torch.cat([batch[0], batch[1]["rest"]], 1)),
}


@pytest.mark.parametrize(("pack", "unpack"), PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_model_gets_what_the_loader_yields(pack, unpack, subset):
    case = problem("classification")
    model = Unpacking(case.fresh, unpack)
    la = laplace("classification", model=model, subset=subset, data=[(pack(x), y) for x, y in case.data])
    names = case.subset(subset)
    P = case.precision("kron", DELTA, names=names)
    close(la.posterior_precision.to_dense(), P, atol=1e-10)
    wanted = probit("classification", case.model(case.new_x).detach(), case.function_covariance(P, names))
    close(la(pack(case.new_x)), wanted)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_small_memory_budget_changes_nothing(structure):
    case = problem("classification", "cnn")
    la = laplace("classification", structure, "cnn", memory_budget=3000)
    P = case.precision(structure, DELTA)
    close(la.posterior_precision.to_dense(), P, atol=1e-10)
    close(la.function_distribution(case.new_x).covariance, case.function_covariance(P), atol=1e-10)


# -- asking, setting, fitting again


def everything(la, x):
    answer = la(x)
    return [
        *(answer if isinstance(answer, tuple) else [answer]),
        *(la.log_marginal_likelihood(), la.log_likelihood, la.scatter, la.log_det_ratio),
        *(la.prior_precision, la.sigma_noise, la.mean, la.posterior.variance),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_asking_does_not_set(kind):
    case = problem(kind)
    la = laplace(kind, prior_mean=0.3)
    before = everything(la, case.new_x)
    close(la.log_marginal_likelihood(123.0), case.log_evidence("kron", 123.0, noise_of(kind), prior_mean=0.3))
    if kind == "regression":
        close(la.log_marginal_likelihood(sigma_noise=0.1), case.log_evidence("kron", DELTA, 0.1, prior_mean=0.3))
        close(la.log_marginal_likelihood(2.0, 0.1), case.log_evidence("kron", 2.0, 0.1, prior_mean=0.3))
        la(case.new_x, joint=True)
        la(case.new_x, diagonal_output=True)
    la(case.new_x, link_approx="mc", n_samples=3)
    la.predictive_distribution(case.new_x)
    la.functional_samples(case.new_x, 2)
    la.predictive_samples(case.new_x, 2)
    la.sample(2)
    for old, new in zip(before, everything(la, case.new_x), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_set_shows_everywhere(structure):
    """Prior, noise and temperature, one after the other, each after a posterior has been asked for and kept."""
    case = problem("regression")
    la = laplace("regression", structure, prior_mean=0.3)
    delta = torch.linspace(0.3, 3.0, len(case.all))
    la(case.new_x)
    for name, value, state in [
        ("prior_precision", delta, (delta, NOISE, 1.0)),
        ("sigma_noise", 0.3, (delta, 0.3, 1.0)),
        ("temperature", 0.5, (delta, 0.3, 0.5)),
        ("prior_precision", 2.0, (2.0, 0.3, 0.5)),
    ]:
        setattr(la, name, value)
        P = case.precision(structure, *state)
        close(la.posterior_precision.to_dense(), P, atol=1e-10)
        close(la(case.new_x)[1], case.function_covariance(P), atol=1e-10)
        close(la.log_marginal_likelihood(), case.log_evidence(structure, *state, prior_mean=0.3))
    assert float(la.prior_precision) == 2.0
    assert float(la.sigma_noise) == pytest.approx(0.3, rel=1e-12)


def test_what_cannot_be_set_is_refused_and_nothing_changes():
    case = problem("regression")
    la = laplace("regression")
    before = everything(la, case.new_x)
    with pytest.raises(ValueError, match="positive and finite"):
        la.prior_precision = -1.0
    with pytest.raises(ValueError, match="Expected 1 prior precision"):
        la.prior_precision = torch.ones(5)
    with pytest.raises(ValueError, match="one positive number"):
        la.sigma_noise = 0.0
    for old, new in zip(before, everything(la, case.new_x), strict=True):
        assert torch.equal(old, new)


def test_fitting_again_replaces():
    case = problem("classification")
    la = laplace("classification", "full")
    la.fit([(case.x[:5], case.y[:5])]).fit(case.data)
    assert la.fitted.count == len(case.x)
    close(la.posterior_precision.to_dense(), case.precision("full", DELTA), atol=1e-10)


def test_a_fit_that_fails_leaves_the_one_before():
    case = problem("classification")
    la = laplace("classification", "full")
    with pytest.raises(ValueError, match="labels must lie"):
        la.fit([(case.x, case.y + 1)])
    close(la.posterior_precision.to_dense(), case.precision("full", DELTA), atol=1e-10)
    assert la(case.new_x).shape == (4, 3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("layer", [0, 4], ids=["first layer", "last layer"])
def test_weights_that_changed_since_the_fit_are_noticed(subset, layer):
    """The body too: a last-layer posterior belongs to the features it was fitted on."""
    case, model = problem("classification"), problem("classification").fresh
    la = laplace("classification", subset=subset, model=model)
    la(case.new_x)
    with torch.no_grad():
        model[layer].weight[0, 0] += 1e-6
    for ask in (la, la.function_distribution, la.predictive_distribution, la.functional_samples):
        with pytest.raises(RuntimeError, match=r"not those that were fitted.* Call fit again"):
            ask(case.new_x)
    assert la.fit(case.data)(case.new_x).shape == (4, 3)


def test_weights_that_have_changed_places_are_noticed():
    case, model = problem("classification"), problem("classification").fresh
    la = laplace("classification", model=model)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))
    with pytest.raises(RuntimeError, match="Call fit again"):
        la(case.new_x)


def test_a_layer_replaced_after_the_fit_is_noticed():
    case, model = problem("classification"), problem("classification").fresh
    la = laplace("classification", model=model)
    model[4] = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="Call fit again"):
        la(case.new_x)


# -- predictions


@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_covariance_of_a_regression(structure):
    case = problem("regression")
    mean, covariance = laplace("regression", structure)(case.new_x, joint=True)
    J = case.new_jacobian.flatten(0, 1)  # inputs first, then outputs
    close(mean, case.model(case.new_x).detach().flatten())
    close(covariance, J @ torch.linalg.solve(case.precision(structure, DELTA, NOISE), J.T), atol=1e-10)


def test_diagonal_output_is_the_diagonal():
    case = problem("regression")
    mean, variance = laplace("regression")(case.new_x, diagonal_output=True)
    close(mean, case.model(case.new_x).detach())
    covariance = case.function_covariance(case.precision("kron", DELTA, NOISE))
    close(variance, covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
def test_predictive_distributions(kind):
    """Types, and the moments of each: observation noise once, for regression only."""
    case = problem(kind)
    predicted = laplace(kind).predictive_distribution(case.new_x)
    mean = case.model(case.new_x).detach()
    covariance = case.function_covariance(case.precision("kron", DELTA, noise_of(kind)))
    if kind == "regression":
        assert type(predicted) is MultivariateNormal
        close(predicted.mean, mean)
        close(predicted.covariance_matrix, covariance + NOISE**2 * torch.eye(2), atol=1e-10)
    elif kind == "classification":
        assert type(predicted) is Categorical
        close(predicted.probs, probit(kind, mean, covariance))
    else:
        p = probit(kind, mean, covariance)
        assert (type(predicted), type(predicted.base_dist)) == (Independent, Bernoulli)
        assert predicted.event_shape == (2,)
        close(predicted.mean, p)
        close(predicted.variance, p * (1 - p))


def test_probabilities_are_probabilities():
    case = problem("classification")
    la = laplace("classification")
    for p in (la(case.new_x), la(case.new_x, link_approx="mc", n_samples=7)):
        assert (p > 0).all()
        close(p.sum(1), torch.ones(4))


def is_standard_normal(white):
    """Mean and covariance of draws (S, D): sums of squares of (nearly) standard normal entries are chi-squared."""
    S, D = white.shape
    error = S**0.5 * (white.T @ white / S - torch.eye(D))
    squares = error.triu(1).square().sum() + error.diagonal().square().sum() / 2
    good_mean = S * white.mean(0).square().sum() < chi2.isf(IMPROBABLE, D)
    return bool(good_mean and squares < chi2.isf(IMPROBABLE, D * (D + 1) / 2))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_outputs_have_the_posterior_mean_and_covariance(kind):
    """Whitened by the dense oracle they are standard normal; `predictive_samples` and "mc" are made of the same."""
    case, S = problem(kind), 10_000
    la = laplace(kind)
    covariance = case.function_covariance(case.precision("kron", DELTA, noise_of(kind)))
    f = la.functional_samples(case.new_x, S, torch.Generator().manual_seed(1))
    deviation = f - case.model(case.new_x).detach()
    for n, root in enumerate(torch.linalg.cholesky(covariance)):
        assert is_standard_normal(torch.linalg.solve_triangular(root, deviation[:, n].T, upper=False).T)
    link = {"classification": lambda z: z.softmax(-1), "regression": lambda z: z, "binary": torch.sigmoid}[kind]
    images = la.predictive_samples(case.new_x, S, torch.Generator().manual_seed(1))
    close(images, link(f))
    if kind != "regression":
        p = la(case.new_x, link_approx="mc", n_samples=S, generator=torch.Generator().manual_seed(1))
        close(p, images.mean(0))


def test_samples_of_weights_come_from_the_posterior():
    case = problem("regression")
    draws = laplace("regression").sample(10_000, torch.Generator().manual_seed(1))
    root = torch.linalg.cholesky(case.precision("kron", DELTA, NOISE))
    assert is_standard_normal((draws - case.mean()) @ root)


DRAWS = {
    "mc link": lambda la, x, g: la(x, link_approx="mc", n_samples=5, generator=g),
    "sample": lambda la, x, g: la.sample(5, generator=g),
    "functional_samples": lambda la, x, g: la.functional_samples(x, 5, generator=g),
    "predictive_samples": lambda la, x, g: la.predictive_samples(x, 5, generator=g),
    "mc curvature": lambda la, x, g: (
        Laplace(la.model, "classification", "all", curvature="mc")
        .fit(problem("classification").data, generator=g)
        .log_marginal_likelihood()
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_the_generator_is_the_only_randomness(draw):
    la, x = laplace("classification"), problem("classification").new_x
    first = draw(la, x, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, draw(la, x, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, draw(la, x, torch.Generator().manual_seed(2)))


def test_predictions_are_differentiable_in_the_prior_precision():
    case = problem("classification")
    delta = torch.tensor(DELTA, requires_grad=True)
    p = laplace("classification", "full", prior_precision=delta)(case.new_x)
    (gradient,) = torch.autograd.grad(p[0, 0], delta)

    def oracle(value):
        covariance = case.function_covariance(case.precision("full", value))
        return probit("classification", case.model(case.new_x).detach(), covariance)[0, 0]

    # Central differences: 1e-6, not 1e-8.
    assert float(gradient) == pytest.approx(float(oracle(DELTA + 1e-5) - oracle(DELTA - 1e-5)) / 2e-5, rel=1e-6)


def test_answers_carry_no_graph_and_are_found_without_one():
    case = problem("classification")
    la = laplace("classification")
    plain = la(case.new_x)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(la(case.new_x), plain)
        assert torch.equal(laplace("classification")(case.new_x), plain)
    with torch.inference_mode():
        assert torch.equal(la(case.new_x.clone()), plain)
        made_here = [(x.clone(), y.clone()) for x, y in case.data]
        assert torch.equal(laplace("classification", data=made_here)(case.new_x), plain)


# -- types


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_is_near_float64(kind, structure):
    """Of seven digits, sums, a factorisation and its inverse cost some three: 1e-3 of the largest entry."""
    case, noise = problem(kind), noise_of(kind)
    data = [(x.float(), y if kind == "classification" else y.float()) for x, y in case.data]
    torch.set_default_dtype(torch.float32)
    la = laplace(kind, structure, model=case.fresh.float(), data=data)
    f = la.function_distribution(case.new_x.float())
    answers = [f.mean, f.covariance, la.log_marginal_likelihood(), la.posterior.variance, la.sample(2), la.mean]
    assert {a.dtype for a in answers} == {torch.float32}
    covariance = case.function_covariance(case.precision(structure, DELTA, noise))
    close(f.covariance.double(), covariance, atol=1e-3 * float(covariance.abs().max()), rtol=0)
    close(la.log_marginal_likelihood().double(), case.log_evidence(structure, DELTA, noise), rtol=1e-5)
    found = la.optimize_prior_precision(prior_structure="layerwise")
    assert la.prior_precision.dtype == torch.float32
    best = case.log_evidence(structure, la.prior_precision.double(), noise)
    assert found.log_evidence == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_low_precision_is_for_the_network_only(dtype, structure):
    """What is made of its Jacobians is float32, and as near to float64 at the same weights as two digits allow."""
    case = problem("regression")
    model = case.fresh.to(dtype)
    exact = Laplace(copy.deepcopy(model).double(), "regression", "all", structure, sigma_noise=NOISE).fit(case.data)
    data = [(x.to(dtype), y.to(dtype)) for x, y in case.data]
    torch.set_default_dtype(torch.float32)
    la = Laplace(model, "regression", "all", structure, sigma_noise=NOISE).fit(data)
    x = case.new_x.to(dtype)
    assert torch.equal(la.mean.double(), exact.mean)
    f, wanted = la.function_distribution(x), exact.function_distribution(case.new_x)
    close(f.covariance.double(), wanted.covariance, atol=0.1 * float(wanted.covariance.abs().max()), rtol=0)
    close(la.log_marginal_likelihood().double(), exact.log_marginal_likelihood(), rtol=0.02)
    answers = [*la(x), *la(x, joint=True), la.sample(2), la.functional_samples(x, 2), la.predictive_samples(x, 2)]
    answers += [la.predictive_distribution(x).mean, la.posterior.log_prob(la.mean), la.posterior.variance]
    la.optimize_prior_precision(prior_structure="layerwise")
    answers += [la.prior_precision, la.log_marginal_likelihood()]
    assert {a.dtype for a in answers} == {torch.float32}
    assert all(torch.isfinite(a).all() for a in answers)


def test_a_float64_model_under_the_float32_default():
    case = problem("regression")
    wanted = case.log_evidence("full", DELTA, NOISE, TEMPERATURE)
    torch.set_default_dtype(torch.float32)
    la = laplace("regression", "full", temperature=TEMPERATURE)
    close(la.log_marginal_likelihood(), wanted, rtol=1e-12)
    assert la(case.new_x)[1].dtype == torch.float64


def test_likelihoods_and_columns_may_be_objects():
    case = problem("regression")
    likelihood, columns = curvature.Gaussian(NOISE), curvature.EmpiricalFisher()
    la = Laplace(case.model, likelihood, "all", "full", prior_precision=DELTA, curvature=columns).fit(case.data)
    named = laplace("regression", "full", curvature="ef")
    assert torch.equal(la.posterior_precision.to_dense(), named.posterior_precision.to_dense())


# -- the model is borrowed


class Fragile(nn.Module):
    """Dropout, batch norm and a frozen layer, in a mixture of modes, with a gradient, a hook and a trap."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.4)
        self.frozen = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)
        self.frozen.requires_grad_(False)
        self.head.weight.grad = torch.randn(3, 5)
        self.one.register_forward_hook(lambda *_: None)
        self.train()
        self.frozen.eval()

    def forward(self, x):
        if (x > 50).any():
            raise ArithmeticError("a trap")
        return self.head(self.drop(self.frozen(self.norm(self.one(x)).tanh())))


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_in_train_mode_comes_back_bitwise(subset, structure):
    """And its answers are those of eval mode: no dropout, no batch statistics."""
    case, model = problem("classification"), Fragile()
    with untouched(model):
        la = Laplace(model, "classification", subset, structure, prior_precision=DELTA).fit(case.data)
        first = la(case.new_x)
        la.optimize_prior_precision()
        la.prior_precision = DELTA
        la.predictive_samples(case.new_x)
        f = la.function_distribution(case.new_x)
        assert torch.equal(la(case.new_x), first)
    evaluated = copy.deepcopy(model).eval()
    close(f.mean, evaluated(case.new_x).detach())
    other = Laplace(evaluated, "classification", subset, structure, prior_precision=DELTA).fit(case.data)
    assert torch.equal(other(case.new_x), first)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_an_exception_in_the_model_leaves_it_alone(subset):
    case, model = problem("classification"), Fragile()
    bad = case.new_x.clone()
    bad[0, 0] = 99.0
    la = Laplace(model, "classification", subset)
    with untouched(model), pytest.raises(ArithmeticError, match="a trap"):
        la.fit([case.data[0], (bad, case.y[:4])])
    with pytest.raises(RuntimeError, match="has not been fitted"):
        la(case.new_x)
    la.fit(case.data)
    with untouched(model), pytest.raises(ArithmeticError, match="a trap"):
        la(bad)


def test_a_loader_that_fails_leaves_the_model_alone():
    case, model = problem("classification"), Fragile()

    def loader():
        yield case.data[0]
        raise OSError("the disk is gone")

    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        Laplace(model, "classification", "all").fit(loader())


def test_a_free_prior_on_kronecker_blocks_does_not_depend_on_the_order_of_the_data():
    # Five examples leave the factor of ten inputs with equal eigenvalues (zero), whose eigenvectors are arbitrary.
    model = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 10), torch.arange(5) % 3
    prior = torch.rand(sum(p.numel() for p in model.parameters())) * 10 + 0.1
    one, other = (
        Laplace(model, "classification", "all", "kron", prior_precision=prior).fit([(x[order], y[order])])
        for order in ([0, 1, 2, 3, 4], [2, 0, 1, 4, 3])
    )
    torch.testing.assert_close(one.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-10, atol=0)
    torch.testing.assert_close(one.posterior.variance, other.posterior.variance, rtol=1e-8, atol=0)
