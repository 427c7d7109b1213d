"""Events, flags and scores of single examples, checked and brought to a common form; see `inputs`."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_labels, as_probabilities, as_tensor, check_floating, first_of


def as_events(probabilities: Array, occurred: Array) -> tuple[Tensor, Tensor]:
    """Checked probabilities of one event and whether it occurred, both as `(N,)` float64.

    Args:
        probabilities: `(N,)` probabilities of the event.
        occurred: `(N,)` booleans, or integers 0 and 1.

    Returns:
        The probabilities `(N,)`, and the outcomes `(N,)` as 0.0 and 1.0 on the same device.

    Raises:
        ValueError: the probabilities are not `(N,)`.
    """
    given = as_tensor(probabilities)
    if given.ndim != 1:
        raise ValueError(
            f"shape of probabilities is {tuple(given.shape)}, expected (N,), those of one event. "
            "Choose a class with probabilities[:, k], or use reliability_curve for the top label."
        )
    rows = as_probabilities(given)
    outcomes = as_tensor(occurred)
    outcomes = outcomes.to(torch.int64) if outcomes.dtype == torch.bool else outcomes
    return rows[:, 1].contiguous(), as_labels(outcomes, rows, "occurred").to(torch.float64)


def as_flags(flags: Array, scores: Tensor, name: str) -> Tensor:
    """Checked yes or no of each example as `(N,)` float64.

    Args:
        flags: `(N,)` booleans, or integers 0 and 1.
        scores: the checked numbers `(N,)` that they belong to.
        name: what the caller names the flags, for the error.

    Returns:
        Ones and zeros `(N,)` on the device of the scores.

    Raises:
        TypeError: the flags are neither booleans nor integers.
        ValueError: their shape is not `(N,)`, or one of them is not 0 or 1.
    """
    given = as_tensor(flags)
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"dtype of {name} is {given.dtype}, expected booleans. Compare first, as in {name} > 0.5.")
    if given.shape != scores.shape:
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, expected {tuple(scores.shape)}, one for each score."
        )
    low, high = (int(extreme) for extreme in given.to(torch.int64).aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"{name} range from {low} to {high}, expected booleans, or integers 0 and 1.")
    return given.to(device=scores.device, dtype=torch.float64)


def as_scores(scores: Array, name: str) -> Tensor:
    """Checked real scores as `(N,)` float64.

    Args:
        scores: `(N,)` finite numbers, N > 0.
        name: what the caller names the scores, for the error.

    Returns:
        The scores `(N,)`.

    Raises:
        ValueError: the shape is not `(N,)` with N > 0, or a score is not finite.
    """
    given = as_tensor(scores)
    check_floating(given, name)
    if given.ndim != 1 or given.numel() == 0:
        raise ValueError(
            f"shape of {name} is {tuple(given.shape)}, expected (N,) with N > 0, one score per example. "
            f"Reduce further axes, or flatten them with {name}.reshape(-1)."
        )
    infinite = ~given.isfinite()
    if infinite.any():
        row = first_of(infinite)
        raise ValueError(f"{name}[{row}] is {given[row].item()}, expected finite scores. Leave it out.")
    return given.to(torch.float64)
