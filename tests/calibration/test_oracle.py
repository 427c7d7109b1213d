"""The committed oracle: values from several libraries on fixed inputs, with the tolerance it states for each."""

import json
import math
from pathlib import Path

import pytest
import torch

from lapkit.calibration import (
    SmoothCalibrationError,
    aupr,
    auroc,
    brier,
    classwise_calibration_error,
    debiased_classwise_calibration_error,
    disagreement_with_mean,
    entropy,
    entropy_split,
    event,
    event_reliability_curve,
    event_score_decomposition,
    expected_calibration_error,
    expected_pairwise_kl,
    fpr_at_tpr,
    nll_from_logits,
    reliability_curve,
    risk_coverage_curve,
    smooth_calibration_error,
)

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "calibration.json").read_text())


def tensor(group, key):
    values = torch.tensor(ORACLE["inputs"][group][key])
    return values.double() if values.is_floating_point() else values


def case(metric, **arguments):
    found = [c for c in ORACLE["cases"] if c["metric"] == metric and c["args"] == arguments]
    assert len(found) == 1, (metric, arguments)
    return pytest.approx(found[0]["value"], rel=0, abs=found[0]["tol"])


LOGITS, Y = tensor("multi", "logits"), tensor("multi", "y")
MULTI = LOGITS.softmax(dim=1)


@pytest.mark.parametrize("bins", [10, 15])
def test_top_label_calibration_errors(bins):
    assert expected_calibration_error(MULTI, Y, bins=bins) == case("ece_top_label_equal_width", bins=bins)
    assert reliability_curve(MULTI, Y, bins=bins).rmsce == case("rmsce_top_label(l2)", bins=bins)
    equal_mass = expected_calibration_error(MULTI, Y, bins=bins, binning="equal_mass")
    assert equal_mass == case("ece_top_label_equal_mass", bins=bins)


def test_classwise_error_is_the_mean_over_the_events_of_each_class():
    curves = [event_reliability_curve(MULTI[:, k], k == Y, bins=10) for k in range(4)]
    assert sum(curve.ece for curve in curves) / 4 == case("classwise_ece_l1_mean", bins=10)
    assert classwise_calibration_error(MULTI, Y, bins=10) == case("classwise_ece_l1_mean", bins=10)


def test_debiased_classwise_error():
    # Three of the four classes are cut off at zero.
    found = debiased_classwise_calibration_error(MULTI, Y, bins=10, binning="equal_mass")
    assert found == case("classwise_l2_debiased_equal_mass", bins=10)


def test_smooth_error():
    # The tolerance is for libraries on a coarse grid; the fixed point itself is given to all digits.
    automatic = {"kernel": "reflected gaussian", "sigma": "fixed point smECE_sigma=sigma"}
    found = smooth_calibration_error(MULTI, Y)
    assert found == case("smooth_ece_auto_sigma", **automatic)
    assert found == pytest.approx(0.08457013448969519, abs=1e-7)
    assert smooth_calibration_error(MULTI, Y, sigma=0.05) == case("smooth_ece_sigma_0.05", sigma=0.05)


def test_smooth_error_on_the_scale_of_log_odds():
    """The oracle's number is a library's sum at 200 points of the probability; refined, that sum ends where ours is.

    The library's own sum gives 0.0986, 0.1030, 0.1033, 0.1033 at 200, 500, 1,000 and 50,000 points.
    """
    p, y = tensor("binary", "p"), tensor("binary", "y")
    found = SmoothCalibrationError(pairs=event, kernel="log_odds")(p, y)
    oracle = case("smooth_ece_auto_logit_kernel", kernel="logit gaussian")
    cut = p.clamp(1e-3, 1 - 1e-3).logit()

    def summed(at, weights, sigma):
        kernel = (-((at.logit()[:, None] - cut) ** 2) / (2 * (4 * sigma) ** 2)).exp()
        return float(((kernel @ (p - y)).abs() * weights).sum() / ((kernel.sum(1) * weights).sum()))

    t = torch.linspace(0, 1, 200)[1:-1]
    twice = torch.ones(198).index_fill(0, torch.tensor([0, 197]), 2.0)  # the library pads with the outermost points
    assert summed(t, twice / (t * (1 - t)), 0.0985452388783558) == oracle
    odds = torch.linspace(-30, 30, 60001)
    assert summed(odds.sigmoid(), torch.ones(()), found) == pytest.approx(found, abs=1e-5)


