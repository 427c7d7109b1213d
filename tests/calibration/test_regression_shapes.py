"""What comes back has the shape of what was given: `(N, 1)` beside targets `(N,)` would be broadcast to `(N, N)`."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, MultivariateNormal, Normal

from lapkit.calibration import (
    ConformalBounds,
    ConformalIntervals,
    PITDistance,
    QuantileRecalibration,
    Samples,
    SigmaScaling,
    Streaming,
    central_interval,
    interval_coverage,
    pit,
    pit_distance,
    quantiles,
    report,
)


def random(*shape):
    mean, std = torch.randn(shape), torch.rand(shape) + 0.3
    return mean, std, mean + 2 * std * torch.randn(shape)


def predictions(mean, std):
    """The same marginals, or nearly, in every form that there is."""
    given = {
        "pair": (mean, std),
        "arrays": (mean.numpy(), std.numpy()),
        "number": (mean, 1.0),
        "Normal": Normal(mean, std),
        "Laplace": Laplace(mean, std),
        "samples": Samples(mean + std * torch.randn(50, *mean.shape)),
    }
    if mean.ndim == 2:
        given["Independent"] = Independent(Normal(mean, std), 1)
        given["joint"] = MultivariateNormal(mean, scale_tril=std.diag_embed())
    components = torch.stack([mean, mean + 1], 1), torch.stack([std, std], 1)
    one = Normal(*components) if mean.ndim == 1 else Independent(Normal(*components), 1)
    given["mixture"] = MixtureSameFamily(Categorical(torch.ones(len(mean), 2)), one)
    return given


NAMES = ("pair", "arrays", "number", "Normal", "Laplace", "samples", "mixture")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_every_result_has_the_shape_of_the_prediction(name, shape):
    mean, std, y = random(*shape)
    given = predictions(mean, std)[name]
    found = {
        "pit": (pit(given, y),),
        "quantiles": (quantiles(given, 0.3),),
        "central": central_interval(given, coverage=0.8),
        "absolute": ConformalIntervals.fit(given, y, normalised=False)(given),
        "normalised": ConformalIntervals.fit(given, y)(given),
        "sigma": SigmaScaling.fit(given, y)(given),
        "each sigma": SigmaScaling.fit(given, y, per_target=True)(given),
        "quantile recalibration": (QuantileRecalibration.fit(given, y).quantile(given, 0.4),),
        "interval": QuantileRecalibration.fit(given, y).interval(given, coverage=0.5),
        "bounds": ConformalBounds.fit((mean - 1, mean + 1), y)((mean - 1, mean + 1)),
    }
    assert {key: {tuple(v.shape) for v in values} for key, values in found.items()} == {key: {shape} for key in found}


@pytest.mark.parametrize("name", ["Independent", "joint"])
def test_events_are_the_last_axis(name):
    mean, std, y = random(30, 2)
    given = predictions(mean, std)[name]
    assert quantiles(given, 0.3).numpy() == pytest.approx(stats.norm(mean, std).ppf(0.3), abs=1e-12)
    assert SigmaScaling.fit(given, y)(given)[1].shape == (30, 2)


def test_a_user_may_compare_with_the_targets():
    """Scipy's numbers, one for each example, and the coverage by hand."""
    mean, std, y = random(200)
    assert pit((mean, std), y).numpy() == pytest.approx(stats.norm(mean, std).cdf(y), abs=1e-12)
    lower, upper = ConformalIntervals.fit((mean, std), y, coverage=0.9)((mean, std))
    inside = (lower <= y) & (y <= upper)
    assert inside.shape == y.shape
    assert float(inside.double().mean()) == interval_coverage((lower, upper), y) == np.ceil(201 * 0.9) / 200


def test_the_pit_has_the_shape_of_the_targets():
    mean, std, y = random(20)
    assert pit((mean[:, None], std[:, None]), y).shape == (20,)
    assert pit((mean, std), y[:, None]).shape == (20, 1)


def test_batches_of_either_shape_stream_together():
    mean, std, y = random(20)
    stream = Streaming(PITDistance())
    stream.update((mean[:7], std[:7]), y[:7])
    stream.update((mean[7:, None], std[7:]), y[7:, None])
    assert stream.compute() == pit_distance((mean, std), y)


def test_samples_of_one_target_are_reported(tmp_path):
    pytest.importorskip("matplotlib")
    mean, std, y = random(30)
    draws = mean + std * torch.randn(50, 30)
    pages = [report({"mine": Samples(values)}, y, inputs=mean[:, None]) for values in (draws, draws[..., None])]
    assert pages[0].rows["mine"] == pytest.approx(pages[1].rows["mine"], abs=0, nan_ok=True)
    pages[0].save(tmp_path / "report.html")
