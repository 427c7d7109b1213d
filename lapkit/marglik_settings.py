"""The settings of a training as numbers and words, by which another training is told from it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapkit.curvature import Likelihood
from lapkit.laplace import Laplace


def laplace_arguments(likelihood: str | Likelihood, hessian_structure: str, **options: Any) -> dict[str, Any]:
    """The arguments of `Laplace` by which one training differs from another, with the defaults of those left out.

    Args:
        likelihood: as for `Laplace`.
        hessian_structure: as for `Laplace`.
        options: the others that were given.

    Returns:
        By name, all but `memory_budget`, which is the machine's.
    """
    names = inspect.signature(Laplace).parameters.values()
    defaults = {p.name: p.default for p in names if p.default is not p.empty}
    found = defaults | options | {"likelihood": likelihood, "hessian_structure": hessian_structure}
    del found["memory_budget"]
    return found


def plain(value: Any) -> Any:
    """A setting as numbers and words, in lists and dicts of them: equal for equal settings, in any process.

    Functions and classes are their names, tensors of several numbers a digest, dataclasses their fields.

    Args:
        value: anything.

    Returns:
        What `torch.load(weights_only=True)` reads.

    Example:
        >>> plain({"lr": torch.tensor(0.5), "betas": (0, 0.9), "closure": torch.optim.SGD})
        {'lr': 0.5, 'betas': [0, 0.9], 'closure': 'torch.optim.sgd.SGD'}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration, its value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # numpy's too, which a checkpoint could not be read with
        return float(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return _digest(torch.as_tensor(value))
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, partial):
        return f"{plain(value.func)} with {plain(value.args)} and {plain(value.keywords)}"
    if is_dataclass(value) and not isinstance(value, type):
        parts = ", ".join(f"{f.name}={plain(getattr(value, f.name))!r}" for f in fields(value))
        return f"{type(value).__qualname__}({parts})"
    if callable(value):
        named = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(t: Tensor) -> float | str:
    """One number, or the shape with a digest of all bits."""
    if t.numel() == 1:
        return float(t.detach())
    bits = hashlib.sha1(t.detach().cpu().double().numpy().tobytes()).hexdigest()
    return f"tensor {tuple(t.shape)} of digest {bits[:12]}"
