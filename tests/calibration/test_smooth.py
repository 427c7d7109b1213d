"""The smooth calibration error against its kernel written out."""

import math

import pytest
import torch

from lapkit.calibration import (
    SmoothCalibrationError,
    Streaming,
    event,
    event_reliability_curve,
    expected_calibration_error,
    smooth_calibration_error,
    top_label,
)


def problem(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, 3, generator=generator)).softmax(dim=1)
    return p, torch.randint(3, (count,), generator=generator)


def written_out(confidence, outcome, sigma, points=4000):
    """The integral by midpoints, of Gaussians about each confidence and its mirror images at 0 and 1."""
    t = (torch.arange(points)[:, None] + 0.5) / points
    images = [sign * confidence + 2 * shift for sign in (1, -1) for shift in range(-4, 5)]
    kernel = sum((-((t - c) ** 2) / (2 * sigma**2)).exp() for c in images) / (sigma * math.sqrt(2 * math.pi))
    return (kernel * (confidence - outcome)).mean(dim=1).abs().mean().item()


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("pairs", [top_label, event])
def test_it_is_the_integral_of_the_smoothed_residual(pairs, sigma):
    p, y = problem()
    given = (p, y) if pairs is top_label else (p[:, 0], y == 0)
    # The grid widens each kernel by half a cell at most.
    found = SmoothCalibrationError(sigma, pairs)(*given)
    assert found == pytest.approx(written_out(*pairs(*given), sigma), abs=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_width_is_the_error(seed):
    p, y = problem(seed=seed)
    found = smooth_calibration_error(p, y)
    assert smooth_calibration_error(p, y, sigma=found) == pytest.approx(found, abs=1e-9)
    confidence, correct = top_label(p, y)
    assert written_out(confidence, correct, found) == pytest.approx(found, abs=1e-5)


def test_it_falls_as_the_kernel_widens():
    p, y = problem()
    errors = [smooth_calibration_error(p, y, sigma=sigma) for sigma in (0.001, 0.01, 0.1, 1.0)]
    assert errors == sorted(errors, reverse=True)
    # Everything is smoothed into one: the mean gap is left.
    assert errors[-1] == pytest.approx(expected_calibration_error(p, y, bins=1), abs=1e-2)


def test_equal_confidences_give_their_gap():
    p, y = torch.full((100,), 0.75), (torch.arange(100) % 5 > 0).long()
    assert smooth_calibration_error(p, y) == pytest.approx(0.05, abs=1e-9)


def test_nothing_wrong_and_everything_wrong():
    sure = torch.eye(2)
    assert smooth_calibration_error(sure, torch.tensor([0, 1])) == 0
    assert smooth_calibration_error(sure, torch.tensor([1, 0])) == pytest.approx(1, abs=1e-9)
    nearly = torch.tensor([[1 - 1e-6, 1e-6]], dtype=torch.float64)
    assert 0 < smooth_calibration_error(nearly, torch.tensor([0])) == pytest.approx(1e-6, abs=1e-9)


def test_it_is_continuous_where_bins_are_not():
    y = torch.tensor([1, 0])
    near, far = torch.tensor([0.5 - 1e-6, 0.5 - 1e-6]), torch.tensor([0.5 + 1e-6, 0.5 - 1e-6])
    assert event_reliability_curve(near, y, bins=2).ece < 1e-5
    assert event_reliability_curve(far, y, bins=2).ece > 0.4
    for p in (near, far):
        # A distance to calibration of 1e-6 at most, and at most twice the root of that.
        assert SmoothCalibrationError(pairs=event)(p, y) < 2e-3


def test_a_calibrated_model_tends_to_zero():
    errors = []
    for count in (100, 10_000):
        generator = torch.Generator().manual_seed(0)
        p = (2 * torch.randn(count, 3, generator=generator)).softmax(dim=1)
        errors.append(smooth_calibration_error(p, torch.multinomial(p, 1, generator=generator).squeeze(1)))
    assert errors[1] < 0.02 < errors[0]


def test_the_state_is_of_a_fixed_size():
    stream = Streaming(SmoothCalibrationError())
    for seed in range(3):
        stream.update(*problem(seed=seed))
    assert stream.state()["summary"].numel() == 2**14 + 1


@pytest.mark.parametrize("sigma", [0, -0.1, 1.5, math.nan])
def test_widths_that_are_none_are_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma is .*, expected a width in \(0, 1\]"):
        smooth_calibration_error(*problem(), sigma=sigma)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("pairs", [top_label, event])
def test_on_the_scale_of_log_odds_too(pairs, sigma):
    p, y = problem()
    given = (p, y) if pairs is top_label else (p[:, 0], y == 0)
    confidence, outcome = pairs(*given)
    at = torch.linspace(-32, 32, 20001)[:, None]
    kernel = (-((at - confidence.clamp(1e-3, 1 - 1e-3).logit()) ** 2) / (2 * (4 * sigma) ** 2)).exp()
    mean = (kernel / (4 * sigma * math.sqrt(2 * math.pi)) * (confidence - outcome)).mean(dim=1).abs()
    found = SmoothCalibrationError(sigma, pairs, kernel="log_odds")(*given)
    assert found == pytest.approx(torch.trapezoid(mean, at[:, 0]).item(), abs=1e-4)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="'logit', expected one of 'reflected', 'log_odds'"):
        SmoothCalibrationError(kernel="logit")
