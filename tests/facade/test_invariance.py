"""Invariances: the bound against dense evidences, its gradient against differences, and what is learned by it."""

import math

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.curvature import verify
from lapkit.invariance import InvariantModel, evidence_over_transform, learn_invariance, posterior_directions
from lapkit.marglik import marglik_training
from lapkit.transforms import Transform


class Turn(Transform):
    """Points of the plane, turned by up to `range`."""

    dimension = 1

    def __init__(self, range_):
        super().__init__()
        self.raw = nn.Parameter(torch.logit(torch.tensor(range_ / math.pi)))

    @property
    def range(self):
        return float(self.raw.sigmoid() * math.pi)

    def forward(self, x, u):
        angle = self.raw.sigmoid() * math.pi * u[:, 0]
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        return torch.einsum("sij,nj->nsi", turn, x)


def network(outputs=3, range_=0.5, places=4, hidden=6):
    torch.manual_seed(0)
    return InvariantModel(
        nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, outputs)), Turn(range_), places
    )


def problem(kind, n=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    if kind == "classification":
        return [(x[:12], torch.arange(12) % 3), (x[12:], torch.arange(n - 12) % 3)]
    y = torch.randn(n, 3, generator=generator)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


SETTINGS = [
    ("classification", {"prior_precision": 0.7}),
    ("classification", {"prior_precision": torch.tensor([0.5, 2.0, 1.0, 3.0]), "temperature": 0.5}),
    ("regression", {"prior_precision": 0.7, "sigma_noise": 0.4}),
]


def dense_evidence(model, data, kind, options):
    """From autograd's Jacobian and a determinant, up to what does not depend on the transform."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    weights = dict(model.model.named_parameters())
    names, sizes = list(weights), [w.numel() for w in weights.values()]
    flat = torch.cat([w.detach().flatten() for w in weights.values()])

    def outputs(v):
        given = {f"model.{k}": p.view_as(weights[k]) for k, p in zip(names, v.split(sizes), strict=True)}
        return torch.func.functional_call(model, given, (x,))

    f, jacobian = outputs(flat), torch.autograd.functional.jacobian(outputs, flat, create_graph=True)  # (N, C, P)
    temperature = options.get("temperature", 1.0)
    precision = torch.as_tensor(options["prior_precision"])
    prior = precision.expand(len(flat)) if precision.ndim == 0 else precision.repeat_interleave(torch.tensor(sizes))
    if kind == "classification":
        fit = f.log_softmax(-1)[torch.arange(len(y)), y].sum() / temperature
        p = f.softmax(-1)
        hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / temperature
    else:
        noise = options["sigma_noise"]
        fit = torch.distributions.Normal(f, noise).log_prob(y).sum()
        hessian = torch.eye(3).expand(len(x), 3, 3) / noise**2
    ggn = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)
    logdet = torch.linalg.slogdet(ggn + torch.diag(prior))[1] - prior.log().sum()
    return fit - (prior * flat.square()).sum() / 2 - logdet / 2


@pytest.mark.parametrize("structure", ["full", "lowrank"])
@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_value_and_gradient_are_those_of_the_dense_evidence(structure, kind, options):
    model, data = network(), problem(kind)
    la = Laplace(model, kind, "all", structure, **options).fit(data)
    value, gradient = evidence_over_transform(la, data, posterior_directions(la))
    raw = model.transform.raw
    expected = dense_evidence(model, data, kind, options)
    assert value == pytest.approx(float(expected.detach()), rel=1e-9)
    assert value == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-9)
    step, at = 1e-4, raw.detach().clone()
    sides = []
    for sign in (1, -1):
        raw.copy_(at + sign * step)
        sides.append(float(dense_evidence(model, data, kind, options).detach()))
    raw.copy_(at)
    assert list(gradient) == ["raw"]
    assert float(gradient["raw"]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("structure", ["full", "kron", "kron_reduce", "diag"])
@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_it_bounds_the_evidence_from_below_everywhere(structure, kind, options):
    model, data = network(), problem(kind)
    la = Laplace(model, kind, "all", structure, **options).fit(data)
    directions = posterior_directions(la)
    for raw in (-4.0, 0.0, 4.0):
        value, _ = evidence_over_transform(la, data, directions, {"raw": torch.tensor(raw)})
        model.transform.raw.fill_(raw)
        assert value <= float(dense_evidence(model, data, kind, options).detach()) + 1e-9


def test_example_weights_count():
    """Twice an example is the example with weight two."""
    model = network()
    (x, y), _ = problem("classification")
    weights = torch.tensor([2.0] * 4 + [1.0] * 8)
    values = []
    for data in ([(x, y, weights)], [(torch.cat([x, x[:4]]), torch.cat([y, y[:4]]))]):
        la = Laplace(model, "classification", "all", "full").fit(data)
        values.append(evidence_over_transform(la, data, posterior_directions(la)))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-9)
    assert float(values[0][1]["raw"]) == pytest.approx(float(values[1][1]["raw"]), rel=1e-9)


def test_only_some_weights_may_be_random():
    model, data = network(), problem("classification")
    la = Laplace(model, "classification", "last_layer", "full").fit(data)
    value, gradient = evidence_over_transform(la, data, posterior_directions(la))
    assert value == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-9)
    step, sides = 1e-4, []
    for sign in (1, -2):
        model.transform.raw.add_(sign * step)
        again = Laplace(model, "classification", "last_layer", "full").fit(data)
        sides.append(float(again.log_marginal_likelihood()))
    assert float(gradient["raw"]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


def test_directions_have_the_posterior_covariance():
    la = Laplace(network(), "classification", "all", "kron").fit(problem("classification"))
    exact = posterior_directions(la)
    torch.testing.assert_close(exact.T @ exact, la.posterior.covariance)
    drawn = posterior_directions(la, 4000, torch.Generator().manual_seed(0))
    variance = exact.square().sum(0)
    error = drawn.square().sum(0) / variance - 1
    assert float(error.abs().max()) < 5 * (2 / 4000) ** 0.5


def test_the_model_is_lent_and_given_back():
    model, data = network(), problem("classification")
    la = Laplace(model, "classification", "all", "full").fit(data)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evidence_over_transform(la, data, posterior_directions(la, 2), {"raw": torch.tensor(2.0)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False]


def test_outputs_are_averages_and_the_engine_reads_them():
    model = network()
    x = torch.randn(5, 2)
    moved = model.transform(x, torch.tensor([[-0.75], [-0.25], [0.25], [0.75]]))
    torch.testing.assert_close(model(x), torch.stack([model.model(moved[:, s]) for s in range(4)]).mean(0))
    assert verify(model, x).passed


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_without_a_range_it_is_the_network_itself(structure):
    """Kronecker factors have to be those of averages, whose inputs and cotangents are averaged and summed."""
    model, data = network(range_=1e-7), problem("classification")
    of_average = {"kron": "kron_reduce"}.get(structure, structure)
    plain = Laplace(model.model, "classification", "all", structure).fit(data)
    averaged = Laplace(model, "classification", "all", of_average).fit(data)
    expected = float(plain.log_marginal_likelihood())
    assert float(averaged.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-6)


def rings(n=120):
    generator = torch.Generator().manual_seed(2)
    x = 1.5 * torch.randn(n, 2, generator=generator)
    flipped = torch.rand(n, generator=generator) < 0.03
    return x, {"rings": (x.norm(dim=1) > 1.7) ^ flipped, "quadrants": (x.prod(1) > 0) ^ flipped}


@pytest.mark.parametrize(("name", "low", "high"), [("rings", 2.2, math.pi), ("quadrants", 0.0, 0.85)])
def test_an_invariance_is_found_where_there_is_one(name, low, high):
    """Rings look the same from all sides, quadrants do not; both start at the same range."""
    x, labels = rings()
    model = network(outputs=2, range_=1.0, places=8, hidden=15)
    found = learn_invariance(
        model,
        [(x, labels[name].long())],
        "classification",
        n_epochs=120,
        burn_in=60,
        frequency=10,
        optimizer_options={"lr": 3e-2},
        learning_rate=0.2,
        n_directions=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(found.transforms) == len(found.training.log_evidences) == 6
    last = math.pi * float(found.transforms[-1]["raw"].sigmoid())
    assert low < last < high
    assert low < model.transform.range < high
    assert max(found.training.log_evidences) > found.training.log_evidences[0]


def test_the_best_network_comes_with_its_transform():
    x, labels = rings(40)
    model, seen = network(outputs=2), []
    options = {"n_epochs": 12, "frequency": 3, "optimizer_options": {"lr": 0.05}}
    found = learn_invariance(model, [(x, labels["rings"].long())], n_directions=2, n_steps=1, **options)
    at_evidences = [torch.logit(torch.tensor(0.5 / math.pi)), *(t["raw"] for t in found.transforms)]
    best = at_evidences[found.training.best_epoch // 3 - 1]
    torch.testing.assert_close(model.transform.raw.detach(), best)
    assert found.laplace.model is model
    assert float(found.laplace.log_marginal_likelihood()) == pytest.approx(max(found.training.log_evidences), rel=1e-9)
    again = marglik_training(network(outputs=2), [(x, labels["rings"].long())], after_fit=seen.append, **options)
    assert len(seen) == len(again.log_evidences) == 4


def test_what_is_refused():
    model, data = network(), problem("classification")
    la = Laplace(model, "classification", "all", "full").fit(data)
    directions = posterior_directions(la, 2)
    with pytest.raises(TypeError, match="InvariantModel"):
        learn_invariance(model.model, data)
    with pytest.raises(TypeError, match="InvariantModel"):
        evidence_over_transform(Laplace(model.model, "classification", "all").fit(data), data, directions)
    with pytest.raises(ValueError, match="directions"):
        evidence_over_transform(la, data, directions[:, 1:])
    with pytest.raises(ValueError, match="finite"):
        evidence_over_transform(la, data, directions, {"raw": torch.tensor(math.nan)})
    with pytest.raises(ValueError, match="n_steps"):
        learn_invariance(model, data, n_steps=0)
    with pytest.raises(ValueError, match="at least one"):
        InvariantModel(model.model, Turn(0.5), 0)
    called = Laplace(model, "classification", "all", "full", forward_fn=lambda m, x: m(x)).fit(data)
    with pytest.raises(ValueError, match="forward_fn"):
        evidence_over_transform(called, data, directions)
    model.model[0].bias.data.add_(1)
    with pytest.raises(RuntimeError, match="fit again"):
        evidence_over_transform(la, data, directions)


def test_single_weights_are_refused():
    """A subnetwork's posterior is over entries of parameters."""
    model, data = network(), problem("classification")
    la = Laplace(model, "classification", "subnetwork", "full", subnetwork=torch.tensor([0, 3, 5])).fit(data)
    with pytest.raises(ValueError, match="single weights"):
        evidence_over_transform(la, data, posterior_directions(la))
