"""Predictions by samples of the weights: the network's own outputs there, on any model, which is left alone."""

import copy

import pytest
import torch
from dense_laplace import KINDS, STRUCTURES, problem, untouched
from torch import nn
from torch.distributions import Categorical, MultivariateNormal

from lapkit import Laplace
from lapkit.curvature import Engine, HeteroscedasticGaussian, Parameters, PerOutputGaussian, Poisson, borrowed
from lapkit.posteriors import network_outputs, weight_samples


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def outputs_at(model, names, rows, x):
    """One forward pass of a copy for each row of weights, (S, N, C)."""
    model, found = copy.deepcopy(model).eval(), []
    for row in rows:
        chosen = [p for n, p in model.named_parameters() if n in names]
        torch.nn.utils.vector_to_parameters(row, chosen)
        found.append(model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x))
    return torch.stack(found).detach()


def fitted(kind, structure="kron", subset="all", **options):
    case = problem(kind)
    return case, Laplace(case.model, kind, subset, structure, **options).fit(case.data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_moments_are_those_of_the_outputs_at_the_posterior_samples(kind, structure, subset):
    case, la = fitted(kind, structure, subset)
    with untouched(case.model):
        answer = la(case.new_x, pred_type="nn", n_samples=7, generator=seeded())
    f = outputs_at(case.model, la.fitted.parameters.names, la.sample(7, seeded()), case.new_x)
    if kind == "regression":
        torch.testing.assert_close(answer[0], f.mean(0))
        torch.testing.assert_close(answer[1], f.var(0))
    else:
        p = f.softmax(-1) if kind == "classification" else f.sigmoid()
        torch.testing.assert_close(answer, p.mean(0))
    drawn = la.functional_samples(case.new_x, 7, seeded(), pred_type="nn")
    torch.testing.assert_close(drawn, f)
    mean_of_y = la.predictive_samples(case.new_x, 7, seeded(), pred_type="nn")
    torch.testing.assert_close(mean_of_y, la.likelihood.inverse_link(f))


def test_many_weights_are_drawn_some_samples_at_a_time(monkeypatch):
    case, la = fitted("regression")
    monkeypatch.setattr(weight_samples, "PIECE", 2 * la.n_params + 1)
    f = la.functional_samples(case.new_x, 5, seeded(), pred_type="nn")
    generator = seeded()
    rows = torch.cat([la.sample(n, generator) for n in (2, 2, 1)])
    torch.testing.assert_close(f, outputs_at(case.model, case.all, rows, case.new_x))


def test_a_sharp_posterior_gives_the_linearised_moments():
    """Where the posterior is narrow the network is linear in it."""
    case, la = fitted("regression", "full", prior_precision=1e6)
    mean, variance = la(case.new_x, pred_type="nn", n_samples=4000, generator=seeded())
    f = la.function_distribution(case.new_x)
    torch.testing.assert_close(mean, f.mean, atol=5 * float(f.variance.max() / 4000) ** 0.5, rtol=0)
    torch.testing.assert_close(variance, f.variance, rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_the_predictive_distribution_adds_the_noise_to_the_samples_covariance():
    case, la = fitted("regression", sigma_noise=0.3)
    f = outputs_at(case.model, case.all, la.sample(6, seeded()), case.new_x)
    found = la.predictive_distribution(case.new_x, n_samples=6, generator=seeded(), pred_type="nn")
    assert isinstance(found, MultivariateNormal)
    torch.testing.assert_close(found.mean, f.mean(0))
    for n, covariance in enumerate(found.covariance_matrix):
        torch.testing.assert_close(covariance, f[:, n].T.cov() + 0.09 * torch.eye(2))


def test_the_predictive_distribution_of_classes_has_the_mean_probabilities():
    case, la = fitted("classification")
    found = la.predictive_distribution(case.new_x, n_samples=6, generator=seeded(), pred_type="nn")
    assert isinstance(found, Categorical)
    torch.testing.assert_close(found.probs, la(case.new_x, "nn", n_samples=6, generator=seeded()))


# -- likelihoods whose mean of y is not all of the outputs


def test_other_likelihoods():
    case = problem("regression")
    la = Laplace(case.model, HeteroscedasticGaussian(), "all", "diag").fit([(case.x, case.y[:, :1])])
    f = outputs_at(case.model, case.all, la.sample(6, seeded()), case.new_x)
    mean, variance = la(case.new_x, "nn", n_samples=6, generator=seeded())
    torch.testing.assert_close(mean, f[..., :1].mean(0))
    torch.testing.assert_close(variance, f[..., :1].var(0))
    la = Laplace(case.model, Poisson(), "all", "diag").fit([(case.x, torch.ones(13, 2))])
    f = outputs_at(case.model, case.all, la.sample(6, seeded()), case.new_x)
    torch.testing.assert_close(la(case.new_x, "nn", n_samples=6, generator=seeded()), f.exp().mean(0))


# -- models


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, left, right):
        return self.one(left).tanh() * self.two(right)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())


