"""Targets as users have them, and likelihoods as they should not be."""

import pytest
import torch
from likelihood_cases import NOISES

from lapkit.curvature import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, PerOutputGaussian, Poisson

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)

F3, F1 = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
F4 = torch.zeros(4, 4, dtype=torch.float64)
F63, F61 = torch.zeros(4, 6, 3, dtype=torch.float64), torch.zeros(4, 6, 1, dtype=torch.float64)
NAN = torch.tensor([0.0, 1.0, float("nan"), 0.0], dtype=torch.float64)
BAD = {
    "float labels": (Categorical(), F3, torch.zeros(4), TypeError, r"integer type, got torch.float32.*\.long\(\)"),
    "boolean labels": (Categorical(), F3, torch.zeros(4).bool(), TypeError, "integer type"),
    "label too high": (Categorical(), F3, torch.tensor([0, 1, 2, 3]), ValueError, "between 0 and 3.*3 outputs"),
    "negative label": (Categorical(), F3, torch.tensor([0, 1, -1, 2]), ValueError, "between -1 and 2"),
    "missing label by another index": (
        Categorical(ignore_index=-1),
        F3,
        torch.tensor([0, 1, -100, 2]),
        ValueError,
        "between -100 and 2.*be -1 where missing",
    ),
    "labels of too few positions": (Categorical(), F63, torch.zeros(4, 5).long(), ValueError, r"shape \(4, 6\), got"),
    "one-hot pixels": (Categorical(), F63, torch.zeros(4, 3, 2, 3).long(), ValueError, "argmax"),
    "weights of other classes": (
        Categorical(class_weights=WEIGHTS),
        F3,
        torch.zeros(4).long(),
        ValueError,
        "4 weights",
    ),
    "weights of other answers": (Bernoulli(pos_weight=WEIGHTS), F3, torch.zeros(4, 3), ValueError, "4 weights for 3"),
    "missing answers by another value": (
        Bernoulli(missing=-1),
        F1,
        torch.tensor([-2.0, 1, 1, 1]),
        ValueError,
        "0 or 1, or -1 where missing, got values between -2 and 1",
    ),
    "missing answers by NaN": (Bernoulli(missing=-1), F1, NAN, ValueError, "NaN"),
    "gaussian positions": (Gaussian(), F63, torch.zeros(4, 3, 6), ValueError, r"\(4, 6, 3\).*model's own.*\(4, 3, 6\)"),
    "gaussian pixels": (Gaussian(), F63, torch.zeros(4, 3, 2, 2), ValueError, r"got \(4, 3, 2, 2\)"),
    "noise of other outputs": (PerOutputGaussian(NOISES), F4, torch.zeros(4, 4), ValueError, "3 noises for 4 outputs"),
    "odd outputs": (HeteroscedasticGaussian(), F3, torch.zeros(4, 1), ValueError, "even number of outputs, got 3"),
    "heteroscedastic shape": (HeteroscedasticGaussian(), F4, torch.zeros(4, 4), ValueError, r"\(4, 2\) like"),
    "negative counts": (Poisson(), F1, torch.tensor([0, 2, -1, 1]), ValueError, "counts.*between -1 and 2"),
    "fractions": (Poisson(), F1, torch.tensor([0, 2, 0.5, 1]), ValueError, "counts"),
    "NaN counts": (Poisson(), F1, NAN, ValueError, "NaN"),
    "one-hot labels": (Categorical(), F3, torch.eye(4, 3).long(), ValueError, r"shape \(4,\).*argmax"),
    "too few labels": (Categorical(), F3, torch.zeros(3).long(), ValueError, r"\(3,\) targets for outputs \(4, 3\)"),
    "a single label": (Categorical(), F3, torch.tensor(1), ValueError, "one target an example"),
    "one logit": (Categorical(), F1, torch.zeros(4).long(), ValueError, "Bernoulli"),
    "bernoulli shape": (Bernoulli(), F3, torch.zeros(4), ValueError, r"shape \(4, 3\)"),
    "bernoulli too few": (Bernoulli(), F1, torch.zeros(5), ValueError, r"\(5,\) targets"),
    "bernoulli values": (Bernoulli(), F1, torch.tensor([0.0, 1, 2, 1]), ValueError, "0 or 1.*between 0 and 2"),
    "bernoulli minus one": (Bernoulli(), F1, torch.tensor([-1, 1, 1, 1]), ValueError, "between -1 and 1"),
    "bernoulli NaN": (Bernoulli(), F1, NAN, ValueError, "NaN"),
    "gaussian shape": (Gaussian(), F3, torch.zeros(4, 2), ValueError, r"shape \(4, 3\).*got \(4, 2\)"),
    "gaussian vector for three": (Gaussian(), F3, torch.zeros(4), ValueError, r"shape \(4, 3\)"),
    "gaussian transposed": (Gaussian(), F1, torch.zeros(1, 4), ValueError, r"\(1, 4\) targets"),
    "gaussian NaN": (Gaussian(), F1, NAN, ValueError, "NaN"),
    "gaussian infinite": (Gaussian(), F1, NAN.nan_to_num(float("inf")), ValueError, "infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_do_not_fit(case):
    likelihood, f, y, error, words = BAD[case]
    with pytest.raises(error, match=words):
        likelihood.check(f, y)


INTEGERS = torch.tensor([0, 2, 1, 0])
GOOD = {
    "indices": (Categorical(), F3, INTEGERS, INTEGERS),
    "a column of indices": (Categorical(), F3, INTEGERS[:, None], INTEGERS),
    "short indices": (Categorical(), F3, INTEGERS.to(torch.uint8), INTEGERS),
    "boolean answers": (Bernoulli(), F1, torch.tensor([True, False, True, True]), torch.tensor([[1.0], [0], [1], [1]])),
    "integer answers": (Bernoulli(), F3, torch.eye(4, 3).long(), torch.eye(4, 3)),
    "integer numbers": (Gaussian(), F1, INTEGERS, torch.tensor([[0.0], [2], [1], [0]])),
    "single precision": (Gaussian(), F3, torch.eye(4, 3), torch.eye(4, 3)),
}


@pytest.mark.parametrize("case", GOOD)
def test_targets_are_converted(case):
    likelihood, f, y, expected = GOOD[case]
    checked = likelihood.check(f, y)
    assert checked.dtype == (torch.long if isinstance(likelihood, Categorical) else f.dtype)
    assert torch.equal(checked.double(), expected.double())
    assert likelihood.loss(f, checked).shape == f.shape[:1]


PIXELS = torch.arange(72.0).reshape(4, 3, 2, 3)  # (N, C, H, W)
FLAT = PIXELS.permute(0, 2, 3, 1).reshape(4, 6, 3).double()  # (N, T, C)
LABELS = torch.arange(24).reshape(4, 2, 3) % 3
SQUARE = torch.arange(36.0).reshape(4, 3, 3)

PLACED = {
    "pixel labels": (Categorical(), F63, LABELS, None, LABELS.reshape(4, 6)),
    "pixel labels with an axis": (Categorical(), F63, LABELS[:, None], 1, LABELS.reshape(4, 6)),
    "word labels": (Categorical(), F63, LABELS.reshape(4, 6), None, LABELS.reshape(4, 6)),
    "an image": (Gaussian(), F63, PIXELS, None, FLAT),
    "an image, axis said": (Gaussian(), F63, PIXELS, 1, FLAT),
    "an image, axis from the end": (Gaussian(), F63, PIXELS, -3, FLAT),
    "channels last": (Gaussian(), F63, PIXELS.permute(0, 2, 3, 1), -1, FLAT),
    "a sequence": (Gaussian(), F63, FLAT, None, FLAT),
    "channels before time": (Gaussian(), F63, FLAT.mT, 1, FLAT),
    "a square sequence": (Gaussian(), F63[:, :3], SQUARE, None, SQUARE),
    "a square signal": (Gaussian(), F63[:, :3], SQUARE, 1, SQUARE.mT),
    "one channel": (Gaussian(), F61, PIXELS[:, :1], None, FLAT[..., :1]),
    "one channel, not said": (Gaussian(), F61, PIXELS[:, 0], None, FLAT[..., :1]),
    "answers": (Bernoulli(), F63, PIXELS % 2, None, FLAT % 2),
    "counts": (Poisson(), F63, PIXELS.long(), None, FLAT),
    "noise for each channel": (PerOutputGaussian(NOISES), F63, PIXELS, None, FLAT),
    "heteroscedastic": (HeteroscedasticGaussian(), torch.cat([F63, F63], -1), PIXELS, None, FLAT),
}


@pytest.mark.parametrize("case", PLACED)
def test_targets_of_positions_are_placed_like_the_outputs(case):
    likelihood, f, y, axis, expected = PLACED[case]
    checked = likelihood.check(f, y, axis)
    assert torch.equal(checked.double(), expected.double())
    assert likelihood.loss(f, checked).shape == (4,)


@pytest.mark.parametrize("noise", [[], [1.0, 0.0], [1.0, float("nan")], [[1.0]], 2.0])
def test_noises_must_be_a_positive_vector(noise):
    with pytest.raises(ValueError, match="positive noises, one for each output"):
        PerOutputGaussian(torch.tensor(noise))


def test_a_scale_must_be_a_positive_number():
    with pytest.raises(ValueError, match="must be one positive number"):
        PerOutputGaussian(NOISES, scale=0.0)


@pytest.mark.parametrize("weights", [torch.tensor([1.0, -1.0]), torch.tensor([[1.0]]), torch.tensor([float("nan")])])
def test_weights_must_be_a_vector_without_negative_numbers(weights):
    for make in (lambda: Categorical(class_weights=weights), lambda: Bernoulli(pos_weight=weights)):
        with pytest.raises(ValueError, match="Expected weights"):
            make()


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_must_be_a_share(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        Categorical(label_smoothing=smoothing)


@pytest.mark.parametrize("missing", [0, 1.0])
def test_answers_cannot_stand_for_missing_ones(missing):
    with pytest.raises(ValueError, match="is an answer"):
        Bernoulli(missing=missing)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 2.0])])
def test_noise_must_be_a_positive_number(noise):
    with pytest.raises(ValueError, match="must be one positive number"):
        Gaussian(noise=noise)
