"""Risk and coverage by loops over orders, and the closed form of AUGRC."""

import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from lapkit.calibration import accuracy, entropy, risk_coverage_curve, top_label

mpl.use("agg")


def problem(count=300, lattice=None, classes=3):
    generator = torch.Generator().manual_seed(count)
    p = (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    if lattice:
        p = (p * lattice).round() + 1
        p = p / p.sum(dim=1, keepdim=True)
    return p, torch.multinomial(p**0.7, 1, generator=generator).squeeze(1)


def test_risks_are_error_rates_of_the_most_confident():
    p, y = problem(100)
    confidence, correct = (part.numpy() for part in top_label(p, y))
    order = np.argsort(-confidence)
    risks = [np.mean(1 - correct[order[:n]]) for n in range(1, 101)]
    curve = risk_coverage_curve(p, y)
    np.testing.assert_allclose(curve.risk.numpy(), risks, rtol=0, atol=1e-14)
    assert curve.coverage.tolist() == [n / 100 for n in range(1, 101)]
    assert curve.aurc == pytest.approx(np.mean(risks), abs=1e-14)
    assert curve.risk[-1].item() == pytest.approx(1 - accuracy(p, y), abs=1e-14)
    integral = trapezoid(risks, curve.coverage.numpy()) / (1 - 1 / 100)
    assert curve.aurc_trapezoid == pytest.approx(integral, abs=1e-13)
    general = np.array(risks) * curve.coverage.numpy()
    assert curve.augrc_trapezoid == pytest.approx(trapezoid(general, curve.coverage.numpy()) / 0.99, abs=1e-13)


def test_ties_are_the_mean_over_all_orders():
    confidence, wrong = [0.9, 0.6, 0.6, 0.6, 0.6], [0, 1, 0, 0, 1]
    curves = []
    for order in itertools.permutations(range(1, 5)):
        errors = [wrong[n] for n in (0, *order)]
        curves.append(np.cumsum(errors) / np.arange(1, 6))
    p = torch.tensor(confidence)
    found = risk_coverage_curve(torch.stack((p, 1 - p), dim=1), torch.tensor(wrong))
    np.testing.assert_allclose(found.risk.numpy(), np.mean(curves, axis=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("lattice", [None, 4])
def test_augrc_is_the_closed_form(lattice):
    p, y = problem(lattice=lattice)
    confidence, correct = (part.numpy() for part in top_label(p, y))
    acc, area = correct.mean(), roc_auc_score(correct, confidence)
    expected = (1 - area) * acc * (1 - acc) + (1 - acc) ** 2 / 2
    assert risk_coverage_curve(p, y).augrc == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("lattice", [None, 4])
def test_the_order_of_the_data_does_not_matter(lattice):
    p, y = problem(lattice=lattice)
    curve, turned = risk_coverage_curve(p, y), risk_coverage_curve(p.flip(0), y.flip(0))
    torch.testing.assert_close(turned.risk, curve.risk, rtol=0, atol=1e-13)


def test_the_best_order_has_no_excess():
    p, y = problem(50)
    _, correct = top_label(p, y)
    right = int(correct.sum())
    exact = sum(max(0, n - right) / n for n in range(1, 51)) / 50
    for confidence in (correct, correct + torch.arange(50) / 1000):
        best = risk_coverage_curve(p, y, confidence=confidence)
        assert best.e_aurc == pytest.approx(0, abs=1e-14)
        assert best.aurc == pytest.approx(exact, abs=1e-14)
    worse = risk_coverage_curve(p, y)
    assert worse.e_aurc == pytest.approx(worse.aurc - exact, abs=1e-14)
    assert worse.e_aurc > 0


def test_other_confidences_rank_as_they_say():
    p, y = problem()
    top = risk_coverage_curve(p, y)
    same = risk_coverage_curve(p, y, confidence=p.amax(dim=1).numpy())
    assert torch.equal(top.risk, same.risk)
    assert risk_coverage_curve(p, y, confidence=-entropy(p)).aurc != top.aurc


def test_risk_and_coverage_at():
    p = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55])
    curve = risk_coverage_curve(p, torch.tensor([1, 1, 0, 1, 0]))
    assert [curve.risk_at(c) for c in (0.01, 0.2, 0.4, 0.5, 0.6, 1)] == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 0.4])
    assert [curve.coverage_at(r) for r in (0, 0.25, 0.3, 0.4, 1)] == [0.4, 0.8, 0.8, 1, 1]
    ten = risk_coverage_curve(torch.linspace(0.6, 0.9, 10), torch.ones(10, dtype=torch.int64))
    assert ten.risk_at(0.7) == 0
    wrong = risk_coverage_curve(torch.tensor([0.9]), torch.tensor([0]))
    assert (wrong.coverage_at(0.5), wrong.aurc, wrong.aurc_trapezoid, wrong.augrc) == (0, 1, 1, 0.5)


@pytest.mark.parametrize("share", [0, -1, 1.1, math.nan])
def test_shares_that_are_none_are_refused(share):
    curve = risk_coverage_curve(*problem(10))
    with pytest.raises(ValueError, match="expected a share"):
        curve.risk_at(share)
    if share != 0:
        with pytest.raises(ValueError, match="expected an error rate"):
            curve.coverage_at(share)


def test_confidences_must_be_one_for_each_example():
    p, y = problem(10)
    with pytest.raises(ValueError, match=r"shape of confidence is \(9,\), expected \(10,\)"):
        risk_coverage_curve(p, y, confidence=torch.ones(9))
    with pytest.raises(ValueError, match=r"confidence\[0\] is nan"):
        risk_coverage_curve(p, y, confidence=torch.full((10,), math.nan))


def test_curves_of_several_models_share_axes():
    curve = risk_coverage_curve(*problem())
    ax = curve.plot(label="MAP")
    assert curve.plot(ax, label="Laplace") is ax
    assert [line.get_ydata().tolist() for line in ax.lines] == [curve.risk.tolist()] * 2
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == [f"{name}, AURC {curve.aurc:.3f}" for name in ("MAP", "Laplace")]
    mpl.pyplot.close(ax.figure)
