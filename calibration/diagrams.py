"""Drawing with matplotlib, the optional extra `plot`; imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermilion of Okabe and Ito (2008), apart for every kind of colour vision; the hatch tells them
# apart in grey.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
# The axis of accuracy goes on above one, to make room for the strip with the counts.
TOP, TICKS = 1.2, (0, 0.2, 0.4, 0.6, 0.8, 1)


def new_axes() -> Axes:
    """The axes of a new figure.

    Returns:
        The axes, registered with pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed. Run: pip install lapkit[plot]") from error
    return pyplot.subplots(figsize=(4.5, 5), layout="constrained")[1]


def draw_reliability(
    ax: Axes,
    *,
    edges: Sequence[float],  # (M + 1,)
    count: Sequence[int],  # (M,)
    confidence: Sequence[float],  # (M,)
    accuracy: Sequence[float],  # (M,)
    label: str,
    summary: str,
    band: Sequence[Sequence[float]] = (),  # (2, M), or nothing
) -> Axes:
    """Bars of accuracy, the gap from each to its mean confidence, and a strip with the counts above.

    Args:
        ax: the axes to draw in.
        edges: the bins' edges.
        count: examples per bin; bins with none are not drawn.
        confidence: mean confidence per bin.
        accuracy: accuracy per bin.
        label: the legend's name for the bars.
        summary: the legend's words for the gaps.
        band: where the accuracy of a calibrated model would lie, lower and upper ends.

    Returns:
        The same axes.
    """
    filled = [m for m, examples in enumerate(count) if examples > 0]
    left = [edges[m] for m in filled]
    width = [edges[m + 1] - edges[m] for m in filled]
    conf, acc = [confidence[m] for m in filled], [accuracy[m] for m in filled]
    gap = [c - a for c, a in zip(conf, acc, strict=True)]

    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    ax.bar(left, acc, width, align="edge", color=BLUE, alpha=0.6, edgecolor="white", linewidth=0.5, label=label)
    ax.bar(
        left,
        gap,
        width,
        bottom=acc,
        align="edge",
        fill=False,
        edgecolor=VERMILION,
        hatch="////",
        linewidth=0.8,
        label=summary,
    )
    # Bins of equal mass can be too narrow for a bar to show; the points are where the bins truly lie.
    ax.plot(conf, acc, linestyle="none", marker="o", markersize=3, color=BLUE)
    if band:
        below, above = ([abs(end[m] - confidence[m]) for m in filled] for end in band)
        ax.errorbar(conf, conf, [below, above], fmt="none", ecolor=GREY, capsize=3, label="if calibrated")
    ax.set(xlim=(0, 1), ylim=(0, TOP), yticks=TICKS, xlabel="confidence", ylabel="accuracy", aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best", bbox_to_anchor=(0, 0, 1, 1 / TOP), framealpha=0.85, edgecolor="none")
    _draw_counts(ax, left, width, [count[m] for m in filled])
    return ax


def _draw_counts(ax: Axes, left: Sequence[float], width: Sequence[float], count: Sequence[int]) -> None:
    # Inside the box of `ax`, so that titles and layouts need not know of it.
    strip = ax.inset_axes((0, 1.03 / TOP, 1, 1 - 1.03 / TOP))
    strip.bar(left, count, width, align="edge", color=GREY, alpha=0.5, edgecolor="white", linewidth=0.5)
    strip.set(xlim=ax.get_xlim(), xticks=[], yticks=[max(count)], ylabel="count")
    strip.spines[["top", "right"]].set_visible(False)


def draw_risk_coverage(ax: Axes, *, coverage: Sequence[float], risk: Sequence[float], label: str) -> Axes:
    """The risk of the most confident examples against their share.

    Args:
        ax: the axes to draw in; further curves may be there.
        coverage: `(N,)` rising to 1.
        risk: `(N,)` in [0, 1].
        label: the legend's words for the curve.

    Returns:
        The same axes.
    """
    ax.plot(coverage, risk, label=label)
    ax.set(xlim=(0, 1), xlabel="coverage", ylabel="risk: share of errors")
    ax.set_ylim(bottom=0, auto=True)  # further curves may go higher
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", frameon=False)
    return ax
