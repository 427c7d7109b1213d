"""`la.evaluate`: the rows are the predictions they say they are, of every form of targets."""

import math

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from lapkit import Laplace
from lapkit.calibration import (
    SigmaScaling,
    TemperatureScaling,
    auroc,
    crps,
    entropy,
    expected_calibration_error,
    nll,
    predictive_nll,
    rmse,
)
from lapkit.curvature import Bernoulli, Categorical, HeteroscedasticGaussian, Poisson


def batches(x, y, size=20):
    return list(zip(x.split(size), y.split(size), strict=True))


def net(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, outputs))


@pytest.fixture
def classes():
    x, model = torch.randn(110, 3), net(3, 3)
    with torch.no_grad():  # labels of which the network knows something
        y = (model.eval()(x) + 0.5 * torch.randn(110, 3)).argmax(1)
    la = Laplace(model.train(), "classification", "all").fit(batches(x[:50], y[:50]))
    return la, batches(x[50:80], y[50:80]), batches(x[80:], y[80:]), 5 * torch.randn(17, 3)


def test_rows_of_classes(classes):
    la, validation, test, far = classes
    members = [net(3, 3, seed) for seed in (1, 2)]
    x, y = (torch.cat(part) for part in zip(*test, strict=True))
    held, labels = (torch.cat(part) for part in zip(*validation, strict=True))
    state = {name: value.clone() for name, value in la.model.state_dict().items()}
    found = la.evaluate(test, validation=validation, ensemble=members, ood=[(far, torch.zeros(17))])
    assert list(found.rows) == ["MAP", "MAP + temperature", "Laplace", "ensemble of 2"]
    with torch.no_grad():
        la.model.eval()
        f, g = la.model(x), la.model(held)
        expected = {"MAP": f.softmax(1), "Laplace": la(x)}
        expected["MAP + temperature"] = TemperatureScaling.fit(g, labels)(f)
        expected["ensemble of 2"] = sum(m.eval()(x).softmax(1) for m in members) / 2
        outside = {"MAP": la.model(far).softmax(1), "Laplace": la(far)}
    for name, p in expected.items():
        assert found.rows[name]["NLL"] == pytest.approx(nll(p, y), abs=1e-10)
        assert found.rows[name]["ECE"] == pytest.approx(expected_calibration_error(p, y), abs=1e-10)
    for name, p in outside.items():
        assert found.rows[name]["OOD AUROC"] == pytest.approx(auroc(entropy(expected[name]), entropy(p)))
    assert all(torch.equal(state[name], value) for name, value in la.model.state_dict().items())
    assert any("TemperatureScaling" in note for note in found.notes)


def test_networks_are_given_back_in_the_mode_they_had(classes):
    la, _, test, _ = classes
    members = [net(3, 3, 1).train()]
    la.model.train()
    la.evaluate(test, ensemble=members)
    assert la.model.training
    assert members[0].training


def test_without_validation_there_is_no_temperature_and_the_report_says_so(classes):
    la, _, test, far = classes
    found = la.evaluate(test, ood=[far], link_approx="mc", generator=torch.Generator().manual_seed(0))
    assert list(found.rows) == ["MAP", "Laplace"]
    assert "validation=" in str(found)
    assert "validation=" not in str(la.evaluate(test, validation=test))
    mine = la.evaluate(test, notes=["Mine."], title="A title")
    assert "Mine." in mine.notes
    assert mine.title == "A title"


def test_rows_of_a_regression():
    data = load_diabetes()
    x, y = torch.tensor(data.data * 20), torch.tensor(data.target)[:, None] / 100
    la = Laplace(net(10, 1), "regression", "all", sigma_noise=0.7).fit(batches(x[:200], y[:200]))
    la.optimize_prior_precision()
    members = [net(10, 1, seed) for seed in (1, 2, 3)]
    test, validation = batches(x[300:], y[300:, 0]), batches(x[200:300], y[200:300])
    found = la.evaluate(test, validation=validation, ensemble=members, ood=[(3 * x[300:],)], unit="points")
    assert list(found.rows) == ["MAP", "MAP + sigma scaling", "Laplace", "ensemble of 3"]
    with torch.no_grad():
        f, g = la.model.eval()(x[300:]), la.model(x[200:300])
        each = torch.stack([m.eval()(x[300:]) for m in members])
    scaled = SigmaScaling.fit((g, 0.7), y[200:300])((f, 0.7))
    expected = {"MAP": (f, 0.7), "MAP + sigma scaling": scaled, "Laplace": la.predictive_distribution(x[300:])}
    for name, prediction in expected.items():
        assert found.rows[name]["NLL"] == pytest.approx(predictive_nll(prediction, y[300:]), abs=1e-9)
        assert found.rows[name]["CRPS"] == pytest.approx(crps(prediction, y[300:]), abs=1e-9)
    density = torch.distributions.Normal(each, 0.7).log_prob(y[300:]).exp().mean(0)
    assert found.rows["ensemble of 3"]["NLL"] == pytest.approx(float(-density.log().mean()), abs=1e-9)
    assert found.rows["ensemble of 3"]["RMSE"] == pytest.approx(rmse(each.mean(0), y[300:]), abs=1e-9)
    assert found.to_dict()["units"]["RMSE"] == "points"