def test_values_on_edges_fall_to_the_left():
    curve = event_reliability_curve(tensor("edges", "p"), tensor("edges", "y"), bins=10)
    assert curve.ece == case("ece_edges", bins=10)
    assert curve.count.tolist() == [4, 1, 1, 0, 3, 1, 1, 1, 2, 2]


def test_brier():
    assert brier(MULTI, Y) == case("brier_multiclass(sum over classes)")
    p, y = tensor("binary", "p"), tensor("binary", "y")
    assert brier(p, y) == case("brier_binary_two_column_sum")
    miscalibration, discrimination, uncertainty = next(
        c["value"] for c in ORACLE["cases"] if c["metric"].startswith("brier_CORP")
    )
    # The decomposition is of the one-column score, half of the sum over both columns.
    assert brier(p, y) / 2 == pytest.approx(miscalibration - discrimination + uncertainty, abs=1e-12)
    found = event_score_decomposition(p, y)
    assert [found.miscalibration, found.discrimination, found.uncertainty] == case(
        "brier_CORP_decomposition[MCB,DSC,UNC]"
    )


def test_nll_at_the_oracle_temperature():
    # 1.449620 minimises the NLL, which is flat to second order there: six digits of it give twelve of the value.
    assert nll_from_logits(LOGITS / 1.449620, Y) == case("nll_after_temperature")


def test_entropy_of_an_ensembles_mean():
    found = entropy(tensor("ens", "probs").mean(dim=0)).tolist()
    assert found == case("predictive_entropy_per_point(nats)")


def test_epistemic_uncertainty_of_an_ensemble():
    samples = tensor("ens", "probs")
    assert entropy_split(samples).total.tolist() == case("predictive_entropy_per_point(nats)")
    assert expected_pairwise_kl(samples).tolist() == case("expected_pairwise_KL_per_point")
    assert disagreement_with_mean(samples).mean().item() == case("variation_ratio_vs_argmax_of_mean")


def test_detection():
    scores = tensor("ood", "score_id"), tensor("ood", "score_ood")
    assert auroc(*scores) == case("ood_auroc")
    assert aupr(*scores, positive="in") == case("ood_aupr_positive=ID")
    assert fpr_at_tpr(*scores) == case("ood_fpr95_positive=ID(OOD literature: ID kept at 95%)")
    assert fpr_at_tpr(*scores, positive="out") == pytest.approx(0.56, abs=5e-3)


def test_selective_prediction():
    curve = risk_coverage_curve(MULTI, Y)
    assert curve.aurc_trapezoid == case("aurc_trapezoid_normalised(torch_uncertainty)")
    assert curve.aurc == pytest.approx(0.200200, abs=1e-6)
    assert curve.augrc_trapezoid == case("augrc_trapezoid_normalised")
    assert curve.risk_at(0.8) == case("risk_at_80pct_coverage")


def test_chance_error_of_the_reference():
    # N = 1000 in 15 bins of equal mass at accuracy 0.9 is put at about 0.029.
    correct = (torch.arange(1005) % 10 > 0).long()
    curve = event_reliability_curve(torch.linspace(0.8, 1.0, 1005), correct, binning="equal_mass")
    assert curve.expected_by_chance == pytest.approx(0.029, abs=5e-4)
    assert curve.expected_by_chance == pytest.approx(math.sqrt(2 / math.pi * 0.09 / 67), rel=2e-3)
