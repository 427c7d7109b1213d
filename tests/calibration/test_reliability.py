"""Binned calibration errors against loops over examples and bins, and against simulated calibrated models."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lapkit.calibration import (
    ReliabilityCurve,
    event_reliability_curve,
    expected_calibration_error,
    reliability_curve,
)
from lapkit.calibration.binning import equal_width

BINNINGS = ["equal_width", "equal_mass"]


def loop_equal_width(confidence, outcome, bins):
    """Members of each bin (m/M, (m+1)/M], with zero in the first, one example and one bin at a time."""
    members = [[] for _ in range(bins)]
    for c, a in zip(confidence, outcome, strict=True):
        for m in range(bins):
            if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0):
                members[m].append((c, a))
    return members


def loop_equal_mass(confidence, outcome, bins):
    """Parts of equal size; examples of equal confidence all go to the part of the middle one of them."""
    order = sorted(range(len(confidence)), key=lambda n: confidence[n])
    parts = np.array_split(order, bins)
    home = {n: m for m, part in enumerate(parts) for n in part}
    members = [[] for _ in range(bins)]
    for value in sorted(set(confidence)):
        equal = [n for n in order if confidence[n] == value]
        middle = equal[(len(equal) - 1) // 2]
        members[home[middle]].extend((confidence[n], outcome[n]) for n in equal)
    return members


LOOPS = {"equal_width": loop_equal_width, "equal_mass": loop_equal_mass}


def loop_errors(members):
    total = sum(len(member) for member in members)
    gaps, chance = [], 0.0
    for member in members:
        if member:
            n = len(member)
            conf, acc = sum(c for c, _ in member) / n, sum(a for _, a in member) / n
            gaps.append((n / total, abs(acc - conf)))
            chance += math.sqrt(2 / math.pi) * n / total * math.sqrt(acc * (1 - acc) / n)
    ece = sum(w * gap for w, gap in gaps)
    return ece, math.sqrt(sum(w * gap**2 for w, gap in gaps)), max(gap for _, gap in gaps), chance


def events(kind, count, seed=0):
    """Probabilities of an event: all different, on a lattice whose points are the edges, or nearly all alike."""
    rng = np.random.default_rng(seed)
    confidence = {
        "continuous": lambda: rng.uniform(size=count),
        "on the edges": lambda: rng.integers(0, 31, size=count) / 30,
        "saturated": lambda: np.where(rng.uniform(size=count) < 0.8, 1.0, rng.uniform(size=count)),
    }[kind]()
    return torch.from_numpy(confidence), torch.from_numpy(rng.uniform(size=count) < confidence**2)


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("kind", ["continuous", "on the edges", "saturated"])
@pytest.mark.parametrize("binning", BINNINGS)
def test_curve_agrees_with_the_loop(binning, kind, bins, count):
    confidence, occurred = events(kind, count)
    curve = event_reliability_curve(confidence, occurred, bins=bins, binning=binning)
    members = LOOPS[binning](confidence.tolist(), occurred.double().tolist(), bins)
    assert curve.count.tolist() == [len(member) for member in members]
    for m, member in enumerate(members):
        if member:
            assert curve.confidence[m].item() == pytest.approx(np.mean([c for c, _ in member]), abs=1e-13)
            assert curve.accuracy[m].item() == pytest.approx(np.mean([a for _, a in member]), abs=1e-13)
        else:
            assert curve.confidence[m].isnan()
            assert curve.accuracy[m].isnan()
    found = (curve.ece, curve.rmsce, curve.mce, curve.expected_by_chance)
    assert found == pytest.approx(loop_errors(members), abs=1e-13)


@pytest.mark.parametrize("binning", BINNINGS)
def test_top_label_is_the_event_that_the_most_probable_class_is_right(binning):
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(200, 4, generator=generator, dtype=torch.float64).softmax(dim=1)
    y = torch.randint(4, (200,), generator=generator)
    curve = reliability_curve(p, y, bins=7, binning=binning)
    event = event_reliability_curve(p.amax(dim=1), p.argmax(dim=1) == y, bins=7, binning=binning)
    for field in dataclasses.fields(ReliabilityCurve):
        found, expected = getattr(curve, field.name), getattr(event, field.name)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert expected_calibration_error(p, y, bins=7, binning=binning) == curve.ece


def test_equal_width_edges():
    curve = event_reliability_curve(torch.tensor([0.5]), torch.tensor([1]), bins=10)
    assert curve.edges.tolist() == [m / 10 for m in range(11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [10, 15, 20, 100])
def test_edges_belong_to_the_left_in_every_dtype(dtype, bins):
    lattice = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(dtype)
    expected = [2] + [1] * (bins - 1)
    occurred = torch.ones(bins + 1, dtype=torch.bool)
    assert event_reliability_curve(lattice, occurred, bins=bins).count.tolist() == expected


@pytest.mark.parametrize("bins", [10, 15, 20, 100])
def test_rounding_errors_do_not_move_a_confidence_off_its_edge(bins):
    complement = 1 - torch.arange(bins + 1, dtype=torch.float64).flip(0) / bins
    assert bins != 10 or complement[3] > 0.3
    curve = event_reliability_curve(complement, torch.ones(bins + 1, dtype=torch.bool), bins=bins)
    assert curve.count.tolist() == [2] + [1] * (bins - 1)


def test_probabilities_above_one_by_rounding_are_in_the_last_bin():
    curve = event_reliability_curve(torch.tensor([1.0 + 2e-7, 0.1]), torch.tensor([1, 0]), bins=4)
    assert curve.count.tolist() == [1, 0, 0, 1]


def test_equal_mass_edges_enclose_their_bins():
    confidence, occurred = events("continuous", 103)
    curve = event_reliability_curve(confidence, occurred, bins=10, binning="equal_mass")
    parts = np.array_split(np.sort(confidence.numpy()), 10)
    assert curve.edges.tolist() == [parts[0][0]] + [part[-1] for part in parts]
    assert curve.count.tolist() == [11, 11, 11, 10, 10, 10, 10, 10, 10, 10]


def test_equal_mass_keeps_ties_together():
    confidence = torch.tensor([0.2, 0.5, 0.5, 0.5, 0.5, 0.9])
    curve = event_reliability_curve(confidence, torch.tensor([0, 1, 1, 0, 0, 1]), bins=3, binning="equal_mass")
    assert curve.count.tolist() == [1, 4, 1]
    assert curve.accuracy.tolist() == [0, 0.5, 1]
    alike = event_reliability_curve(
        confidence * 0 + 0.5, torch.tensor([0, 1, 1, 0, 0, 1]), bins=3, binning="equal_mass"
    )
    assert alike.count.tolist() == [0, 6, 0]
    assert alike.ece == 0


def test_more_bins_than_examples_leaves_the_last_empty():
    curve = event_reliability_curve(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), bins=4, binning="equal_mass")
    assert curve.count.tolist() == [1, 1, 0, 0]
    assert curve.edges.tolist() == pytest.approx([0.2, 0.2, 0.9, 0.9, 0.9], abs=1e-7)
    assert curve.ece == pytest.approx(0.15, abs=1e-7)


def test_errors_by_hand():
    curve = ReliabilityCurve(
        edges=torch.tensor([0.0, 0.25, 0.5, 1.0]),
        count=torch.tensor([30, 0, 10]),
        confidence=torch.tensor([0.2, math.nan, 0.9], dtype=torch.float64),
        accuracy=torch.tensor([0.3, math.nan, 0.5], dtype=torch.float64),
    )
    assert curve.ece == pytest.approx(0.75 * 0.1 + 0.25 * 0.4, abs=1e-15)
    assert curve.rmsce == pytest.approx(math.sqrt(0.75 * 0.01 + 0.25 * 0.16), abs=1e-15)
    assert curve.mce == pytest.approx(0.4, abs=1e-15)
    assert curve.calibration_error(3) == pytest.approx((0.75 * 0.001 + 0.25 * 0.064) ** (1 / 3), abs=1e-15)
    # A high order tends to the maximum from below.
    assert 0.99 * curve.mce < curve.calibration_error(200) < curve.mce
    chance = 0.75 * math.sqrt(0.21 / 30) + 0.25 * math.sqrt(0.25 / 10)
    assert curve.expected_by_chance == pytest.approx(math.sqrt(2 / math.pi) * chance, abs=1e-15)


@pytest.mark.parametrize("order", [0.5, 0, -1, math.nan])
def test_orders_that_are_no_norm_are_refused(order):
    curve = event_reliability_curve(torch.tensor([0.5]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"order is .*, expected at least 1"):
        curve.calibration_error(order)


def test_the_curve_is_frozen():
    curve = event_reliability_curve(torch.tensor([0.5]), torch.tensor([1]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        curve.count = torch.tensor([2])


@pytest.mark.parametrize("kind", ["continuous", "on the edges", "saturated"])
@pytest.mark.parametrize("binning", BINNINGS)
def test_order_does_not_matter(binning, kind):
    confidence, occurred = events(kind, 500, seed=5)
    shuffle = torch.from_numpy(np.random.default_rng(1).permutation(500))
    curve = event_reliability_curve(confidence, occurred, binning=binning)
    shuffled = event_reliability_curve(confidence[shuffle], occurred[shuffle], binning=binning)
    assert torch.equal(curve.count, shuffled.count)
    assert shuffled.ece == pytest.approx(curve.ece, abs=1e-14)


@pytest.mark.parametrize("binning", BINNINGS)
def test_float32_and_float64_agree(binning):
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(300, 4, generator=generator, dtype=torch.float32).softmax(dim=1)
    y = torch.randint(4, (300,), generator=generator)
    assert reliability_curve(p, y, binning=binning).ece == reliability_curve(p.double(), y, binning=binning).ece


def test_a_default_dtype_changes_nothing():
    def errors():
        curve = event_reliability_curve(*events("continuous", 100))
        return curve.ece, curve.rmsce, curve.mce, curve.expected_by_chance

    expected = errors()
    torch.set_default_dtype(torch.float16)  # restored by the fixture that sets float64
    assert errors() == expected


@pytest.mark.parametrize("binning", BINNINGS)
def test_a_calibrated_model_shows_the_error_expected_by_chance(binning):
    # One confidence a bin, so that each bin's accuracy is binomial about its confidence and the formula is exact up
    # to terms in 1/n_m (0.2 % at 400 examples to a bin), well below the Monte Carlo error.
    generator = torch.Generator().manual_seed(0)
    confidence = torch.tensor([0.55, 0.65, 0.75, 0.85, 0.95]).repeat_interleave(400)
    options = {"bins": 20, "binning": "equal_width"} if binning == "equal_width" else {"bins": 5, "binning": binning}
    errors, chances = [], []
    for _ in range(600):
        occurred = torch.rand(len(confidence), generator=generator) < confidence
        curve = event_reliability_curve(confidence, occurred, **options)
        errors.append(curve.ece)
        chances.append(curve.expected_by_chance)
    standard_error = np.std(errors) / math.sqrt(len(errors))
    # Small enough to tell the formula from one without sqrt(2/pi), or with 1/sqrt(n_m - 1) weights and the like.
    assert standard_error < 0.02 * np.mean(chances)
    assert abs(np.mean(errors) - np.mean(chances)) < 3 * standard_error


def test_a_calibrated_classifier_shows_the_error_expected_by_chance():
    # Labels drawn from the probabilities themselves; confidences spread within their bins, so to 5 % only.
    generator = torch.Generator().manual_seed(1)
    p = (2 * torch.randn(3000, 5, generator=generator)).softmax(dim=1)
    curves = [reliability_curve(p, torch.multinomial(p, 1, generator=generator)[:, 0]) for _ in range(200)]
    mean_error = np.mean([curve.ece for curve in curves])
    assert mean_error == pytest.approx(np.mean([curve.expected_by_chance for curve in curves]), rel=0.05)


@pytest.mark.parametrize("bins", [1, 2, 7, 10, 15, 100, 1024, 99_999])
def test_guessed_bins_are_those_of_a_search(bins):
    generator = torch.Generator().manual_seed(0)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    near = [torch.nextafter(edges.float(), torch.tensor(to, dtype=torch.float32)).double() for to in (-1.0, 2.0)]
    confidence = torch.cat((edges, 1 - edges, *near, torch.rand(5000, generator=generator), torch.tensor([1.03])))
    found_edges, index = equal_width(confidence.clamp(min=0), bins)
    assert torch.equal(found_edges, edges)
    assert torch.equal(index, torch.bucketize(confidence.clamp(min=0).float(), edges[1:-1].float()))


def test_more_bins_than_a_guess_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"bins is 100001, expected at most 100000"):
        event_reliability_curve(torch.tensor([0.5]), torch.tensor([1]), bins=100_001)
