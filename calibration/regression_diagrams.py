"""Drawing of regressions with matplotlib: calibration of quantiles, the PIT, intervals against targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lapkit.calibration.diagrams import BLUE, GREY, VERMILION, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_calibration(
    ax: Axes | None,
    *,
    level: Sequence[float],  # (L,)
    observed: Sequence[float],  # (L,)
    label: str | None,
) -> Axes:
    """Observed over expected frequencies, and the diagonal.

    Args:
        ax: the axes to draw in; new ones if None.
        level: what was asked for.
        observed: what was found.
        label: for the legend.

    Returns:
        The axes.
    """
    ax = new_axes() if ax is None else ax
    if not ax.lines:  # the first of several curves
        ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    ax.plot(level, observed, marker="o", markersize=3, label=label)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="expected frequency", ylabel="observed frequency")
    ax.spines[["top", "right"]].set_visible(False)
    if label:
        ax.legend(loc="upper left", frameon=False)
    return ax


def draw_pit(ax: Axes | None, *, count: Sequence[int], band: tuple[int, int], label: str | None) -> Axes:
    """Bars of the PIT's histogram over the band that they keep to if calibrated.

    Args:
        ax: the axes to draw in; new ones if None.
        count: targets in each of the equal parts of [0, 1].
        band: counts that are usual by chance.
        label: for the legend.

    Returns:
        The axes.
    """
    ax = new_axes() if ax is None else ax
    width = 1 / len(count)
    left = [m * width for m in range(len(count))]
    ax.bar(left, count, width, align="edge", color=BLUE, alpha=0.6, edgecolor="white", linewidth=0.5, label=label)
    ax.axhspan(*band, color=GREY, alpha=0.25, linewidth=0, label="calibrated: 95 % of bars")
    ax.axhline(sum(count) * width, color=GREY, linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), xlabel="PIT: predicted probability of a smaller target", ylabel="count")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper center", frameon=False)
    ax.set_ylim(0, 1.35 * max(*count, band[1]))  # room for the legend
    return ax


def draw_intervals(
    ax: Axes | None,
    *,
    mean: Sequence[float],  # (N,)
    lower: Sequence[float],  # (N,)
    upper: Sequence[float],  # (N,)
    targets: Sequence[float],  # (N,)
    label: str,
) -> Axes:
    """Intervals in the order of their means, and the targets; those outside stand out.

    Args:
        ax: the axes to draw in; new ones if None.
        mean: of the predictions.
        lower: ends of intervals.
        upper: ends of intervals.
        targets: that were found.
        label: for the legend.

    Returns:
        The axes.
    """
    ax = new_axes() if ax is None else ax
    order = sorted(range(len(mean)), key=lambda n: mean[n])
    rank = range(len(order))
    ax.vlines(rank, [lower[n] for n in order], [upper[n] for n in order], color=BLUE, alpha=0.35, label=label)
    ax.plot(rank, [mean[n] for n in order], color=BLUE, linewidth=1, linestyle="-", label="mean")
    inside = [lower[n] <= targets[n] <= upper[n] for n in order]
    for held, colour, marker, name in ((True, GREY, "o", "target inside"), (False, VERMILION, "x", "target outside")):
        at = [r for r in rank if inside[r] is held]
        ax.plot(at, [targets[order[r]] for r in at], color=colour, marker=marker, markersize=4, ls="none", label=name)
    ax.set(xlabel="example, in the order of the predicted mean", ylabel="target")
    ax.spines[["top", "right"]].set_visible(False)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend
    ax.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)
    return ax
