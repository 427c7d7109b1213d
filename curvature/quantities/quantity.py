"""Which structure: the form in which `sum_n J_n^T S_n S_n^T J_n` is kept.

Quantities add up over columns, batches and machines. Several ride one backward pass.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.results import Result


class Quantity(ABC):
    """A sum over the data of something made of the layers' Jacobians.

    `accumulate` calls, in this order: `begin` once; for each batch `begin_batch`, then for each chunk of columns
    `update` for each parameter and `end_columns`, then `end_batch`.

    Args:
        parameters: the weights, whose order the result follows.
        columns: which columns it wants, if not those of the call.
    """

    columns: Columns | None = None

    def __init__(self, parameters: Parameters, *, columns: Columns | None = None) -> None:
        self.parameters = parameters
        self.columns = self.columns if columns is None else columns
        self._count: int | None = 0
        self.about: dict[str, str] = {}

    @property
    def count(self) -> int:
        """The number of examples so far.

        Raises:
            RuntimeError: if a batch was broken off.
        """
        if self._count is None:
            raise RuntimeError(
                "An error broke off a batch half way, which this quantity has counted in part: it has no result. "
                "Begin again with a new one."
            )
        return self._count

    def abandon(self) -> None:
        """A batch was broken off: there is no result from now on."""
        self._count = None

    def begin(self, columns: Columns, likelihood: Likelihood) -> None:
        """Learn what will be summed; a second pass must sum the same.

        Raises:
            ValueError: if an earlier pass was over other columns or another likelihood.
        """
        about = {"columns": described(columns), "likelihood": described(likelihood)}
        if self.count and not about.items() <= self.about.items():
            raise ValueError(f"This quantity holds sums of {self.about}, which {about} cannot be added to.")
        self.about = {**self.about, **about}

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """A batch of N examples begins; their weights `(N,)`, if there are any, are in the columns already."""
        self._count = self.count + examples

    @abstractmethod
    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """Take one parameter's Jacobian for a chunk of columns.

        A parameter whose derivative autograd knows to be zero is left out.

        Args:
            name: the parameter.
            jacobian: for some of the columns of one batch.
            first: whether it is the first chunk of columns of this batch.
        """

    def end_columns(self) -> None:  # noqa: B027 (most quantities have nothing left to do)
        """Called after each chunk of columns, when every parameter's Jacobian has been seen."""

    def end_batch(self) -> None:  # noqa: B027 (likewise)
        """Called after the last chunk of columns of a batch."""

    @abstractmethod
    def result(self) -> Result:
        """What has been summed so far, apart from what comes later."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, in flat order."""
        return {n: tuple(p.shape) for n, p in zip(self.parameters.names, self.parameters.tensors, strict=True)}


def described(settings: object) -> str:
    """A frozen dataclass by its fields, anything else by its type: equal words for equal settings."""
    name = type(settings).__qualname__
    if not is_dataclass(settings):
        return name
    return f"{name}({', '.join(f'{f.name}={_field(getattr(settings, f.name))}' for f in fields(settings))})"


def _field(value: object) -> str:
    """A tensor by all of its bits, which its printed form leaves out."""
    if isinstance(value, Tensor):
        bits = hashlib.sha1(value.detach().cpu().double().numpy().tobytes()).hexdigest()
        return f"tensor{tuple(value.shape)}:{bits}"
    return described(value) if is_dataclass(value) else repr(value)


def add_to(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Add in place; the first value is copied, since two parameters may have been handed the same.

    Raises:
        ValueError: if the shape differs from that of earlier batches; it must not be broadcast.
    """
    if key in sums:
        check_same_form(key, sums[key].shape, value.shape)
        sums[key] += value
    else:
        sums[key] = value.clone()


def check_same_form(key: str, before: torch.Size, now: torch.Size) -> None:
    """Refuse to add what has another shape than the sum of earlier batches.

    Raises:
        ValueError: if the shapes differ.
    """
    if before != now:
        raise ValueError(
            f"Parameter {key.partition('/')[2]!r} is used in another way in this batch than before: its curvature has "
            f"the form {tuple(now)} after {tuple(before)}. Use batches that take the same path through the model, of "
            "more than one example each (drop_last=True, or another batch size), or a structure without Kronecker "
            "factors."
        )
