"""AUROC and entropy against scikit-learn, scipy and by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from lapkit.calibration import auroc, entropy


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