N = 6
MODELS = {
    "a mapping": (Two, {"left": (N, 3), "right": (N, 4)}),
    "a tuple": (Two, ((N, 3), (N, 4))),
    "batch normalisation": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (N, 3)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), (N, 3)),
    "recurrent": (Recurrent, (N, 5, 3)),
    "tied": (Tied, (N, 3)),
}


def inputs(shape):
    if isinstance(shape, dict):
        return {key: inputs(s) for key, s in shape.items()}
    return tuple(map(inputs, shape)) if isinstance(shape[0], tuple) else torch.randn(shape)


@pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS.keys())
def test_any_model_in_any_mode_is_left_alone(build, shape):
    model, x, y = build().train(), inputs(shape), torch.randn(N, 2)
    before = copy.deepcopy(model.state_dict())
    la = Laplace(model, "regression", "all", "diag").fit([(x, y)])
    with untouched(model):
        mean, variance = la(x, "nn", n_samples=5, generator=seeded())
    f = outputs_at(model, la.fitted.parameters.names, la.sample(5, seeded()), x)
    torch.testing.assert_close(mean, f.mean(0))
    torch.testing.assert_close(variance, f.var(0))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    present = outputs_at(model, la.fitted.parameters.names, la.mean[None], x)[0]
    torch.testing.assert_close(la.function_distribution(x).mean, present)


def test_positions_have_moments_each():
    model, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    la = Laplace(model, "regression", "all", "full").fit([(x, torch.randn(4, 5, 2))])
    mean, variance = la(x, "nn", n_samples=5, generator=seeded())
    f = outputs_at(model, ["weight", "bias"], la.sample(5, seeded()), x)
    torch.testing.assert_close(mean, f.mean(0))
    torch.testing.assert_close(variance, f.var(0))


