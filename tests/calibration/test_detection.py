"""AUROC and entropy against scikit-learn, scipy and by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lapkit.calibration import Ranked, aupr, auroc, entropy, flagged, fpr_at_tpr, ranked_auroc
from lapkit.calibration.detection import AveragePrecision, FalsePositiveRate


def pairs(inside, outside):
    """The area as the share of pairs in the right order, ties for one half."""
    difference = outside[:, None] - inside[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "ties"])
def test_auroc_agrees_with_the_pairs_and_with_scikit_learn(rounded):
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(70, generator=generator, dtype=torch.float64)
    outside = torch.randn(50, generator=generator, dtype=torch.float64) + 1
    if rounded:
        inside, outside = inside.round(), outside.round()
    assert auroc(inside, outside) == pytest.approx(pairs(inside, outside), abs=1e-12)
    expected = roc_auc_score(np.r_[np.zeros(70), np.ones(50)], np.r_[inside.numpy(), outside.numpy()])
    assert auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-12)


def test_auroc_extremes():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 0.5])
    assert auroc(low, high) == 1
    assert auroc(high, low) == 0
    assert auroc(low, low) == 0.5
    assert auroc(torch.full((3,), 0.7), torch.full((2,), 0.7)) == 0.5


def test_auroc_takes_numpy_and_gradients():
    low, high = np.array([0.1, 0.4], dtype=np.float32), torch.tensor([0.3, 0.5], requires_grad=True)
    assert auroc(low, high) == 0.75


def test_entropy_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(100, 6, generator=generator, dtype=torch.float64)).softmax(dim=1)
    np.testing.assert_allclose(entropy(p).numpy(), stats.entropy(p.numpy(), axis=1), rtol=0, atol=1e-13)


def test_entropy_extremes():
    p = torch.cat((torch.eye(4), torch.full((1, 4), 0.25)))
    assert entropy(p).tolist() == pytest.approx([0, 0, 0, 0, math.log(4)], abs=1e-15)
    assert entropy(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, math.log(2), 0], abs=1e-15)


def scores(rounded, inside=70, outside=50):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(inside, generator=generator, dtype=torch.float64)
    high = torch.randn(outside, generator=generator, dtype=torch.float64) + 1
    return (low.round(), high.round()) if rounded else (low, high)


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "ties"])
def test_aupr_agrees_with_scikit_learn_both_ways(rounded):
    low, high = scores(rounded)
    is_out, both = np.r_[np.zeros(70), np.ones(50)], np.r_[low.numpy(), high.numpy()]
    assert aupr(low, high) == pytest.approx(average_precision_score(is_out, both), abs=1e-12)
    assert aupr(low, high, positive="in") == pytest.approx(average_precision_score(1 - is_out, -both), abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "ties"])
@pytest.mark.parametrize("sizes", [(70, 50), (20, 180), (1, 1)])
@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
def test_fpr_is_the_lowest_that_finds_enough(rounded, sizes, tpr):
    low, high = scores(rounded, *sizes)
    is_out, both = np.r_[np.zeros(sizes[0]), np.ones(sizes[1])], np.r_[low.numpy(), high.numpy()]
    for positive, flags, values in (("out", is_out, both), ("in", 1 - is_out, -both)):
        false, true, _ = roc_curve(flags, values, drop_intermediate=False)
        assert fpr_at_tpr(low, high, tpr=tpr, positive=positive) == pytest.approx(false[true >= tpr - 1e-12].min())


@pytest.mark.parametrize("count", [20, 40, 60, 140, 180, 1000])
def test_a_rate_of_whole_examples_is_not_rounded_up(count):
    # 95 % of them above 0.5 exactly, so that the threshold lies there and not at the next lower score.
    found = (count * 95) // 100
    outside = torch.cat((torch.full((found,), 1.0), torch.zeros(count - found)))
    assert fpr_at_tpr(torch.zeros(3), outside, positive="out") == 0
    assert fpr_at_tpr(1 - torch.zeros(3) - 0.5, outside, positive="out") == 0


def test_a_rate_that_rounding_makes_too_large_is_not_rounded_up():
    assert 0.55 * 100 > 55
    outside = torch.cat((torch.ones(55), torch.zeros(45)))
    assert fpr_at_tpr(torch.full((3,), 0.5), outside, tpr=0.55, positive="out") == 0


def test_detection_extremes():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 0.5])
    for positive in ("in", "out"):
        assert fpr_at_tpr(low, high, positive=positive) == 0
        assert fpr_at_tpr(high, low, positive=positive) == 1
        assert aupr(low, high, positive=positive) == 1
    alike = torch.full((3,), 0.7), torch.full((2,), 0.7)
    assert fpr_at_tpr(*alike) == fpr_at_tpr(*alike, positive="out") == 1
    assert (aupr(*alike), aupr(*alike, positive="in")) == (pytest.approx(0.4), pytest.approx(0.6))


def test_detection_refuses():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    for function in (aupr, fpr_at_tpr):
        with pytest.raises(ValueError, match=r"positive is 'ood', expected 'out' or 'in'"):
            function(low, high, positive="ood")
        with pytest.raises(ValueError, match=r"out_of_distribution\[0\] is nan"):
            function(low, high * math.nan)
        with pytest.raises(ValueError, match=r"shape of in_distribution is \(0,\)"):
            function(low[:0], high)
    for tpr in (0, -1, 1.1, 95, math.nan):
        with pytest.raises(ValueError, match=r"tpr is .*, expected a share in \(0, 1\]"):
            fpr_at_tpr(low, high, tpr=tpr)


@pytest.mark.parametrize("statistic", [ranked_auroc, AveragePrecision(), FalsePositiveRate()])
def test_flags_of_one_kind_or_none_are_refused(statistic):
    metric, values = Ranked(statistic, flagged), torch.tensor([0.1, 0.2, 0.3])
    for kind, flag in (("inside", False), ("outside", True)):
        with pytest.raises(ValueError, match=f"All examples are from {kind}, expected some from inside and some"):
            metric(values, torch.full((3,), flag))
    with pytest.raises(TypeError, match=r"dtype of outside is torch.float64, expected booleans"):
        metric(values, values)
    with pytest.raises(ValueError, match=r"shape of outside is \(2,\), expected \(3,\)"):
        metric(values, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"outside range from -1 to 1, expected booleans"):
        metric(values, torch.tensor([-1, 0, 1]))
