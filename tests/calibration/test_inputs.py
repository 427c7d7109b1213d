"""What is accepted, and what is refused with which words."""

import math

import numpy as np
import pytest
import torch

from lapkit.calibration import (
    accuracy,
    adaptive_calibration_error,
    auroc,
    brier,
    brier_decomposition,
    classwise_calibration_error,
    debiased_calibration_error,
    entropy,
    event_reliability_curve,
    expected_calibration_error,
    murphy_decomposition,
    nll,
    nll_from_logits,
    reliability_curve,
    risk_coverage_curve,
    smooth_calibration_error,
    sweep_calibration_error,
    thresholded_adaptive_calibration_error,
    top_k_accuracy,
)

P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]], dtype=torch.float64)
Y = torch.tensor([0, 1, 1])
NAN, INF = math.nan, math.inf
SCORES = {
    "accuracy": accuracy,
    "nll": nll,
    "brier": brier,
    "ece": expected_calibration_error,
    "equal mass": lambda p, y: expected_calibration_error(p, y, bins=2, binning="equal_mass"),
    "chance": lambda p, y: reliability_curve(p, y, bins=2).expected_by_chance,
    "entropy": lambda p, y: entropy(p).sum().item() + 0 * len(y),
    "top 1": lambda p, y: top_k_accuracy(p, y, k=1),
    "classwise": classwise_calibration_error,
    "adaptive": adaptive_calibration_error,
    "thresholded": thresholded_adaptive_calibration_error,
    "debiased": debiased_calibration_error,
    "sweep": sweep_calibration_error,
    "smooth": smooth_calibration_error,
    "CORP": lambda p, y: brier_decomposition(p, y).score,
    "Murphy": lambda p, y: murphy_decomposition(p, y).score,
    "risk": lambda p, y: risk_coverage_curve(p, y).aurc,
}


@pytest.fixture(params=SCORES.values(), ids=SCORES.keys())
def score(request):
    return request.param


def replaced(rows, row, values):
    rows = rows.clone()
    rows[row] = torch.tensor(values, dtype=rows.dtype)
    return rows


BAD_PROBABILITIES = {
    "nan": (replaced(P, 1, [NAN, 0.5, 0.5]), ValueError, r"example 1 contain nan, expected finite"),
    "inf": (replaced(P, 2, [INF, 0.0, 0.0]), ValueError, r"example 2 contain inf, expected finite"),
    "negative": (replaced(P, 1, [-0.2, 0.6, 0.6]), ValueError, r"example 1 contain -0.2, .*logits.softmax"),
    "sum": (replaced(P, 2, [0.5, 0.5, 0.1]), ValueError, r"example 2 sum to 1.1, expected one within 1e-05"),
    "sum, float64": (P * (1 + 1e-4), ValueError, r"expected one within 1e-05"),
    "sum, float32": (P.float() * (1 + 1e-2), ValueError, r"sum to 1.01, expected one within 0.001"),
    "sum, float16": (P.half() * 1.02, ValueError, r"expected one within 0.005"),
    "sum, bfloat16": (P.bfloat16() * 1.1, ValueError, r"expected one within 0.03"),
    "above one": (torch.tensor([0.2, 1.5, 0.3]), ValueError, r"example 1 sum to 1.5, .*1 - p, p"),
    "below zero": (torch.tensor([[0.2], [-0.5], [0.3]]), ValueError, r"example 1 contain -0.5"),
    "one column, nan": (torch.tensor([0.2, NAN, 0.3]), ValueError, r"example 1 contain nan"),
    "integers": (torch.eye(3, dtype=torch.int64), TypeError, r"dtype of probabilities is torch.int64, .*float\(\)"),
    "complex": (torch.eye(3, dtype=torch.complex64), TypeError, r"torch.complex64, expected one of float64"),
    "three axes": (P[None], ValueError, r"shape of probabilities is \(1, 3, 3\), .*reshape\(-1, C\)"),
    "scalar": (torch.tensor(0.5), ValueError, r"shape of probabilities is \(\), expected \(N, C\)"),
    "no examples": (P[:0], ValueError, r"shape of probabilities is \(0, 3\), .*N > 0"),
    "no classes": (P[:, :0], ValueError, r"shape of probabilities is \(3, 0\)"),
}
BAD_LABELS = {
    "too high": (torch.tensor([0, 3, 1]), ValueError, r"labels range from 0 to 3, expected integers from 0 to 2"),
    "negative": (torch.tensor([0, -100, 1]), ValueError, r"labels range from -100 to 1, .*ignored examples"),
    "length": (torch.tensor([0, 1]), ValueError, r"shape of labels is \(2,\), expected \(3,\)"),
    "one-hot": (torch.eye(3, dtype=torch.int64), ValueError, r"shape of labels is \(3, 3\), .*argmax\(dim=1\)"),
    "floating": (Y.double(), TypeError, r"dtype of labels is torch.float64, .*labels.long\(\)"),
    "boolean": (Y.bool(), TypeError, r"dtype of labels is torch.bool"),
}


