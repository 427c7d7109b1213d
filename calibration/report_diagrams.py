"""Drawing for pages, with matplotlib, without its global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lapkit.calibration.diagrams import BLUE, GREY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito (2008), and line styles that tell them apart in grey.
COLOURS = (VERMILION, "#E69F00", BLUE, "#009E73", "#CC79A7", GREY, "#56B4E9", "#000000")
STYLES = ("--", "-.", "-", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (3, 1)))
# Letters in a line of a title or a legend.
LINE = 36


def caption(name: str) -> str:
    """A name in lines short enough for a small picture.

    Args:
        name: of a method.

    Returns:
        The lines. Matplotlib leaves names that begin with an underscore out of legends: these begin with a space.
    """
    lines = "\n".join(textwrap.wrap(name, LINE))
    return f" {lines}" if lines.startswith("_") else lines


def export_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Axes of a figure that pyplot does not know of.

    Args:
        size: width and height in inches.

    Returns:
        The figure and its axes, whose lines come in colours for every kind of colour vision.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A page needs matplotlib, which is not installed. Run: pip install lapkit[plot]") from error
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.set_prop_cycle(cycler(color=COLOURS) + cycler(linestyle=STYLES))
    return figure, ax


def as_svg(figure: Figure) -> bytes:
    """The file of a figure, the same for the same figure.

    Args:
        figure: drawn.

    Returns:
        SVG.
    """
    import matplotlib as mpl  # optional, for pages alone
    from matplotlib.text import Text

    # Dollars in names are dollars: two of them, as in two prices, may be no formula at all.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "lapkit"}):  # names of parts are random otherwise
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def draw_spread(
    ax: Axes,
    *,
    inside: Sequence[float],
    outside: Sequence[float] | None,
    title: str,
    label: str,
    limits: tuple[float, float],
) -> Axes:
    """Histograms of a measure of uncertainty, in and out of distribution.

    Args:
        ax: the axes to draw in.
        inside: one number for each example.
        outside: likewise, of examples from elsewhere.
        title: above.
        label: of the axis.
        limits: of the axis.

    Returns:
        The axes.
    """
    edges = np.linspace(*limits, 21).tolist()

    def shares(values: Sequence[float]) -> np.ndarray:
        return np.full(len(values), 1 / len(values))

    ax.hist(inside, edges, weights=shares(inside), color=BLUE, alpha=0.55, label="in distribution")
    if outside is not None:
        ax.hist(
            outside,
            edges,
            weights=shares(outside),
            histtype="step",
            color=VERMILION,
            linewidth=1.8,
            linestyle="-",
            label="out of distribution",
        )
    ax.set(xlabel=label, ylabel="share of examples", xlim=limits, title=title)
    ax.margins(y=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best", frameon=False)
    return ax
