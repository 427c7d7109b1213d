"""The report of class probabilities: scores, and what its pictures show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from lapkit.calibration.detection import auroc
from lapkit.calibration.inputs import Array, as_labels, as_rows
from lapkit.calibration.reliability import reliability_curve
from lapkit.calibration.report_diagrams import caption, draw_spread
from lapkit.calibration.report_examples import examples
from lapkit.calibration.report_page import panels
from lapkit.calibration.report_table import Column, Report, Section
from lapkit.calibration.scores import accuracy, brier, nll
from lapkit.calibration.selective import risk_coverage_curve
from lapkit.calibration.uncertainty import entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Examples that a page shows.
SHOWN = 12

ACCURACY = Column("accuracy", "", "larger", "Share of examples whose most probable class is the label.")
CONFIDENCE = Column(
    "confidence", "", None, "Mean probability of the most probable class. It should be equal to the accuracy."
)
NLL = Column(
    "NLL", "nats", "smaller", "Mean negative log-likelihood of the labels: punishes being wrong and sure most of all."
)
BRIER = Column("Brier", "0 to 2", "smaller", "Mean squared distance of the probabilities from the labels.")
ECE = Column("ECE", "", "smaller", "Expected calibration error: mean gap between confidence and accuracy over bins.")
CHANCE = Column(
    "by chance", "", None, "The ECE that a calibrated model with these accuracies would show with so few examples."
)
AURC = Column(
    "AURC",
    "",
    "smaller",
    "Area under the risk-coverage curve: the error rate when unsure examples are withheld, averaged.",
)
AUROC = Column(
    "OOD AUROC", "", "larger", "Chance that an example from outside has a higher entropy than one from inside."
)


def classification_report(
    predictions: Mapping[str, Array],
    labels: Array,
    *,
    ood: Mapping[str, Array],
    inputs: Array | None,
    class_names: Sequence[str] | None,
    feature_names: Sequence[str] | None,
    title: str,
    notes: Sequence[str],
    focus: str,
    bins: int,
) -> Report:
    """The report of several predictions of the same labels; for the arguments see `report`.

    Raises:
        ValueError: if class names are not as many as the classes.
    """
    # In their own precision, which says how far sums may be off.
    rows = {name: as_rows(p).cpu() for name, p in predictions.items()}
    classes = rows[focus].shape[1]
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"There are {len(class_names)} class_names, expected one for each of {classes} classes.")
    y = {name: as_labels(labels, p).cpu() for name, p in rows.items()}[focus]
    outside = {name: as_rows(p).cpu() for name, p in ood.items()}
    columns = (ACCURACY, CONFIDENCE, NLL, BRIER, ECE, CHANCE, AURC, *((AUROC,) if outside else ()))
    scores = {name: _scores(p, y, outside.get(name), bins) for name, p in rows.items()}
    sections = [
        Section(
            "Reliability",
            "Bars: accuracy of the examples in a bin of confidence. Hatched: the gap to their mean confidence. On the "
            "diagonal, 80 % sure means right 80 times in 100; below it a model is overconfident. The grey strip above "
            "counts examples.",
            lambda: panels(_reliability(rows, y, bins), size=(4.4, 5.0), wide=False),
        ),
        Section(
            "Withholding what is unsure",
            "Error rate (risk) of the most confident predictions, over the share of examples that is predicted "
            "(coverage). A good measure of confidence keeps the left part low.",
            lambda: panels([_risk(rows, y)], size=(6.4, 4.0), wide=True),
        ),
        Section(
            "Confidence" + (" in and out of distribution" if outside else ""),
            "How sure the most probable class is said to be. "
            + ("Outside no class is right, so the confidence there should be low." if outside else ""),
            lambda: panels(_confidence(rows, outside), size=(4.4, 3.4), wide=False),
        ),
    ]
    if inputs is not None:
        sections.append(_uncertain(inputs, rows[focus], y, focus, class_names, feature_names))
    elsewhere = f", and {len(next(iter(outside.values())))} from outside" if outside else ""
    summary = f"{len(y)} examples of {classes} classes{elsewhere}."
    return Report(title, summary, columns, scores, tuple(notes), tuple(sections))


def _scores(p: Tensor, y: Tensor, outside: Tensor | None, bins: int) -> dict[str, float]:
    curve = reliability_curve(p, y, bins=bins)
    found = {
        ACCURACY.name: accuracy(p, y),
        CONFIDENCE.name: float(_top(p).mean()),
        NLL.name: nll(p, y),
        BRIER.name: brier(p, y),
        ECE.name: curve.ece,
        CHANCE.name: curve.expected_by_chance,
        AURC.name: risk_coverage_curve(p, y).aurc,
    }
    if outside is not None:
        found[AUROC.name] = auroc(entropy(p), entropy(outside))
    return found


def _top(p: Tensor) -> Tensor:
    """Confidences; what rounding puts outside their range would be missing from pictures."""
    return p.amax(dim=1).double().clamp(1 / p.shape[1], 1)


_Drawing = tuple[str, Callable[["Axes"], object]]


def _reliability(rows: Mapping[str, Tensor], y: Tensor, bins: int) -> list[_Drawing]:
    def draw(ax: Axes, name: str) -> None:
        reliability_curve(rows[name], y, bins=bins).plot(ax).set_title(caption(name))

    return [(f"Reliability diagram of {name}", partial(draw, name=name)) for name in rows]


def _risk(rows: Mapping[str, Tensor], y: Tensor) -> _Drawing:
    def draw(ax: Axes) -> None:
        for name, p in rows.items():
            risk_coverage_curve(p, y).plot(ax, label=caption(name))

    return f"Risk over coverage of {', '.join(rows)}", draw


def _confidence(rows: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> list[_Drawing]:
    def draw(ax: Axes, name: str) -> None:
        p, q = rows[name], outside.get(name)
        draw_spread(
            ax,
            inside=_top(p).tolist(),
            outside=None if q is None else _top(q).tolist(),
            title=caption(name),
            label="confidence",
            limits=(1 / p.shape[1], 1),
        )

    return [(f"Confidence of {name}", partial(draw, name=name)) for name in rows]


def _uncertain(
    inputs: Array,
    p: Tensor,
    y: Tensor,
    focus: str,
    class_names: Sequence[str] | None,
    feature_names: Sequence[str] | None,
) -> Section:
    names = [str(k) for k in range(p.shape[1])] if class_names is None else [str(name) for name in class_names]
    doubt = entropy(p)
    places = doubt.argsort(descending=True, stable=True)[:SHOWN].tolist()
    guess = p.argmax(dim=1)
    captions = [(f"{names[int(guess[i])]}, {float(p[i].max()):.0%}", names[int(y[i])]) for i in places]
    wrong = [bool(guess[i] != y[i]) for i in places]
    return Section(
        "Most uncertain examples",
        f"The examples of the highest entropy under {focus}, with the most probable class, its probability, and the "
        "label. Orange: wrong.",
        lambda: examples(inputs, places, captions, ("predicted", "label"), wrong, feature_names),
    )