def test_missing_labels_and_positions_are_rows_of_their_own():
    x, model = torch.randn(20, 4, 3), nn.Linear(3, 3)
    y = (model(x) + torch.randn(20, 4, 3)).argmax(-1)
    y[3, 1] = y[7, 0] = 0
    likelihood = Categorical(ignore_index=0)  # a class that says: not known
    la = Laplace(model, likelihood, "all").fit([(x, y)])
    p, kept = la(x).reshape(-1, 3), y.reshape(-1) != 0
    found = la.evaluate(batches(x, y, 7), validation=[(x, y)])
    assert found.rows["Laplace"]["NLL"] == pytest.approx(nll(p[kept], y.reshape(-1)[kept]), abs=1e-10)
    assert "examples of 3 classes" in found.summary
    assert str(int(kept.sum())) in found.summary


def test_every_event_counts():
    x, model = torch.randn(20, 3), nn.Linear(3, 2)
    y = (model(x) + torch.randn(20, 2) > 0).double()
    y[3, 1] = math.nan
    la = Laplace(model, Bernoulli(missing=math.nan), "all").fit([(x, y)])
    known = ~y.isnan()
    found = la.evaluate(batches(x, y, 6), validation=[(x, y)])
    assert found.rows["Laplace"]["NLL"] == pytest.approx(nll(la(x)[known], y[known].long()), abs=1e-10)
    assert list(found.rows)[1] == "MAP + temperature"


def test_several_events_of_an_example_are_evaluated_without_its_inputs():
    x, model = torch.randn(20, 3), nn.Linear(3, 2)
    y = (torch.rand(20, 2) > 0.5).double()
    la = Laplace(model, Bernoulli(), "all").fit([(x, y)])
    found = la.evaluate([(x, y)])
    assert found.summary == "40 examples of 2 classes."
    assert "uncertain" not in found.to_html()


def test_a_variance_of_its_own_for_every_input():
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    la = Laplace(nn.Linear(3, 2), HeteroscedasticGaussian(), "all", hessian_structure="full").fit([(x, y)])
    found = la.evaluate([(x, y)])
    with torch.no_grad():
        mean, log_variance = la.model(x).chunk(2, dim=1)
    expected = predictive_nll((mean, (log_variance / 2).exp()), y)
    assert found.rows["MAP"]["NLL"] == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_evaluated_says_why(classes):
    la, _, test, _ = classes
    x, y = test[0]
    with pytest.raises(ValueError, match="all count alike"):
        la.evaluate([(x, y, torch.ones(len(x)))])
    with pytest.raises(ValueError, match="no batch"):
        la.evaluate([])
    with pytest.raises(TypeError, match="expected a pair"):
        la.evaluate([x])
    with pytest.raises(TypeError, match="one Sequential; expected a list"):
        la.evaluate(test, ensemble=nn.Sequential(net(3, 3)))
    with pytest.raises(ValueError, match="link_approx"):
        la.evaluate(test, link_approx="logit")
    with pytest.raises(RuntimeError, match="fit"):
        Laplace(net(3, 3), "classification").evaluate(test)
    counts = Laplace(nn.Linear(3, 1), Poisson(), "all").fit([(x, torch.ones(len(x), 1))])
    with pytest.raises(TypeError, match="GammaPoisson cannot be evaluated"):
        counts.evaluate([(x, torch.ones(len(x), 1))])


def test_underconfidence_is_said_where_the_network_has_none():
    """Labels drawn from the network's own probabilities, so that it is calibrated whatever its weights."""
    x, model = torch.randn(900, 3), nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.mul_(6)
        y = torch.distributions.Categorical(logits=model(x)).sample()
    la = Laplace(model, "classification", "all").fit(batches(x[:300], y[:300]))
    said = {}
    for precision in (1e6, 1e-4):
        la.prior_precision = precision
        found = la.evaluate(batches(x[300:], y[300:]))
        said[precision] = [note for note in found.notes if "underconfident" in note]
    assert said[1e6] == []
    (note,) = said[1e-4]
    p = la(x[300:])
    assert f"right about {(p.argmax(1) == y[300:]).double().mean():.0%}" in note
    assert f"expects {p.amax(1).mean():.0%}" in note
    assert "gridsearch" in str(found)
