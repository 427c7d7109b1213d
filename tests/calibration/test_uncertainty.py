"""The parts of uncertainty by loops over samples and pairs of them, and beside lapkit.posteriors."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from scipy.stats import entropy as scipy_entropy

from lapkit.calibration import (
    disagreement_with_mean,
    entropy,
    entropy_split,
    expected_pairwise_kl,
    variance_split,
    variation_ratio,
)
from lapkit.posteriors.information import uncertainty_of_samples

ALL = [entropy_split, variance_split, expected_pairwise_kl, disagreement_with_mean, variation_ratio]


def samples(count=6, examples=20, classes=4, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(count, examples, classes, generator=generator, dtype=torch.float64)).softmax(dim=-1)


def test_entropies_agree_with_scipy():
    p = samples()
    split = entropy_split(p)
    total = scipy_entropy(p.mean(dim=0).numpy(), axis=1)
    aleatoric = scipy_entropy(p.numpy(), axis=2).mean(axis=0)
    np.testing.assert_allclose(split.total.numpy(), total, rtol=0, atol=1e-13)
    np.testing.assert_allclose(split.aleatoric.numpy(), aleatoric, rtol=0, atol=1e-13)
    np.testing.assert_allclose(split.epistemic.numpy(), total - aleatoric, rtol=0, atol=1e-13)
    torch.testing.assert_close(split.total, entropy(p.mean(dim=0)))


def test_posteriors_split_the_same_samples_alike():
    p = samples()
    ours, theirs = entropy_split(p), uncertainty_of_samples(p.log())
    torch.testing.assert_close(ours.aleatoric, theirs.aleatoric, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.epistemic, theirs.epistemic, rtol=0, atol=1e-13)


def test_small_epistemic_parts_keep_their_digits():
    p = torch.tensor([[[0.5 + 1e-6, 0.5 - 1e-6]], [[0.5 - 1e-6, 0.5 + 1e-6]]], dtype=torch.float64)
    assert entropy_split(p).epistemic.item() == pytest.approx(2e-12, rel=1e-3)


def test_variances_are_those_of_one_hot_labels():
    p = samples()
    split, mean = variance_split(p), p.mean(dim=0)
    torch.testing.assert_close(split.total, (mean * (1 - mean)).sum(dim=1))
    np.testing.assert_allclose(split.epistemic.numpy(), p.numpy().var(axis=0).sum(axis=1), rtol=0, atol=1e-13)


def test_pairwise_divergence_is_the_mean_over_pairs():
    p = samples().numpy()
    pairs = [rel_entr(p[s], p[t]).sum(axis=1) for s in range(6) for t in range(6)]
    np.testing.assert_allclose(expected_pairwise_kl(samples()).numpy(), np.mean(pairs, axis=0), rtol=0, atol=1e-12)


def test_impossible_classes():
    one, other = [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]
    both = torch.tensor([[one, one], [other, [0.25, 0.5, 0.25]]], dtype=torch.float64)
    found = expected_pairwise_kl(both)
    expected = (rel_entr(one, other).sum() + rel_entr(other, one).sum()) / 4
    assert found.tolist() == [pytest.approx(expected, abs=1e-14), math.inf]
    assert entropy_split(both).total.isfinite().all()


def test_votes():
    votes = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.1, 0.9], [0.0, 0.1, 0.9], [0.0, 0.5, 0.5]])
    p = votes[:, None].double()
    # Two samples vote for 0, two for 2 and one for 1 (the first of equals); the mean is for 2.
    assert variation_ratio(p).item() == pytest.approx(0.6)
    assert disagreement_with_mean(p).item() == pytest.approx(0.6)
    close = torch.tensor([[[0.4, 0.3, 0.3]], [[0.4, 0.6, 0.0]], [[0.4, 0.0, 0.6]]], dtype=torch.float64)
    assert variation_ratio(close).item() == pytest.approx(2 / 3)
    assert disagreement_with_mean(close).item() == pytest.approx(2 / 3)
    p = samples(classes=10)
    loop = [1 - np.bincount(column).max() / 6 for column in p.argmax(dim=-1).T.numpy()]
    np.testing.assert_allclose(variation_ratio(p).numpy(), loop, rtol=0, atol=1e-14)
    about_mean = (p.argmax(dim=-1) != p.mean(dim=0).argmax(dim=-1)).double().mean(dim=0)
    torch.testing.assert_close(disagreement_with_mean(p), about_mean)
    assert (disagreement_with_mean(p) >= variation_ratio(p) - 1e-14).all()
    assert (disagreement_with_mean(p) > variation_ratio(p) + 0.1).any()


def test_one_sample_or_equal_samples_know_nothing_of_each_other():
    p = samples(1).expand(3, -1, -1)
    for given in (p, p[:1]):
        assert entropy_split(given).epistemic.max() == pytest.approx(0, abs=1e-15)
        assert variance_split(given).epistemic.max() == pytest.approx(0, abs=1e-15)
        assert expected_pairwise_kl(given).max() == pytest.approx(0, abs=1e-14)
        assert variation_ratio(given).max() == disagreement_with_mean(given).max() == 0


@pytest.mark.parametrize("function", ALL)
def test_what_is_no_sample_is_refused(function):
    p = samples()
    for shape in [p[0], p[None], p[..., :1]]:
        with pytest.raises(ValueError, match=r"expected \(S, N, C\)"):
            function(shape)
    for bad in (p * 2, p - 0.5, p.where(p > 0.01, torch.nan)):
        with pytest.raises(ValueError, match="expected"):
            function(bad)
    for empty in (p[:0], p[:, :0]):
        with pytest.raises(ValueError, match="N > 0"):
            function(empty)
    with pytest.raises(TypeError, match=r"dtype of probabilities is torch.int64"):
        function(torch.ones(2, 3, 2, dtype=torch.int64))
