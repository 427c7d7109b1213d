"""Ranking models by evidence, and mixtures of Laplace approximations."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from lapkit import Laplace
from lapkit.comparison import Comparison, Ranked, compare
from lapkit.curvature import Gaussian, MonteCarloGGN
from lapkit.ensemble import LaplaceMixture
from lapkit.marglik import marglik_training
from lapkit.posteriors import GaussianPrior
from lapkit.training import train_map


def polynomial(degree, x):
    return torch.stack([x**k for k in range(degree + 1)], dim=-1)


def evidence_of_linear_gaussian(features, y, sigma, precision):
    """`log N(y; 0, sigma^2 I + F F^T / precision)`."""
    covariance = sigma**2 * torch.eye(len(y)) + features @ features.T / precision
    return float(MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def test_polynomials_are_ranked_by_their_exact_evidence():
    x = torch.linspace(-1, 1, 40)
    y = 1 - 2 * x + 3 * x**2 + 0.1 * torch.randn(40)
    models, exact = {}, {}
    for degree in range(7):
        features, model = polynomial(degree, x), nn.Linear(degree + 1, 1, bias=False)
        train_map(model, Gaussian(0.1), features, y[:, None], GaussianPrior(0.1), tolerance=1e-10)
        la = Laplace(model, "regression", "all", "full", sigma_noise=0.1, prior_precision=0.1)
        models[f"degree {degree}"] = la.fit([(features, y[:, None])])
        exact[f"degree {degree}"] = evidence_of_linear_gaussian(features, y, 0.1, 0.1)
    found = compare(models)
    assert found.best.name == "degree 2"
    assert [row.name for row in found] == sorted(exact, key=lambda name: -exact[name])
    for row in found:
        assert row.log_evidence == pytest.approx(exact[row.name], rel=1e-8)
        total = math.fsum(math.exp(e - exact["degree 2"]) for e in exact.values())
        assert row.probability == pytest.approx(math.exp(exact[row.name] - exact["degree 2"]) / total, rel=1e-6)
    assert found.remarks == ()
    assert "degree 2" in str(found).splitlines()[1]


def classifier(data, structure="full", subset="all", **options):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    return Laplace(model, "classification", subset, structure, **options).fit(data)


@pytest.fixture
def data():
    return [(torch.randn(20, 2), torch.arange(20) % 3)]


def test_what_blurs_a_comparison_is_remarked(data):
    remarks = lambda *models: " ".join(compare(models).remarks)  # noqa: E731
    assert remarks(classifier(data), classifier(data)) == ""
    assert "different structures" in remarks(classifier(data), classifier(data, "diag"))
    assert "'1' took some of the trained weights" in remarks(classifier(data), classifier(data, subset="last_layer"))
    assert "'0' have a temperature" in remarks(classifier(data, temperature=0.5), classifier(data))
    assert "'1' is an estimate" in remarks(classifier(data), classifier(data, curvature=MonteCarloGGN()))


@pytest.mark.parametrize(("one", "two"), [("kron", "kron_reduce"), ("kron", "ekfac"), ("kron", "blockdiag")])
def test_structures_of_one_form_are_told_apart(data, one, two):
    assert "different structures (GGN" in compare([classifier(data, one), classifier(data, two)]).remarks[0]
    assert compare([classifier(data, one), classifier(data, one)]).remarks == ()


def test_factors_that_are_written_out_stay_factors(data):
    """Single weights cut a Kronecker product into something that is none."""
    some = {"subset": "subnetwork", "subnetwork": torch.tensor([0, 3, 4])}
    one, two = classifier(data, "kron", **some), classifier(data, "blockdiag", **some)
    assert "different structures (GGN" in compare([one, two]).remarks[0]


def test_forms_of_one_structure_are_not(data):
    columns = classifier(data, "lowrank"), classifier(data, "gp"), classifier(data, "lowrank", space="weights")
    assert compare([classifier(data), *columns]).remarks == ()
    assert compare([classifier(data, "blockdiag"), classifier(data, "lowrank", per_parameter=True)]).remarks == ()


def test_what_cannot_be_compared_is_refused(data):
    x, y = data[0]
    with pytest.raises(ValueError, match=r"different examples .*'0': 20.*'1': 10"):
        compare([classifier(data), classifier([(x[:10], y[:10])])])
    regression = Laplace(nn.Linear(2, 3), "regression", "all").fit([(x, torch.randn(20, 3))])
    with pytest.raises(ValueError, match="kinds of likelihood"):
        compare([classifier(data), regression])
    with pytest.raises(ValueError, match="no model"):
        compare([])
    with pytest.raises(TypeError, match="Linear as 'a'"):
        compare({"a": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match="fit"):
        compare([Laplace(nn.Linear(2, 3), "classification", "all")])


# -- mixtures


def test_probabilities_of_a_mixture_are_those_of_its_members(data):
    members, x = [classifier(data) for _ in range(3)], torch.randn(5, 2)
    mixture = LaplaceMixture(members, [1.0, 2.0, 1.0])
    expected = (members[0](x) + 2 * members[1](x) + members[2](x)) / 4
    torch.testing.assert_close(mixture(x), expected)
    torch.testing.assert_close(mixture.predictive_distribution(x).probs, expected)


def test_evidence_weighs_the_members(data):
    members = [classifier(data) for _ in range(3)]
    logs = torch.tensor([float(la.log_marginal_likelihood()) for la in members], dtype=torch.float64)
    torch.testing.assert_close(LaplaceMixture(members, "evidence").weights, logs.softmax(0))
    assert LaplaceMixture(members).weights.tolist() == pytest.approx([1 / 3] * 3)
    assert repr(LaplaceMixture(members)) == "LaplaceMixture(3 members, weights 0.333, 0.333, 0.333)"


def test_moments_of_a_mixture_are_those_of_its_distribution():
    x, y = torch.randn(30, 2), torch.randn(30, 2)
    members = [Laplace(nn.Linear(2, 2), "regression", "all", "full", sigma_noise=0.5).fit([(x, y)]) for _ in range(3)]
    mixture, new = LaplaceMixture(members, [1.0, 2.0, 3.0]), torch.randn(4, 2)
    mean, covariance = mixture(new)
    distribution = mixture.predictive_distribution(new)
    torch.testing.assert_close(mean, distribution.mean)
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1) + 0.25, distribution.variance)
    torch.testing.assert_close(mixture(new, diagonal_output=True)[1], covariance.diagonal(dim1=-2, dim2=-1))
    # The whole covariance by the moments of the members: E[S + m m^T] - E[m] E[m]^T.
    second = sum(
        w * (s + m[:, :, None] * m[:, None])
        for w, (m, s) in zip(mixture.weights, (la(new) for la in members), strict=True)
    )
    torch.testing.assert_close(covariance, second - mean[:, :, None] * mean[:, None])
    dense = torch.stack([torch.exp(la.predictive_distribution(new).log_prob(mean)) for la in members], dim=-1)
    torch.testing.assert_close(distribution.log_prob(mean).exp(), dense @ mixture.weights)


def test_a_mixture_of_bernoullis():
    x, y = torch.randn(30, 2), torch.randint(0, 2, (30, 1)).double()
    members = [Laplace(nn.Linear(2, 1), "binary", "all").fit([(x, y)]) for _ in range(2)]
    mixture, new = LaplaceMixture(members), torch.randn(4, 2)
    torch.testing.assert_close(mixture.predictive_distribution(new).mean, (members[0](new) + members[1](new)) / 2)


def test_what_a_mixture_refuses(data):
    members = [classifier(data), classifier(data)]
    with pytest.raises(ValueError, match="Expected 2 weights"):
        LaplaceMixture(members, [1.0])
    with pytest.raises(ValueError, match="none negative"):
        LaplaceMixture(members, [1.0, -1.0])
    with pytest.raises(ValueError, match="'uniform', 'evidence'"):
        LaplaceMixture(members, "best")
    with pytest.raises(ValueError, match="not Gaussian"):
        LaplaceMixture(members)(torch.randn(1, 2), joint=True)


def test_what_is_no_list_of_models(data):
    la = classifier(data)
    with pytest.raises(TypeError, match="in a list, or by name in a dict; got a Laplace"):
        compare(la)
    trained = marglik_training(la.model, data, "classification", hessian_structure="diag", n_epochs=1)
    with pytest.raises(TypeError, match=r"MarglikTraining as 'r': give its \.laplace"):
        compare({"r": trained})
    for members in (la, {"a": la}):
        with pytest.raises(TypeError, match=r"in a list, as in LaplaceMixture\(\[a, b\]\); got a"):
            LaplaceMixture(members)


def test_columns_of_the_table_stay_apart():
    rows = tuple(Ranked(name, -v, -v, 12_345_678, 0.5) for name, v in (("a", 123456.78), ("b", 9876543.21)))
    lines = str(Comparison(rows, ())).splitlines()
    assert [len(line.split()) for line in lines] == [8, 7, 7]  # "log evidence" is two words
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[1:4] == ["-9876543.21", "-9753086.43", "-9876543.21"]


def test_columns_are_the_full_matrix_unless_their_rank_is_limited(data):
    full = classifier(data)

    def other(**options):
        return Laplace(full.model, "classification", "all", "lowrank", **options).fit(data)

    for exact in (other(), other(rank=60), other(space="functions"), other(space="weights")):
        assert compare([full, exact]).remarks == ()
        assert float(exact.log_marginal_likelihood()) == pytest.approx(float(full.log_marginal_likelihood()))
    found = compare({"full": full, "cut": other(rank=2), "blocks": other(rank=1, per_parameter=True)})
    assert "'cut', 'blocks' keep a limited rank" in found.remarks[0]
    assert found.best.name != "full"  # the evidence errs high


@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_uncertainty_of_a_mixture_adds_up_to_that_of_its_predictive(kind):
    x, new, outputs = torch.randn(30, 2), torch.randn(4, 2), 1 if kind == "binary" else 3
    y = {"classification": torch.arange(30) % 3, "binary": torch.rand(30, 1).round(), "regression": torch.randn(30, 3)}
    members = [Laplace(nn.Linear(2, outputs), kind, "all", "full").fit([(x, y[kind])]) for _ in range(3)]
    weights = torch.tensor([1.0, 2.0, 3.0]) / 6
    found = LaplaceMixture(members, weights).uncertainty(new, generator=torch.Generator().manual_seed(0))
    parts = [member.uncertainty(new) for member in members]
    close = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)
    close(found.aleatoric, sum(w * part.aleatoric for w, part in zip(weights, parts, strict=True)))
    if kind == "regression":
        close(found.total, LaplaceMixture(members, weights).predictive_distribution(new).variance)
        return
    mixed = [member.predictive_distribution(new, "qmc", 4096) for member in members]
    p = sum(w * (m.probs if kind == "classification" else m.mean) for w, m in zip(weights, mixed, strict=True))
    entropy = (
        torch.special.entr(p).sum(-1) if kind == "classification" else torch.special.entr(p) + torch.special.entr(1 - p)
    )
    close(found.total, entropy)
    one = LaplaceMixture(members[:1]).uncertainty(new)
    close(one.epistemic, parts[0].epistemic)
