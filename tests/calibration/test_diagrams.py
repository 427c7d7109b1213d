"""The reliability diagram draws what the curve says, and matplotlib is needed only then."""

import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib.axes import Axes

from lapkit.calibration import event_reliability_curve, reliability_curve

mpl.use("agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def simulated(binning="equal_width", bins=10):
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(400, 3, generator=generator)).softmax(dim=1)
    y = torch.multinomial(p, 1, generator=generator)[:, 0]
    return reliability_curve(p, y, bins=bins, binning=binning)


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_bars_are_the_curve(binning):
    curve = simulated(binning)
    ax = curve.plot()
    filled = curve.count > 0
    accuracy, gap = (container.patches for container in ax.containers)
    assert [bar.get_height() for bar in accuracy] == curve.accuracy[filled].tolist()
    assert [bar.get_x() for bar in accuracy] == curve.edges[:-1][filled].tolist()
    right = [bar.get_x() + bar.get_width() for bar in accuracy]
    assert right == pytest.approx(curve.edges[1:][filled].tolist(), abs=1e-12)
    assert [bar.get_y() for bar in gap] == curve.accuracy[filled].tolist()
    tops = [bar.get_y() + bar.get_height() for bar in gap]
    assert tops == pytest.approx(curve.confidence[filled].tolist(), abs=1e-12)
    (strip,) = ax.child_axes
    assert [bar.get_height() for bar in strip.containers[0].patches] == curve.count[filled].tolist()


def test_new_axes_are_made_only_when_none_are_given():
    curve = simulated()
    ax = curve.plot()
    assert isinstance(ax, Axes)
    assert pyplot.get_fignums() == [ax.figure.number]
    figure, (left, right) = pyplot.subplots(1, 2)
    assert curve.plot(right) is right
    assert not left.containers
    assert len(pyplot.get_fignums()) == 2
    assert curve.plot(ax=left) is left
    figure.canvas.draw()


def test_the_legend_names_the_model_and_the_errors():
    curve = simulated()
    words = [text.get_text() for text in curve.plot(label="Laplace").get_legend().get_texts()]
    assert words == ["Laplace", f"ECE {curve.ece:.3f} ({curve.expected_by_chance:.3f} by chance)"]
    assert curve.plot().get_legend().get_texts()[0].get_text() == "accuracy"


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_degenerate_curves_draw_without_warnings(binning):
    for confidence, occurred in [([0.5], [1]), ([1.0] * 5, [1] * 5), ([0.0, 1.0], [1, 0])]:
        curve = event_reliability_curve(torch.tensor(confidence), torch.tensor(occurred), binning=binning)
        ax = curve.plot()
        ax.figure.canvas.draw()
        assert len(ax.containers[0].patches) == (curve.count > 0).sum()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install lapkit\[plot\]"):
        simulated().plot()


def test_importing_needs_neither_matplotlib_nor_scikit_learn_nor_the_rest_of_lapkit():
    # An empty stand-in for the package above, whose facade imports everything.
    program = """
import importlib.util, sys, types
facade = types.ModuleType("lapkit")
facade.__path__ = list(importlib.util.find_spec("lapkit").submodule_search_locations)
sys.modules["lapkit"] = facade
import lapkit.calibration
parts = {name.split(".")[1] for name in sys.modules if name.startswith("lapkit.")}
assert parts == {"calibration"}, parts
assert not {"matplotlib", "sklearn", "scipy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