class Ends(nn.Module):
    """A body and a last layer, and something that keeps the one from being run without the other."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0
        self.body, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        self.calls += 1
        x = self.body(x).tanh()
        if self.how == "used before":
            x = x @ self.last.weight
        if self.how == "called twice":
            x = self.last(x)
        if self.how == "by keyword":
            return self.last(input=x)
        f = self.last(x)
        if self.how == "input changed":
            x.zero_()
        return f + 1 if self.how == "changed after" else f


@pytest.mark.parametrize(
    ("how", "passes"),
    [
        ("nothing", 2),
        ("used before", 6),
        ("called twice", 6),
        ("by keyword", 6),
        ("changed after", 6),
        ("input changed", 6),
    ],
)
def test_the_body_runs_once_only_where_the_last_layer_ends_the_network(how, passes):
    model, x = Ends(how).double(), torch.randn(4, 3, dtype=torch.float64)
    weights = torch.randn(5, 6, dtype=torch.float64)
    parameters = Parameters.of(model, ["last"])
    engine = Engine(model, parameters)
    expected = outputs_at(model, ["last.weight", "last.bias"], weights, x)
    model.calls = 0
    with borrowed(model, parameters), torch.no_grad():
        found = torch.stack(list(network_outputs(engine, x, weights)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert model.calls == passes


@pytest.mark.parametrize("names", [["2.weight", "2.bias"], ["2.weight"], ["2.bias"]])
@pytest.mark.parametrize(("axes", "bias"), [((4,), True), ((4, 5), True), ((4, 2, 3), True), ((4,), False)])
@pytest.mark.parametrize("room", [1, 50, 2**22])
def test_draws_of_a_linear_last_layer_are_products_of_some_together(names, axes, bias, room, monkeypatch):
    if not bias and "2.bias" in names:
        names = ["2.weight"]
    monkeypatch.setattr(weight_samples, "OUTPUTS", room)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=bias)).double()
    x, parameters = torch.randn(*axes, 3, dtype=torch.float64), Parameters.of(model, names)
    weights = torch.randn(7, parameters.numel, dtype=torch.float64)
    expected = outputs_at(model, names, weights, x)
    axis = -1 if len(axes) == 3 else None
    with borrowed(model, parameters), torch.no_grad():
        found = torch.stack(list(network_outputs(Engine(model, parameters, output_axis=axis), x, weights)))
    torch.testing.assert_close(found, expected.flatten(2, -2) if len(axes) > 1 else expected, rtol=1e-12, atol=1e-12)


HOOKS = {
    "clamp": lambda layer: layer.register_forward_hook(lambda _, given, out: out.clamp(-4, 4)),
    "before": lambda layer: layer.register_forward_pre_hook(lambda _, given: (given[0].clamp(-4, 4),)),
    "own forward": lambda layer: setattr(layer, "forward", lambda x: nn.Linear.forward(layer, x).clamp(-4, 4)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_does_nothing_at_the_mode_counts_at_the_draws(hook):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    HOOKS[hook](model[2])
    weights, parameters = 3 * torch.randn(20, 10, dtype=torch.float64), Parameters.of(model, ["2"])
    with borrowed(model, parameters), torch.no_grad():
        found = torch.stack(list(network_outputs(Engine(model, parameters), x, weights)))
    features = model[1](model[0](x)).detach()
    W, b = weights[:, :8].reshape(20, 2, 4), weights[:, 8:]
    plain = torch.einsum("ni,soi->sno", features, W) + b[:, None]
    torch.testing.assert_close(found, plain if hook == "before" else plain.clamp(-4, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_of_a_last_layer_under_autocast(dtype):
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).float(),
        torch.randn(9, 3, dtype=torch.float32),
    )
    la = Laplace(model, "classification", "last_layer", "full").fit([(x, torch.arange(9) % 2)])
    plain = la(x, "nn", n_samples=5, generator=seeded())
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(la(x, "nn", n_samples=5, generator=seeded()), plain, rtol=0.05, atol=0.01)


def test_no_example_is_an_error_of_the_inputs():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    la = Laplace(model, "classification", "last_layer", "full").fit([(torch.randn(9, 3), torch.arange(9) % 2)])
    with pytest.raises(ValueError, match="at least one example"):
        la(torch.zeros(0, 3), "nn", n_samples=5)


def test_a_hook_of_a_linear_last_layer_is_called_at_every_draw():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(4, 3).double()
    model[2].register_forward_hook(lambda module, given, out: out.tanh())
    weights, parameters = torch.randn(5, 10, dtype=torch.float64), Parameters.of(model, ["2"])
    expected = outputs_at(model, parameters.names, weights, x)
    with borrowed(model, parameters), torch.no_grad():
        found = torch.stack(list(network_outputs(Engine(model, parameters), x, weights)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class After(nn.Module):
    """Does something to what the last layer returns, in place, or to what goes into it."""

    def __init__(self, act):
        super().__init__()
        self.body, self.last, self.act = nn.Linear(3, 2), nn.Linear(2, 3), act

    def forward(self, x):
        h = self.body(x).tanh()
        if self.act == "weight":
            h = h * self.last.weight.detach().norm()
        out = self.last(h)
        return {
            "mul": lambda: out.mul_(2),
            "mask": lambda: out.masked_fill_(x > 0, -3.0),
            "last example": lambda: out[3].mul_(2) is None or out,
            "clamp": lambda: out.clamp_(-0.1, 0.1),
            "relu": lambda: nn.functional.relu(out, inplace=True),
        }.get(self.act, lambda: out)()


@pytest.mark.parametrize("act", ["mul", "mask", "last example", "clamp", "relu", "weight", "pre-hook", "model hook"])
def test_what_else_happens_to_the_last_layer_happens_at_every_draw(act):
    model, x = After(act).double(), torch.randn(4, 3, dtype=torch.float64)
    if act == "pre-hook":
        model.last.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    if act == "model hook":
        model.register_forward_hook(lambda _, given, out: out.mul_(2))
    weights, parameters = torch.randn(5, 9, dtype=torch.float64), Parameters.of(model, ["last"])
    expected = outputs_at(model, parameters.names, weights, x)
    with borrowed(model, parameters), torch.no_grad():
        found = torch.stack(list(network_outputs(Engine(model, parameters), x, weights)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 10**6

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise ArithmeticError("stop")
        return self.linear(x).clone()  # so that the linear layer is not the whole network


def test_weights_come_back_when_the_model_fails():
    model, x = Fails(), torch.randn(4, 3)
    la = Laplace(model, "regression", "all", "diag").fit([(x, torch.randn(4, 2))])
    model.calls, before = 2, model.linear.weight.clone()
    with pytest.raises(ArithmeticError):
        la(x, "nn", generator=seeded())
    assert torch.equal(model.linear.weight, before)
    assert isinstance(model.linear.weight, nn.Parameter)


# -- refusals


def test_refusals():
    case, la = fitted("regression")
    with pytest.raises(ValueError, match="at least two"):
        la(case.new_x, "nn", n_samples=1)
    with pytest.raises(ValueError, match="at least one"):
        la.functional_samples(case.new_x, 0, pred_type="nn")
    with pytest.raises(ValueError, match="joint"):
        la(case.new_x, "nn", joint=True)
    with pytest.raises(ValueError, match="Unknown pred_type"):
        la.functional_samples(case.new_x, pred_type="gp")
    with pytest.raises(ValueError, match="vary together"):
        la.functional_samples(case.new_x, joint=True, diagonal_output=True)


# -- the linearised network, with independent outputs, and with noise by output


@pytest.mark.parametrize("link", ["probit", "mc", "mean_field"])
def test_independent_outputs_of_classes(link):
    case, la = fitted("classification", "full")
    f = la.function_distribution(case.new_x)
    p = la(case.new_x, link_approx=link, diagonal_output=True, n_samples=50, generator=seeded())
    draws = f.mean + f.variance.sqrt() * torch.randn(50, *f.mean.shape, generator=seeded())
    if link == "mc":
        torch.testing.assert_close(p, draws.softmax(-1).mean(0))
    else:
        assert torch.allclose(p, la(case.new_x, link_approx=link)) == (link == "probit")
    drawn = la.functional_samples(case.new_x, 50, seeded(), diagonal_output=True)
    torch.testing.assert_close(drawn, draws)


def test_whole_functions_of_class_probabilities():
    """Equal inputs have equal probabilities in each sample of a function, not in samples input by input."""
    case, la = fitted("classification")
    twice = case.new_x[:1].expand(2, -1)
    together = la.predictive_samples(twice, 20, seeded(), joint=True)
    torch.testing.assert_close(together[:, 0], together[:, 1])
    assert not torch.allclose(*la.predictive_samples(twice, 20, seeded()).unbind(1))


def test_noise_for_each_output():
    case, noise = problem("regression"), torch.tensor([0.3, 2.0])
    la = Laplace(case.model, PerOutputGaussian(noise, 1.5), "all", "full").fit(case.data)
    f = la.function_distribution(case.new_x)
    mean, covariance = la(case.new_x)
    torch.testing.assert_close((mean, covariance), (f.mean, f.covariance))
    torch.testing.assert_close(la(case.new_x, diagonal_output=True)[1], f.variance)
    y = la.predictive_distribution(case.new_x)
    torch.testing.assert_close(y.covariance_matrix, covariance + torch.diag((1.5 * noise) ** 2))
    joint = la(case.new_x, joint=True)[1].reshape(4, 2, 4, 2)
    torch.testing.assert_close(joint.diagonal(dim1=0, dim2=2).movedim(-1, 0), covariance)


def test_noise_that_the_network_predicts():
    case = problem("regression")
    la = Laplace(case.model, HeteroscedasticGaussian(), "all", "full").fit([(case.x, case.y[:, :1])])
    f = la.function_distribution(case.new_x)
    mean, covariance = la(case.new_x)
    torch.testing.assert_close((mean, covariance), (f.mean[:, :1], f.covariance[:, :1, :1]))
    joint_mean, joint = la(case.new_x, joint=True)
    torch.testing.assert_close((joint_mean, joint.diagonal()), (f.mean[:, 0], f.covariance[:, 0, 0]))
    y = la.predictive_distribution(case.new_x)
    noise = (f.mean[:, 1] + f.covariance[:, 1, 1] / 2).exp()
    torch.testing.assert_close(y.covariance_matrix[:, 0, 0], covariance[:, 0, 0] + noise)


def test_single_weights():
    chosen = torch.tensor([0, 5, 40, 53])
    case, la = fitted("regression", "full", "subnetwork", subnetwork=chosen)
    rows = torch.nn.utils.parameters_to_vector(case.model.parameters()).detach().repeat(6, 1)
    rows[:, chosen] = la.sample(6, seeded())
    f = la.functional_samples(case.new_x, 6, seeded(), pred_type="nn")
    torch.testing.assert_close(f, outputs_at(case.model, case.all, rows, case.new_x))


@pytest.mark.peer("laplace")
def test_laplace_torch_agrees_on_the_moments_of_many_samples():
    from laplace import Laplace as Peer

    case = problem("regression")
    la = Laplace(case.model, "regression", "all", "diag", prior_precision=50.0).fit(case.data)
    peer = Peer(case.fresh, "regression", "all", "diag", prior_precision=50.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(case.x, case.y), batch_size=5)
    peer.fit(loader)
    mean, variance = la(case.new_x, "nn", n_samples=3000, generator=seeded())
    peer_mean, peer_variance = peer(case.new_x, pred_type="nn", link_approx="mc", n_samples=3000)
    torch.testing.assert_close(mean, peer_mean.detach(), rtol=0, atol=8 * float(variance.max() / 3000) ** 0.5)
    torch.testing.assert_close(variance, peer_variance.detach(), rtol=0.25, atol=0)
