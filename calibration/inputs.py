"""Where probabilities, logits and labels that the user passes are checked and brought to a common form.

Events and scores are checked by `event_inputs`, regressions by `forecast_inputs`.

Past this module probabilities are `(N, C)` with C >= 2, float64 unless a metric needs but a column of them, labels
are `(N,)` int64 on the same device, and nothing carries a gradient. A wrong dtype raises TypeError, a wrong shape or
value ValueError; each says what was given, what was expected and what to do. The checks read the data once when all
is well; what is wrong is worked out only afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "Tensor | npt.NDArray[Any]"

# How far a row sum may lie from one. Loose enough for a softmax over many classes in that precision (float64
# also for float32 values that were widened later), tight enough to catch logits, percentages and unnormalised
# scores.
SUM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Low precision is summed in float32: with many classes its own sums would be off by more than the tolerance.
SUM_DTYPE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float32) | {
    torch.float64: torch.float64
}


def as_tensor(values: Array) -> Tensor:
    """A tensor without gradient; what is not a tensor is copied (read-only numpy arrays cannot be shared)."""
    if isinstance(values, np.ndarray):
        # Torch takes neither negative strides, as of `array[::-1]`, nor the other byte order.
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    return values.detach() if isinstance(values, Tensor) else torch.tensor(values)


def as_probabilities(probabilities: Array) -> Tensor:
    """Checked class probabilities as `(N, C)` float64; one column `p` becomes the two columns `1 - p, p`.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.

    Returns:
        The probabilities `(N, C)`, C >= 2, in float64 on their device, detached, none above one.
    """
    return as_rows(probabilities).to(torch.float64).clamp(max=1)


def as_rows(probabilities: Array) -> Tensor:
    """Checked class probabilities as `(N, C)`, in their own precision where they come as a table.

    For metrics of a column or a maximum, which is widened to float64 afterwards: a float64 copy of a large table
    costs more than the metric.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.

    Returns:
        The probabilities `(N, C)`, C >= 2, on their device, detached; one column `p` as `1 - p, p` in float64.
    """
    given = as_tensor(probabilities)
    check_floating(given, "probabilities")
    _check_table(given, "probabilities")
    rows = given
    if single := _is_single_column(given):
        positive = given.to(torch.float64).reshape(-1)
        # The clamp leaves a p just above one to the tolerance of the row sum, as for several columns.
        rows = torch.stack(((1 - positive).clamp(min=0), positive), dim=1)
    tolerance = SUM_TOLERANCE[given.dtype]
    if not _sum_to_one(rows, tolerance):
        _refuse_probabilities(rows.to(torch.float64), tolerance)
    return rows.clamp(max=1) if single else rows


def as_log_probabilities(logits: Array) -> Tensor:
    """Log-softmax of checked logits as `(N, C)` float64; one column `f` is read as the two logits `0, f`.

    Args:
        logits: `(N, C)` logits; or `(N,)` or `(N, 1)`, of the positive class; -inf rules a class out.

    Returns:
        The log-probabilities `(N, C)`, C >= 2, in float64 on their device, detached.

    Raises:
        ValueError: a row has a NaN, a +inf, or nothing but -inf, or the rows are probabilities.
    """
    given = as_tensor(logits)
    check_floating(given, "logits")
    _check_table(given, "logits")
    rows = given.to(torch.float64)
    # One row of logits may happen to be like one of probabilities.
    if len(rows) > 1 and not _is_single_column(rows) and _sum_to_one(given, SUM_TOLERANCE[given.dtype]):
        raise ValueError(
            f"All {len(rows)} rows have no number below zero and sum to one: these are probabilities, expected logits. "
            "Pass their logarithm, probabilities.log(), which will do for logits."
        )
    if _is_single_column(rows):
        positive = rows.reshape(-1)
        rows = torch.stack((torch.zeros_like(positive), positive), dim=1)
    log_probabilities = rows.log_softmax(dim=1)
    undefined = log_probabilities.isnan().any(dim=1)
    if undefined.any():
        raise ValueError(
            f"logits of example {first_of(undefined)} have a NaN, a +inf or nothing but -inf, expected finite "
            "numbers (and -inf only for a class that is ruled out). Look for overflow in the model."
        )
    return log_probabilities


def as_labels(labels: Array, rows: Tensor, name: str = "labels") -> Tensor:
    """Checked class labels as `(N,)` int64 on the device of the probabilities.

    Args:
        labels: `(N,)` integers in [0, C).
        rows: the checked probabilities `(N, C)` that the labels belong to.
        name: what the caller names the labels, for the error.

    Returns:
        The labels `(N,)`.

    Raises:
        TypeError: the labels are not integers.
        ValueError: their shape is not `(N,)`, or one of them is outside [0, C).
    """
    given = as_tensor(labels)
    count, classes = rows.shape
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"dtype of {name} is {given.dtype}, expected integers. Convert with {name}.long().")
    if given.shape != (count,):
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, expected ({count},), one for each row of "
            f"probabilities or logits. For one-hot rows pass {name}.argmax(dim=1)."
        )
    given = given.to(device=rows.device, dtype=torch.int64)
    low, high = (int(extreme) for extreme in given.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name} range from {low} to {high}, expected integers from 0 to {classes - 1} for {classes} "
            "classes. Number the classes from zero and leave out ignored examples (such as -100)."
        )
    return given


def as_finite(values: Array, name: str) -> Tensor:
    """Checked real numbers as float64.

    Args:
        values: of any shape.
        name: what the caller names them, for the error.

    Returns:
        The same, detached.

    Raises:
        TypeError: if they are no real numbers.
        ValueError: if one is not finite.
    """
    given = as_tensor(values)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"dtype of {name} is {given.dtype}, expected real numbers.")
    given = given.to(torch.float64)
    wrong = ~given.isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} at {place} is {given[place].item()}, expected finite numbers. Leave it out.")
    return given


def check_floating(given: Tensor, name: str) -> None:
    """Refuse what is not floating.

    Args:
        given: numbers.
        name: what the caller names them, for the error.

    Raises:
        TypeError: if it is of another type.
    """
    if given.dtype not in SUM_TOLERANCE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUM_TOLERANCE)
        raise TypeError(f"dtype of {name} is {given.dtype}, expected one of {known}. Convert with {name}.float().")


def _check_table(given: Tensor, name: str) -> None:
    if given.ndim not in {1, 2} or given.numel() == 0:
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, expected (N, C), or (N,) or (N, 1) for the positive "
            f"class, with N > 0. Flatten further axes with {name}.reshape(-1, C)."
        )


def _sum_to_one(rows: Tensor, tolerance: float) -> bool:
    """Whether rows are those of probabilities; NaN and infinities fail these comparisons as well, so it is one pass."""
    low, high = rows.sum(dim=1, dtype=SUM_DTYPE[rows.dtype]).aminmax()
    return float(rows.min()) >= 0 and float(low) >= 1 - tolerance and float(high) <= 1 + tolerance


def _is_single_column(rows: Tensor) -> bool:
    return rows.ndim == 1 or rows.shape[1] == 1


def _refuse_probabilities(rows: Tensor, tolerance: float) -> NoReturn:
    infinite, negative = ~rows.isfinite(), rows < 0
    if infinite.any():
        row = first_of(infinite.any(dim=1))
        fault = f"contain {rows[infinite][0].item()}, expected finite numbers. Look for overflow in the model"
    elif negative.any():
        row = first_of(negative.any(dim=1))
        fault = f"contain {rows[negative][0].item():.6g}, expected none below zero. "
        fault += "For logits pass logits.softmax(dim=1)"
    else:
        row = int((rows.sum(dim=1) - 1).abs().argmax())
        fault = f"sum to {rows[row].sum().item():.6g}, expected one within {tolerance:g}. "
        fault += "For logits pass logits.softmax(dim=1), else divide each row by its sum"
    raise ValueError(f"probabilities of example {row} {fault}. (One column p is read as the two columns 1 - p, p.)")


def first_of(mask: Tensor) -> int:
    """The place of the first that is true, `(N,)`."""
    return int(mask.nonzero()[0])
