"""Plots draw the numbers they are given."""

import matplotlib as mpl
import pytest
import torch

from lapkit.curvature import (
    plot_overlaps,
    plot_snr,
    plot_spectrum,
)

mpl.use("agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def test_plots_draw_the_numbers(problem, spectrum):
    ax = spectrum.plot()
    (line,) = ax.get_lines()
    assert list(line.get_ydata()) == pytest.approx(spectrum.eigenvalues.tolist())
    assert ax.get_yscale() == "log"
    same = plot_spectrum({"one": spectrum, "two": 2 * spectrum.eigenvalues}, ax)
    assert same is ax
    assert len(ax.get_lines()) == 3
    histogram = plot_spectrum(spectrum, bins=4)
    assert sum(bar.get_height() for bar in histogram.patches) == spectrum.rank
    assert histogram.get_xscale() == "log"
    with pytest.raises(ValueError, match="no positive"):
        plot_spectrum(torch.zeros(2))


def test_overlaps_are_drawn():
    overlaps = torch.tensor([[1.0, 0.25, 0.0], [0.5, 1.0, 0.75]])
    ax = plot_overlaps(overlaps, labels=(["a", "b"], ["c", "d", "e"]))
    assert ax.get_images()[0].get_array().tolist() == overlaps.tolist()
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.00", "0.50", "1.00", "0.75"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="from 0 to 1"):
        plot_overlaps(torch.tensor([[2.0]]))


def test_noise_over_training_is_drawn():
    snr = torch.tensor([[1.0, 4.0, 2.0], [0.1, 0.3, 0.2]])
    ax = plot_snr([1, 10], snr, label="gradients")
    assert plot_snr([1, 10], 2 * snr, ax, label="curvatures") is ax
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["gradients"].get_ydata()) == [2.0, 0.2]
    assert list(lines["curvatures"].get_ydata()) == [4.0, 0.4]
    assert lines["gradients"].get_color() != lines["curvatures"].get_color()
    with pytest.raises(ValueError, match="one row for each step"):
        plot_snr([1], snr)