@pytest.mark.parametrize(("given", "error", "words"), BAD_PROBABILITIES.values(), ids=BAD_PROBABILITIES.keys())
def test_bad_probabilities_are_refused(score, given, error, words):
    with pytest.raises(error, match=words):
        score(given, Y)


@pytest.mark.parametrize(("given", "error", "words"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
@pytest.mark.parametrize(
    "labelled", [accuracy, nll, lambda p, y: nll_from_logits(p.log(), y), brier, expected_calibration_error]
)
def test_bad_labels_are_refused(labelled, given, error, words):
    with pytest.raises(error, match=words):
        labelled(P, given)


@pytest.mark.parametrize("values", [[NAN, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_bad_logits_are_refused(values):
    with pytest.raises(ValueError, match=r"logits of example 1 have a NaN, a \+inf or nothing but -inf"):
        nll_from_logits(replaced(P, 1, values), Y)
    with pytest.raises(TypeError, match=r"dtype of logits is torch.int64"):
        nll_from_logits(P.long(), Y)
    with pytest.raises(ValueError, match=r"shape of logits is \(0, 3\)"):
        nll_from_logits(P[:0], Y[:0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_are_refused_where_logits_are_expected(dtype):
    with pytest.raises(ValueError, match=r"All 3 rows .* these are probabilities, .* probabilities\.log\(\)"):
        nll_from_logits(P.to(dtype), Y)
    assert nll_from_logits(P.log(), Y) == pytest.approx(nll(P, Y), abs=1e-12)
    for fine in (P + 1, P - P[:, :1], P[:1]):  # shifted logits are as good, and one row may be like that by chance
        assert nll_from_logits(fine, Y[: len(fine)]) == pytest.approx(
            float(torch.nn.functional.cross_entropy(fine, Y[: len(fine)])), abs=1e-12
        )


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (torch.tensor([0.1, NAN]), ValueError, r"\w+_distribution\[1\] is nan, expected finite"),
        (torch.tensor([]), ValueError, r"shape of \w+_distribution is \(0,\), expected \(N,\) with N > 0"),
        (torch.tensor([[0.1]]), ValueError, r"shape of \w+_distribution is \(1, 1\), .*reshape\(-1\)"),
        (torch.tensor([1, 2]), TypeError, r"dtype of \w+_distribution is torch.int64"),
    ],
)
def test_bad_scores_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        auroc(given, torch.tensor([0.5]))
    with pytest.raises(error, match=words):
        auroc(torch.tensor([0.5]), given)


@pytest.mark.parametrize(
    ("probabilities", "occurred", "error", "words"),
    [
        (P, Y, ValueError, r"shape of probabilities is \(3, 3\), .*probabilities\[:, k\]"),
        (P[:, :1], Y, ValueError, r"shape of probabilities is \(3, 1\)"),
        (P[:, 0], torch.tensor([0, 1, 2]), ValueError, r"occurred range from 0 to 2, expected integers from 0 to 1"),
        (P[:, 0], Y.double(), TypeError, r"dtype of occurred is torch.float64"),
        (P[:, 0], Y[:2], ValueError, r"shape of occurred is \(2,\), expected \(3,\)"),
        (P[:, 0] + 1, Y, ValueError, r"example 0 sum to 1.7"),
    ],
)
def test_bad_events_are_refused(probabilities, occurred, error, words):
    with pytest.raises(error, match=words):
        event_reliability_curve(probabilities, occurred)


@pytest.mark.parametrize("door", [reliability_curve, event_reliability_curve, expected_calibration_error])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bins": 0}, ValueError, r"bins is 0, expected at least 1"),
        ({"bins": 2.0}, TypeError, r"bins is 2\.0, expected a number of bins"),
        ({"bins": True}, TypeError, "bins is True"),
        ({"bins": [0.0, 0.5, 1.0]}, TypeError, r"bins is \[0\.0, 0\.5, 1\.0\]"),
        ({"binning": "uniform"}, ValueError, "binning is 'uniform', expected one of 'equal_width', 'equal_mass'"),
    ],
)
def test_bad_bins_are_refused(door, options, error, words):
    with pytest.raises(error, match=words):
        door(P[:, 0], torch.tensor([0, 1, 1]), **options)


def test_sums_within_the_tolerance_of_the_dtype_pass():
    assert accuracy(P * (1 + 5e-6), Y) == accuracy(P.float() * (1 + 5e-4), Y) == accuracy(P, Y)
    assert accuracy(P.half(), Y) == accuracy(P.bfloat16(), Y) == accuracy(P, Y)
    assert accuracy(torch.tensor([1 + 1e-6, 0.2]), torch.tensor([1, 0])) == 1


@pytest.mark.parametrize("width", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_every_integer_dtype_labels(score, width):
    assert score(P, Y.to(width)) == score(P, Y)


def test_numpy_arrays_are_accepted(score):
    frozen = P.numpy().copy()
    frozen.flags.writeable = False
    assert score(frozen, Y.numpy()) == score(P, Y)
    assert score(P.float().numpy(), Y.numpy().astype(np.int32)) == pytest.approx(score(P, Y), abs=1e-7)


def test_one_column_is_the_probability_of_the_positive_class(score):
    positive, labels = torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64), torch.tensor([1, 1, 0])
    both = torch.stack((1 - positive, positive), dim=1)
    assert score(positive, labels) == score(positive[:, None], labels) == score(both, labels)


def test_one_column_of_logits_is_the_log_odds():
    log_odds, labels = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64), torch.tensor([1, 1, 0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, labels.double()).item()
    assert nll_from_logits(log_odds, labels) == pytest.approx(expected, abs=1e-14)
    assert nll_from_logits(log_odds[:, None], labels) == pytest.approx(expected, abs=1e-14)


def test_gradients_are_cut_and_inputs_left_alone(score):
    leaf = P.clone().requires_grad_()
    before = leaf.detach().clone()
    assert score(leaf * 1.0, Y) == score(P, Y)
    assert torch.equal(leaf, before)
    assert not entropy(leaf).requires_grad
    curve = reliability_curve(leaf, Y)
    assert not curve.confidence.requires_grad
    assert nll_from_logits(leaf.log(), Y) == nll_from_logits(P.log(), Y)


def test_results_are_python_floats(score):
    assert type(score(P.float(), Y)) is float
    assert type(nll_from_logits(P.log(), Y)) is float
    assert type(auroc(P[0], P[1])) is float


def test_float32_is_computed_in_float64():
    p = P.repeat(1000, 1).float()
    y = Y.repeat(1000)
    assert nll(p, y) == nll(p.double(), y)
    assert brier(p, y) == brier(p.double(), y)
    curve = reliability_curve(p, y)
    assert curve.edges.dtype == curve.confidence.dtype == curve.accuracy.dtype == torch.float64
    assert curve.count.dtype == torch.int64
    assert curve.ece == reliability_curve(p.double(), y).ece
    assert entropy(p).dtype == torch.float64


@pytest.mark.gpu
def test_a_gpu_gives_the_same(score):
    assert score(P.cuda(), Y) == pytest.approx(score(P, Y), abs=1e-14)
    assert reliability_curve(P.cuda(), Y.cuda(), binning="equal_mass").edges.is_cuda
    assert entropy(P.cuda()).is_cuda
