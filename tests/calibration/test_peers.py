"""Other libraries agree where their definitions do; where they do not, the difference is what is said of them."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from lapkit.calibration import (
    accuracy,
    auroc,
    brier,
    classwise_reliability_curves,
    event_reliability_curve,
    expected_calibration_error,
    nll,
    reliability_curve,
    top_k_accuracy,
)


def problem(count=2000, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return p, torch.multinomial(p**0.7, 1, generator=generator).squeeze(1)


@pytest.mark.peer("torchmetrics")
@pytest.mark.parametrize("bins", [5, 15, 50])
@pytest.mark.parametrize("classes", [2, 5])
def test_torchmetrics_calibration_errors(bins, classes):
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    p, y = problem(classes=classes)
    curve = reliability_curve(p, y, bins=bins)
    for norm, ours in {"l1": curve.ece, "l2": curve.rmsce, "max": curve.mce}.items():
        theirs = multiclass_calibration_error(p, y, num_classes=classes, n_bins=bins, norm=norm)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)  # it bins in float32
    # Of one column it judges the event, not the more probable of the two classes.
    first = p[:, 0].contiguous()
    event = event_reliability_curve(first, y == 0, bins=bins)
    theirs = binary_calibration_error(first, (y == 0).long(), n_bins=bins, norm="l1")
    assert event.ece == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.peer("torchmetrics")
def test_torchmetrics_scores():
    from torchmetrics.functional import classification

    p, y = problem()
    for k in (1, 2, 4):
        theirs = classification.multiclass_accuracy(p, y, num_classes=5, top_k=k, average="micro").item()
        assert top_k_accuracy(p, y, k=k) == pytest.approx(theirs, abs=1e-6)
    outside = torch.arange(2000) % 3 == 0
    score = p.amax(dim=1)
    theirs = classification.binary_auroc(score, outside.long()).item()
    assert auroc(score[~outside], score[outside]) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.peer("netcal")
@pytest.mark.parametrize("bins", [5, 10, 15])
def test_netcal_calibration_errors(bins):
    from netcal.metrics import ACE, ECE, MCE

    p, y = problem()
    curve = reliability_curve(p, y, bins=bins)
    table, labels = p.numpy(), y.numpy()
    assert curve.ece == pytest.approx(ECE(bins).measure(table, labels), abs=1e-12)
    assert curve.mce == pytest.approx(MCE(bins).measure(table, labels), abs=1e-12)
    # Its ACE is the average, not the adaptive error.
    assert curve.average_calibration_error == pytest.approx(ACE(bins).measure(table, labels), abs=1e-12)


@pytest.mark.peer("netcal")
def test_netcal_opens_its_bins_on_the_right():
    from netcal.metrics import ECE

    p, y = torch.arange(9) / 8, (torch.arange(9) % 3 == 0).long()
    left, right = event_reliability_curve(p, y, bins=8).ece, ECE(8).measure(p.numpy(), y.numpy())
    turned = event_reliability_curve(1 - p, 1 - y, bins=8).ece
    assert right == pytest.approx(turned, abs=1e-12)
    assert abs(left - right) > 1e-3


@pytest.mark.parametrize(("strategy", "binning"), [("uniform", "equal_width"), ("quantile", "equal_mass")])
def test_scikit_learn_curves(strategy, binning):
    p, y = problem(classes=2, count=2000)
    curve = event_reliability_curve(p[:, 1], y, bins=10, binning=binning)
    accuracies, confidences = calibration_curve(y.numpy(), p[:, 1].numpy(), n_bins=10, strategy=strategy)
    # Its quantiles lie between two examples, as the ends of our bins of 200 do.
    np.testing.assert_allclose(curve.accuracy.numpy(), accuracies, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.confidence.numpy(), confidences, rtol=0, atol=1e-12)


@pytest.mark.peer("laplace")
def test_torchmetrics_by_way_of_laplace_torch_streams_alike():
    from laplace.utils.metrics import RunningNLLMetric

    p, y = problem()
    running = RunningNLLMetric()
    for start in range(0, 2000, 300):
        running.update(p[start : start + 300], y[start : start + 300])
    assert nll(p, y) == pytest.approx(running.compute().item(), abs=1e-6)


def test_the_same_problem_by_all_our_ways():
    p, y = problem(classes=2)
    assert expected_calibration_error(p, y) == pytest.approx(expected_calibration_error(p[:, 1], y), abs=1e-12)
    assert brier(p, y) == pytest.approx(brier(p[:, 1], y), abs=1e-12)
    assert accuracy(p, y) == accuracy(p[:, 1], y)
    first, second = classwise_reliability_curves(p, y)
    assert first.ece == pytest.approx(second.ece, abs=1e-9)
