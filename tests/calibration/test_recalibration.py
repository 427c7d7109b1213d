"""Fitted recalibrations against the committed oracle, scipy's and scikit-learn's own fits, and autograd."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from lapkit.calibration import (
    HistogramBinning,
    IsotonicRecalibration,
    PlattScaling,
    QuantileRecalibration,
    Recalibration,
    SigmaScaling,
    TemperatureScaling,
    VectorScaling,
    load_recalibration,
    mean_squared_z,
    nll,
    nll_from_logits,
    pit,
    pit_distance,
    predictive_nll,
    quantile_calibration_error,
)
from lapkit.calibration.conformal import ConformalSets
from lapkit.calibration.conformal_intervals import ConformalBounds, ConformalIntervals

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "calibration.json").read_text())


def tensor(group, key):
    values = torch.tensor(ORACLE["inputs"][group][key])
    return values.double() if values.is_floating_point() else values


LOGITS, Y = tensor("multi", "logits"), tensor("multi", "y")
P, OCCURRED = tensor("binary", "p"), tensor("binary", "y")
REGRESSION, TARGETS = (tensor("reg", "mu"), tensor("reg", "sigma")), tensor("reg", "y")


class Given(ClassifierMixin, BaseEstimator):
    """A classifier of scikit-learn whose scores are its inputs."""

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X):
        return X[:, 0] if X.shape[1] == 1 else X

    def predict(self, X):
        return self.classes_[(X[:, 0] > 0).astype(int) if X.shape[1] == 1 else X.argmax(1)]


def calibrated(scores, y, method):
    x = scores.numpy().reshape(len(y), -1)
    return CalibratedClassifierCV(FrozenEstimator(Given().fit(x, y.numpy())), method=method).fit(x, y.numpy()), x


def test_the_temperature_is_the_oracles_and_scipys():
    scaling = TemperatureScaling.fit(LOGITS, Y)
    assert scaling.temperature == pytest.approx(1.449620, abs=1e-6)
    found = optimize.minimize_scalar(
        lambda b: nll_from_logits(LOGITS * b, Y), bounds=(0.1, 5), method="bounded", options={"xatol": 1e-10}
    )
    assert scaling.temperature == pytest.approx(1 / found.x, abs=1e-6)
    value = next(c["value"] for c in ORACLE["cases"] if c["metric"] == "nll_after_temperature")
    assert nll(scaling(LOGITS), Y) == pytest.approx(value, abs=1e-9)
    b = torch.tensor(1 / scaling.temperature, requires_grad=True)
    torch.nn.functional.cross_entropy(b * LOGITS, Y).backward()
    assert abs(float(b.grad)) < 1e-12


def test_the_temperature_is_scikit_learns():
    peer, x = calibrated(LOGITS, Y, "temperature")
    assert TemperatureScaling.fit(LOGITS, Y)(LOGITS).numpy() == pytest.approx(peer.predict_proba(x), abs=1e-5)


def test_shifts_scales_and_logarithms_of_logits():
    scaling = TemperatureScaling.fit(LOGITS, Y)
    assert TemperatureScaling.fit(LOGITS + 7 * torch.randn(len(Y), 1), Y).temperature == pytest.approx(
        scaling.temperature, rel=1e-9
    )
    assert TemperatureScaling.fit(10 * LOGITS, Y).temperature == pytest.approx(10 * scaling.temperature, rel=1e-9)
    assert TemperatureScaling.fit(LOGITS.softmax(1).log(), Y).temperature == pytest.approx(
        scaling.temperature, rel=1e-9
    )
    odds = P.logit()
    two = torch.stack((torch.zeros_like(odds), odds), 1)
    one = TemperatureScaling.fit(odds, OCCURRED)
    assert one.temperature == pytest.approx(TemperatureScaling.fit(two, OCCURRED).temperature, rel=1e-12)
    assert torch.allclose(one(odds), one(two)[:, 1], atol=1e-14)
    assert one(odds[:, None]).shape == (len(P), 1)


@pytest.mark.parametrize("kind", [TemperatureScaling, VectorScaling])
def test_probabilities_in_the_place_of_logits(kind):
    p = LOGITS.softmax(1)
    with pytest.raises(ValueError, match="these are probabilities, expected logits"):
        kind.fit(p, Y)
    with pytest.raises(ValueError, match="these are probabilities, expected logits"):
        kind.fit(LOGITS, Y)(p)
    with pytest.warns(UserWarning, match=r"between 0 and 1.*probabilities.logit\(\)") as record:
        kind.fit(P, (torch.arange(len(P)) % 4 > 0).long())  # so that there is a best temperature
    assert record[0].filename == __file__


def test_zero_probabilities_are_kept_unless_a_label_has_one():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    y = torch.tensor([0, 1, 1])
    scaling = TemperatureScaling.fit(p.log(), y)
    assert scaling.temperature == pytest.approx(TemperatureScaling.fit(p[:, :2].log(), y).temperature, rel=1e-12)
    assert (scaling(p.log())[:, 2] == 0).all()
    with pytest.raises(ValueError, match="at any temperature"):
        TemperatureScaling.fit(p.log(), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("logits", "labels", "expected", "words"),
    [
        (torch.eye(3) * 5, torch.arange(3), 0.01, "smaller, the better"),
        (torch.eye(3) * 5, torch.tensor([1, 2, 0]), 100, "say nothing"),
        (torch.ones(3, 3), torch.arange(3), 1, "all the same"),
    ],
)
def test_a_temperature_at_the_boundary_warns(logits, labels, expected, words):
    with pytest.warns(UserWarning, match=words) as record:
        assert TemperatureScaling.fit(logits, labels).temperature == pytest.approx(expected)
    assert record[0].filename == __file__


def test_vector_scaling_is_at_the_minimum():
    scaling = VectorScaling.fit(LOGITS, Y)

    def loss(theta):
        return torch.nn.functional.cross_entropy(theta[:4] * LOGITS + theta[4:], Y)

    theta = torch.cat((scaling.scale, scaling.bias))
    assert float(torch.func.grad(loss)(theta).abs().max()) < 1e-7  # convex, so this is enough
    assert abs(float(scaling.bias.sum())) < 1e-12
    options = {"xatol": 1e-8, "fatol": 1e-13, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True}
    peer = optimize.minimize(
        lambda t: float(loss(torch.tensor(t))), np.r_[np.ones(4), np.zeros(4)], method="Nelder-Mead", options=options
    )
    assert nll(scaling(LOGITS), Y) == pytest.approx(peer.fun, abs=1e-8)
    assert nll(scaling(LOGITS), Y) < nll(TemperatureScaling.fit(LOGITS, Y)(LOGITS), Y)
    scaled = VectorScaling.fit(LOGITS * 1e3, Y)
    assert torch.allclose(scaled.scale * 1e3, scaling.scale, atol=1e-5)


def test_platt_is_the_oracles_and_scikit_learns():
    odds = P.logit()
    found = PlattScaling.fit(odds, OCCURRED, smooth=False)
    case = next(c for c in ORACLE["cases"] if c["metric"].startswith("platt"))
    assert [found.slope, found.intercept] == pytest.approx(case["value"], abs=case["tol"])
    peer = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(odds[:, None], OCCURRED)
    assert found.slope == pytest.approx(peer.coef_.item(), abs=1e-7)
    assert found.intercept == pytest.approx(peer.intercept_.item(), abs=1e-7)
    smooth = PlattScaling.fit(odds, OCCURRED == 1)
    calibration, x = calibrated(odds, OCCURRED, "sigmoid")
    assert smooth(odds).numpy() == pytest.approx(calibration.predict_proba(x)[:, 1], abs=1e-5)
    far = PlattScaling.fit(1e6 + 100 * odds, OCCURRED)
    assert far(1e6 + 100 * odds).numpy() == pytest.approx(smooth(odds).numpy(), abs=1e-6)


def test_separable_classes_warn_and_stay_finite():
    scores, y = torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
    with pytest.warns(UserWarning, match="without bound") as record:
        assert PlattScaling.fit(scores, y, smooth=False)(scores).isfinite().all()
    assert record[0].filename == __file__
    assert PlattScaling.fit(scores, y)(scores).numpy() == pytest.approx([0.25, 0.25, 0.75, 0.75], abs=0.1)
    with pytest.warns(UserWarning, match="without bound"):
        assert VectorScaling.fit(2 * torch.eye(3), torch.arange(3))(2 * torch.eye(3)).isfinite().all()


def test_isotonic_is_scikit_learns():
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(P.numpy(), OCCURRED.numpy())
    recalibration = IsotonicRecalibration.fit(P, OCCURRED)
    at = torch.linspace(0, 1, 301)
    assert recalibration(at).numpy() == pytest.approx(peer.predict(at.numpy()), abs=1e-12)
    two = recalibration(torch.stack((1 - at, at), 1))
    assert torch.equal(two[:, 1], recalibration(at))
    calibration, x = calibrated(LOGITS.softmax(1), Y, "isotonic")
    found = IsotonicRecalibration.fit(LOGITS.softmax(1), Y)(LOGITS.softmax(1))
    assert found.numpy() == pytest.approx(calibration.predict_proba(x), abs=1e-10)


def test_where_every_class_gets_nothing_rows_are_uniform():
    p = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    recalibration = HistogramBinning.fit(p, torch.arange(3), bins=2, binning="equal_width")
    assert recalibration(p).tolist() == torch.eye(3).tolist()
    assert recalibration(torch.full((1, 3), 1 / 3)).tolist() == [[1 / 3] * 3]


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_histogram_binning_gives_frequencies(binning):
    recalibration = HistogramBinning.fit(P, OCCURRED, bins=5, binning=binning)
    new = recalibration(P)
    for value in new.unique():
        held = new == value
        assert float(value) == pytest.approx(float(OCCURRED[held].double().mean()), abs=1e-12)
    assert len(new.unique()) <= 5
    assert (recalibration(torch.tensor([0.0, 1.0])) == recalibration.frequency[0, [0, -1]]).all()
    rows = HistogramBinning.fit(LOGITS.softmax(1), Y, bins=4)(LOGITS.softmax(1))
    assert torch.allclose(rows.sum(1), torch.ones(len(Y)))


def test_bins_without_examples_keep_their_middle():
    found = HistogramBinning.fit(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), bins=4, binning="equal_width")
    assert found(torch.tensor([0.3, 0.6])).tolist() == [0.375, 0.625]


def test_a_recalibration_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="There are 3 classes, the recalibration was fitted to 4"):
        IsotonicRecalibration.fit(LOGITS.softmax(1), Y)(torch.ones(2, 3) / 3)
    with pytest.raises(ValueError, match="fitted to 2"):
        HistogramBinning.fit(P, OCCURRED)(torch.ones(2, 3) / 3)


def test_the_spread_is_scaled_to_the_smallest_nll():
    scaling = SigmaScaling.fit(REGRESSION, TARGETS)
    assert float(scaling.factor) == pytest.approx(1.9347, abs=1e-4)
    mean, std = REGRESSION
    peer = optimize.minimize_scalar(
        lambda s: predictive_nll((mean, s * std), TARGETS), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert float(scaling.factor) == pytest.approx(peer.x, abs=1e-6)
    assert mean_squared_z(scaling(REGRESSION), TARGETS) == pytest.approx(1, abs=1e-12)
    two = (torch.randn(30, 2), torch.tensor([0.5, 2.0]).expand(30, 2))
    y = two[0] + torch.randn(30, 2)
    each = SigmaScaling.fit(two, y, per_target=True)
    for k in range(2):
        alone = SigmaScaling.fit((two[0][:, k], two[1][:, k]), y[:, k])
        assert float(each.factor[k]) == pytest.approx(float(alone.factor), abs=1e-12)
    with pytest.raises(ValueError, match="best factor is zero"):
        SigmaScaling.fit((torch.zeros(3), 1.0), torch.zeros(3))


def test_quantiles_are_recalibrated_to_what_was_observed():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4000, generator=generator)
    y = mean + torch.distributions.Exponential(1.0).icdf(torch.rand(4000, generator=generator))
    given = [(mean[half], 0.7) for half in (slice(2000), slice(2000, None))]
    recalibration = QuantileRecalibration.fit(given[0], y[:2000])
    peer = IsotonicRegression(out_of_bounds="clip")
    u = pit(given[0], y[:2000])
    peer.fit(u.numpy(), stats.rankdata(u.numpy(), method="max") / 2000)
    at = torch.linspace(float(u.min()), float(u.max()), 201)
    # It averages what float64 hardly tells apart, such as the two largest here.
    assert recalibration(at)[:-1].numpy() == pytest.approx(peer.predict(at[:-1].numpy()), abs=1e-12)
    before, after = pit(given[1], y[2000:]), recalibration(pit(given[1], y[2000:]))
    assert stats.kstest(after, "uniform").statistic < 0.03 < pit_distance(given[1], y[2000:])
    assert quantile_calibration_error(given[1], y[2000:]) > 0.1
    assert before.shape == after.shape
    for coverage in (0.5, 0.9):
        low, high = recalibration.interval(given[1], coverage=coverage)
        held = ((low <= y[2000:]) & (y[2000:] <= high)).double().mean()
        assert float(held) == pytest.approx(coverage, abs=0.03)
    # The recalibrated quantile is where the recalibrated distribution function has the level.
    assert recalibration(pit(given[1], recalibration.quantile(given[1], 0.3)))[0] == pytest.approx(0.3, abs=1e-9)
    with pytest.raises(ValueError, match="0 or 1"):
        QuantileRecalibration.fit((torch.zeros(2), 1e-3), torch.tensor([-100.0, 100.0]))


FITTED = [
    (TemperatureScaling.fit(LOGITS, Y), LOGITS),
    (VectorScaling.fit(LOGITS, Y), LOGITS),
    (PlattScaling.fit(P.logit(), OCCURRED), P.logit()),
    (IsotonicRecalibration.fit(LOGITS.softmax(1), Y), LOGITS.softmax(1)),
    (HistogramBinning.fit(P, OCCURRED), P),
    (SigmaScaling.fit(REGRESSION, TARGETS), REGRESSION),
    (QuantileRecalibration.fit(REGRESSION, TARGETS), P),
    (ConformalSets.fit(LOGITS.softmax(1), Y, score="adaptive", penalty=0.1), LOGITS.softmax(1)),
    (ConformalIntervals.fit(REGRESSION, TARGETS), REGRESSION),
    (ConformalBounds.fit((TARGETS - 1, TARGETS + 1), TARGETS), (TARGETS - 1, TARGETS + 1)),
]


@pytest.mark.parametrize(("fitted", "given"), FITTED, ids=lambda v: type(v).__name__)
def test_states_are_plain_and_come_back(fitted, given):
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    back = load_recalibration(torch.load(file, weights_only=True))
    assert type(back) is type(fitted)
    assert repr(back) == repr(fitted)
    one, two = fitted(given), back(given)
    for a, b in zip(one, two, strict=True) if isinstance(one, tuple) else [(one, two)]:
        assert torch.equal(a, b)
    with pytest.raises(AttributeError):
        fitted.anything = 1


def test_every_kind_is_tested_for_its_state():
    assert {type(fitted).__name__ for fitted, _ in FITTED} == set(Recalibration.kinds)


@pytest.mark.parametrize(
    "state", [{}, {"kind": "Recalibration"}, {"kind": "TemperatureScaling"}, {"kind": "PlattScaling", "slope": 1.0}]
)
def test_other_states_are_refused(state):
    with pytest.raises(ValueError, match=r"expected what state_dict\(\)"):
        load_recalibration(state)
