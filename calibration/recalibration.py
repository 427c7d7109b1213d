"""Recalibration: a map from predictions to better calibrated ones, fitted on data that training did not see.

Each kind is a frozen dataclass with `fit`, a call, and a plain `state_dict`. Fit it on a held-out part of the data and
score it on another: scored on the data it was fitted to, it looks better than it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor


class Recalibration(ABC):
    """What all fitted recalibrations have in common: they are called, stored and printed."""

    kinds: ClassVar[dict[str, type[Recalibration]]] = {}

    def __init_subclass__(cls) -> None:
        Recalibration.kinds[cls.__name__] = cls

    @abstractmethod
    def __call__(self, *predictions: Any) -> Any:
        """Recalibrated predictions, in the form that the kind says."""

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds, as tensors, numbers and words; `torch.load(weights_only=True)` reads it.

        Returns:
            The kind, and each field.
        """
        return {"kind": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        held = (f"{field.name}={_brief(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(held)})"


def load_recalibration(state: Mapping[str, Any]) -> Recalibration:
    """The recalibration that a state was taken of.

    Args:
        state: from `state_dict`.

    Returns:
        An equal one.

    Raises:
        ValueError: if it is no such state.

    Example:
        >>> from lapkit.calibration import TemperatureScaling
        >>> load_recalibration(TemperatureScaling(1.5).state_dict())
        TemperatureScaling(temperature=1.5)
    """
    kind = Recalibration.kinds.get(str(state.get("kind")))
    names = {field.name for field in fields(kind)} if kind else set()  # type: ignore[arg-type]
    if kind is None or names != set(state) - {"kind"}:
        raise ValueError(
            f"The state has the keys {sorted(state)} and the kind {state.get('kind')!r}; expected what state_dict() of "
            f"a recalibration returned, of kind {', '.join(sorted(Recalibration.kinds))}."
        )
    return kind(**{name: state[name] for name in names})


def _brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value:.4g}" if isinstance(value, float) else repr(value)
    return f"{value.tolist():.4g}" if value.ndim == 0 else f"<{' x '.join(map(str, value.shape))}>"
