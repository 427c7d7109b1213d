"""One call from predictions to a table and a page: how good are they, and how honest?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch.distributions import Distribution

from lapkit.calibration.forecast_inputs import Prediction
from lapkit.calibration.forecasts import Forecast
from lapkit.calibration.inputs import Array
from lapkit.calibration.report_classification import classification_report
from lapkit.calibration.report_regression import regression_report
from lapkit.calibration.report_table import Report


def report(
    predictions: Mapping[str, Array] | Mapping[str, Prediction],
    targets: Array,
    *,
    ood: Mapping[str, Array] | Mapping[str, Prediction] | None = None,
    inputs: Array | None = None,
    class_names: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    unit: str = "",
    title: str = "How good, and how sure",
    notes: Sequence[str] = (),
    focus: str | None = None,
    bins: int = 15,
) -> Report:
    """Scores of several predictions of the same targets, beside each other: a table to print and a page to read.

    Compare a method with what costs less: the network by itself, after temperature scaling, an ensemble.

    Args:
        predictions: of each method by name, all of one kind: class probabilities, `(N, C)` or `(N,)` of the positive
            class; or, for real targets, pairs `(mean, std)`, distributions of torch, or `Samples`, noise included.
        targets: `(N,)` labels, or `(N,)` or `(N, K)` numbers.
        ood: the same methods' predictions of inputs from outside the distribution that was trained on.
        inputs: of the N examples, to show the most uncertain: pictures `(N, H, W)` or `(N, 1 or 3, H, W)`, or features.
        class_names: of the C classes.
        feature_names: of the features.
        unit: of real targets.
        title: of the page.
        notes: sentences for the reader, such as what was fitted to which data.
        focus: the method whose most uncertain examples are shown; the last one if None.
        bins: of the calibration error of classes.

    Returns:
        The report: `print` it, take numbers by `to_dict()`, write the page by `save("report.html")`.

    Raises:
        TypeError: if the predictions are in no mapping, or of both kinds.
        ValueError: if there is none, or names in `ood`, `focus` or `class_names`, or inputs, do not fit.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 1, 0])
        >>> sure = torch.tensor([0.1, 0.9, 0.8, 0.9])
        >>> found = report({"MAP": sure, "halved": 0.25 + sure / 2}, labels, bins=5)
        >>> found.rows["MAP"]["NLL"], found.rows["halved"]["NLL"]
        (0.684, 0.587)
    """
    if not isinstance(predictions, Mapping) or not all(isinstance(name, str) for name in predictions):
        kind = type(predictions).__name__
        raise TypeError(
            f"The predictions are a {kind}, expected a mapping by method, such as {{'MAP': probabilities}}."
        )
    names, outside = list(predictions), dict(ood or {})
    if not names:
        raise ValueError("There is no prediction, expected at least one.")
    focus = names[-1] if focus is None else focus
    if focus not in names or (outside and set(outside) != set(names)):
        raise ValueError(
            f"focus is {focus!r} and ood has {list(outside)}; expected one and all of the methods {names}."
        )
    if inputs is not None and len(inputs) != len(targets):
        raise ValueError(f"There are {len(inputs)} inputs and {len(targets)} targets, expected as many.")
    kinds = {_is_regression(prediction) for prediction in (*predictions.values(), *outside.values())}
    if len(kinds) > 1:
        raise TypeError("Some predictions are probabilities and some are distributions, expected one kind.")
    given: dict[str, Any] = {"ood": outside, "inputs": inputs, "title": title, "notes": notes, "focus": focus}
    given["feature_names"] = feature_names
    if kinds.pop():
        return regression_report(cast("Mapping[str, Prediction]", predictions), targets, unit=unit, **given)
    arrays = cast("Mapping[str, Array]", predictions)
    return classification_report(arrays, targets, class_names=class_names, bins=bins, **given)


def _is_regression(prediction: object) -> bool:
    return isinstance(prediction, (tuple, Distribution, Forecast))
