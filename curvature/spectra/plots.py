"""Drawing spectra with matplotlib, the optional extra `plot`; imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008), apart for every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class HasEigenvalues(Protocol):
    """A spectrum, as far as a plot is concerned."""

    @property
    def eigenvalues(self) -> Tensor:
        """`(R,)`."""


Spectra = HasEigenvalues | Tensor | Mapping[str, HasEigenvalues | Tensor]


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
    return pyplot.subplots(figsize=(5, 4), layout="constrained")[1]


def plot_spectrum(spectra: Spectra, ax: Axes | None = None, *, bins: int | None = None) -> Axes:
    """Eigenvalues in descending order, or a histogram of them, over a logarithmic scale.

    Args:
        spectra: a spectrum or eigenvalues `(R,)`, or several by the names they have in the legend.
        ax: the axes to draw in; new ones if None.
        bins: draw a histogram with so many bins, equal on the logarithmic scale.

    Returns:
        The axes, for titles and the like.

    Raises:
        TypeError: if several are given without names, or something else.
        ValueError: if there is no positive eigenvalue.
    """
    several = spectra if isinstance(spectra, Mapping) else {"": spectra}
    positive = {label: _positive(found) for label, found in several.items()}
    if not any(len(values) for values in positive.values()):
        raise ValueError("There is no positive eigenvalue to draw.")
    ax = new_axes() if ax is None else ax
    everything = torch.cat(list(positive.values())).log10()
    edges = torch.linspace(float(everything.min()) - 0.01, float(everything.max()) + 0.01, (bins or 1) + 1).tolist()
    for (label, values), colour in zip(positive.items(), _colours(len(positive)), strict=True):
        if bins is None:
            ax.plot(range(1, len(values) + 1), values.tolist(), "o-", markersize=3, color=colour, label=label)
        else:
            ax.hist(values.tolist(), [10**e for e in edges], color=colour, alpha=0.6, label=label)
    (ax.set_yscale if bins is None else ax.set_xscale)("log")
    names = ("number", "eigenvalue") if bins is None else ("eigenvalue", "count")
    ax.set(xlabel=names[0], ylabel=names[1])
    return _finished(ax, legend=any(positive))


def plot_overlaps(
    overlaps: Tensor,  # (S, S')
    ax: Axes | None = None,
    *,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Axes:
    """A matrix of overlaps between eigenspaces, from 0 (white) to 1 (black), with their numbers.

    Args:
        overlaps: between 0 and 1.
        ax: the axes to draw in; new ones if None.
        labels: of rows and of columns.

    Returns:
        The axes, for titles and the like.

    Raises:
        ValueError: if it is no such matrix.
    """
    if overlaps.ndim != 2 or not overlaps.numel() or not ((overlaps >= 0) & (overlaps <= 1 + 1e-6)).all():
        raise ValueError(f"Expected a matrix (S, S') of overlaps from 0 to 1, got shape {tuple(overlaps.shape)}.")
    ax = new_axes() if ax is None else ax
    rows = overlaps.detach().cpu().double().tolist()
    ax.imshow(rows, cmap="Greys", vmin=0, vmax=1)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    if labels is not None:
        ax.set_yticks(range(len(rows)), labels[0])
        ax.set_xticks(range(len(rows[0])), labels[1])
    return ax


def plot_snr(
    steps: Sequence[float],  # (S,)
    snr: Tensor,  # (S, K)
    ax: Axes | None = None,
    *,
    label: str = "SNR",
) -> Axes:
    """Signal-to-noise ratios of K directions over training, and their median, on a logarithmic scale.

    Args:
        steps: where in training.
        snr: what `Directions.gradient_snr` and `Directions.curvature_snr` give, one row for each step.
        ax: the axes to draw in; new ones if None. Gradients and curvatures go into one by two calls.
        label: of the median, in the legend.

    Returns:
        The axes, for titles and the like.

    Raises:
        TypeError: if these are no ratios in a tensor.
        ValueError: if there is not one row for each step.
    """
    if not isinstance(snr, Tensor):
        raise TypeError(
            f"Expected ratios (S, K), one row for each of S steps, got a {type(snr).__name__}. Directions give one "
            "row: torch.stack([d.gradient_snr() for d in directions_of_each_step])."
        )
    if snr.ndim != 2 or len(snr) != len(steps) or not snr.numel():
        raise ValueError(f"Expected ratios ({len(steps)}, K), one row for each step, got shape {tuple(snr.shape)}.")
    ax = new_axes() if ax is None else ax
    colour = COLOURS[len(ax.get_lines()) // (snr.shape[1] + 1) % len(COLOURS)]
    values = snr.detach().cpu().double()
    for direction in values.T:
        ax.plot(steps, direction.tolist(), color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(steps, values.median(1).values.tolist(), color=colour, linewidth=2, label=label)
    ax.axhline(1, color="#666666", linestyle="--", linewidth=0.8)
    ax.set(yscale="log", xlabel="step", ylabel="signal-to-noise ratio")
    return _finished(ax, legend=True)


def _positive(found: HasEigenvalues | Tensor) -> Tensor:
    """Eigenvalues that a logarithmic scale has, in descending order.

    Raises:
        TypeError: if there are none.
    """
    given = found if isinstance(found, Tensor) else getattr(found, "eigenvalues", None)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"Expected a spectrum, a tensor of eigenvalues, or several of them by name, as in {{'exact': a, 'mc': b}}; "
            f"got a {type(found).__name__}."
        )
    values = given.detach().cpu().double()
    return values[values > 0].sort(descending=True).values


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _finished(ax: Axes, *, legend: bool) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False)
    return ax
