"""The pictures and the page of the demo, with matplotlib, the optional extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lapkit.calibration import entropy, reliability_curve, report
from lapkit.datasets import Digits

# The posterior whose digits are shown.
POSTERIOR = "kron, all layers"


def pictures(data: Digits, predictives: Mapping[str, Tensor], out: Path) -> tuple[Path, ...]:
    """Reliability diagrams of MAP and of the posterior over all layers, and the digits it is most and least sure of.

    Args:
        data: with the test digits.
        predictives: their probabilities by name.
        out: folder, made if need be.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    names = ("MAP", POSTERIOR)
    figure = Figure(figsize=(9, 5), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), names, strict=True):
        reliability_curve(predictives[name], data.test_y).plot(ax)
        ax.set_title(name)
    reliability = out / "reliability.png"
    figure.savefig(reliability, dpi=120)

    probabilities = predictives[names[1]].cpu()
    order = entropy(probabilities).argsort(stable=True)
    count = 8
    figure = Figure(figsize=(count * 1.15, 3.4), layout="constrained")
    rows = figure.subplots(2, count)
    titles = ("most certain", "least certain")
    for axes, chosen, title in zip(rows, (order[:count], order.flip(0)[:count]), titles, strict=True):
        axes[0].set_ylabel(title, fontsize=10)
        for ax, i in zip(axes, chosen.tolist(), strict=True):
            confidence, guess = probabilities[i].max(0)
            right = int(guess) == int(data.test_y[i])
            ax.imshow(data.test_x[i, 0].numpy(), cmap="gray_r", vmin=-0.5, vmax=1.5, interpolation="bicubic")
            ax.set_title(
                f"{data.classes[int(guess)]} at {float(confidence):.0%}\nis {data.classes[int(data.test_y[i])]}",
                fontsize=9,
                color="black" if right else "#D55E00",
            )
            ax.set_xticks([])
            ax.set_yticks([])
    certain = out / "certain_and_uncertain.png"
    figure.savefig(certain, dpi=120)
    return reliability, certain


def page(data: Digits, inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], out: Path) -> Path:
    """The report of all predictives but those of the last layer as a page to be read in a browser.

    Args:
        data: with the labels of the test digits.
        inside: probabilities of the test digits by name.
        outside: those of the digits of classes that were held out.
        out: folder, which is there.

    Returns:
        The file.
    """
    names = [name for name in inside if not name.endswith("last layer")]
    found = report(
        {name: inside[name] for name in names},
        data.test_y,
        ood={name: outside[name] for name in names},
        inputs=data.test_x,
        class_names=[str(digit) for digit in data.classes],
        title="Noisy handwritten digits",
        notes=[
            "Real digits 0 to 7 with sensor noise; out of distribution: the digits 8 and 9, which training never saw.",
            "The temperature of each half of the test digits was fitted to the other half.",
        ],
        focus=POSTERIOR,
    )
    return found.save(out / "report.html")
