"""The committed oracle: values from several libraries on fixed inputs, with the tolerance it states for each."""

import json
import math
from pathlib import Path

import pytest
import torch

from lapkit.calibration import (
    auroc,
    brier,
    entropy,
    event_reliability_curve,
    expected_calibration_error,
    nll_from_logits,
    reliability_curve,
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


def test_nll_at_the_oracle_temperature():
    # 1.449620 minimises the NLL, which is flat to second order there: six digits of it give twelve of the value.
    assert nll_from_logits(LOGITS / 1.449620, Y) == case("nll_after_temperature")


def test_entropy_of_an_ensembles_mean():
    found = entropy(tensor("ens", "probs").mean(dim=0)).tolist()
    assert found == case("predictive_entropy_per_point(nats)")


def test_auroc():
    assert auroc(tensor("ood", "score_id"), tensor("ood", "score_ood")) == case("ood_auroc")


def test_chance_error_of_the_reference():
    # N = 1000 in 15 bins of equal mass at accuracy 0.9 is put at about 0.029.
    correct = (torch.arange(1005) % 10 > 0).long()
    curve = event_reliability_curve(torch.full((1005,), 0.9), correct, binning="equal_mass")
    assert curve.expected_by_chance == pytest.approx(0.029, abs=5e-4)
    assert curve.expected_by_chance == pytest.approx(math.sqrt(2 / math.pi * 0.09 / 67), rel=2e-3)
