"""Which curvature: the output-space columns `S_n` of `H = sum_n J_n^T S_n S_n^T J_n`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import Likelihood


class ColumnSet(Protocol):
    """K columns, of which a slice at a time is made into a tensor `(k, N, *f.shape[1:])`; a tensor is one itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...

    def to(self, dtype: torch.dtype, /) -> ColumnSet:
        """The same columns in another type."""


@dataclass(frozen=True, eq=False)
class LazyColumns:
    """Columns that are computed when they are asked for.

    Args:
        count: their number K.
        compute: from a range of columns to `(k, N, *f.shape[1:])`.
        dtype: of what is given out.
    """

    count: int
    compute: Callable[[range], Tensor]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Tensor:
        return self.compute(range(self.count)[part]).to(self.dtype)

    def to(self, dtype: torch.dtype) -> LazyColumns:
        """The same columns in another type."""
        return LazyColumns(self.count, self.compute, dtype)


class Columns(ABC):
    """Makes the columns `(K, N, C)`, or `(K, N, T, C)` for T positions, that are sent back through the network.

    The curvature is that of the loss, free of dispersion; `dispersion_power` says how it scales with the likelihood's
    precision, `weight_power` which power of an example's weight multiplies its columns, `random` whether there is
    chance in it.
    """

    dispersion_power: ClassVar[int] = 1
    weight_power: ClassVar[float] = 0.5
    random: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> ColumnSet:
        """Columns for outputs `f`, `(N, C)` or `(N, T, C)`, and checked targets `y`.

        Random ones follow `draws`; without, torch's global generator.
        """


def loss_gradient(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """`d loss / df` of each example, in the shape of `f`."""
    return likelihood.loss_gradient(f, y)


@dataclass(frozen=True)
class GGN(Columns):
    """The exact generalised Gauss-Newton, for most likelihoods the Fisher: `S S^T = d^2 loss / df^2`.

    With T positions there are `K T` columns, each of which is zero but for one position. They are computed a chunk at a
    time; `RandomSignGGN` and `MonteCarloGGN` do with fewer.

    Args:
        classes: only the part of these outputs, `sum_c s_c s_c^T` over the columns `s_c` of the symmetric root, which
            has one for each output; the parts of all classes add up to the whole.

    Raises:
        ValueError: if classes are given, but none, or one twice.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.15b) and (5.6); the number of columns is the rank of the
        Hessian.
    """

    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
            if not self.classes or len(set(self.classes)) < len(self.classes):
                raise ValueError(f"Expected at least one class and none twice, got classes={self.classes}.")

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> LazyColumns:
        """The likelihood's own root; draws do not matter."""
        root, count = self._root(likelihood, f)
        if f.ndim == 2:
            return LazyColumns(count, lambda part: root(f, y, part), f.dtype)
        return LazyColumns(count * f.shape[1], lambda part: _one_position(root, count, f, y, part), f.dtype)

    def _root(self, likelihood: Likelihood, f: Tensor) -> tuple[Root, int]:
        """What computes the columns `(k, N, C)` of one position, and how many there are.

        Raises:
            ValueError: if there is no such class.
        """
        if self.classes is None:
            return lambda f, y, part: likelihood.hessian_root(f, y, slice(part.start, part.stop)), likelihood.rank(f)
        if not all(0 <= c < f.shape[-1] for c in self.classes):
            raise ValueError(f"Classes {self.classes} were asked for, the model has outputs 0 ... {f.shape[-1] - 1}.")
        chosen = torch.tensor(self.classes, device=f.device)
        return lambda f, y, part: likelihood.class_root(f, y, chosen[part.start : part.stop]), len(self.classes)


Root = Callable[[Tensor, Tensor, range], Tensor]


def _one_position(root: Root, count: int, f: Tensor, y: Tensor, part: range) -> Tensor:
    """Columns `(k, N, T, C)`, number `t * count + j` being column j of position t."""
    columns = f.new_zeros(len(part), *f.shape)
    for t in range(part.start // count, -(-part.stop // count)):
        own = range(max(part.start, t * count), min(part.stop, (t + 1) * count))
        inside = range(own.start - t * count, own.stop - t * count)
        columns[own.start - part.start : own.stop - part.start, :, t] = root(f[:, t], y[:, t], inside)
    return columns


@dataclass(frozen=True)
class LossGradient(Columns):
    """One column an example, the gradient of the loss at the observed label: all first-order quantities come from it.

    It carries the precision, and an example's weight, once.
    """

    weight_power: ClassVar[float] = 1.0

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> Tensor:
        """The gradient of the loss at the data's own targets."""
        return likelihood.loss_gradient(f, y)[None]


@dataclass(frozen=True)
class EmpiricalFisher(Columns):
    """One column an example, the gradient at the observed label.

    This gives the uncentred covariance of gradients, which is not a curvature in general.
    The gradient of a log likelihood carries the precision once, its outer product twice.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.29).
    """

    dispersion_power: ClassVar[int] = 2

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> Tensor:
        """The gradient of the loss at the data's own targets."""
        return likelihood.loss_gradient(f, y)[None]


@dataclass(frozen=True)
class CustomColumns(Columns):
    """Columns that a function makes: another curvature, or given ones, to compare with another library.

    Args:
        function: from likelihood, outputs `(N, C)` or `(N, T, C)`, checked targets and draws to a tensor `(K, N, C)` or
            `(K, N, T, C)`.

    Example:
        >>> import torch
        >>> ones = CustomColumns(lambda likelihood, f, y, draws: torch.ones_like(f)[None])
    """

    function: Callable[[Likelihood, Tensor, Tensor, Draws | None], ColumnSet]
    random: ClassVar[bool] = True

    def __call__(self, likelihood: Likelihood, f: Tensor, y: Tensor, draws: Draws | None = None) -> ColumnSet:
        """What the function returns.

        Raises:
            ValueError: if the columns do not have the shape of the outputs.
        """
        columns = self.function(likelihood, f, y, draws)
        shape = columns[0:1].shape[1:]
        if not len(columns) or shape != f.shape:
            raise ValueError(f"Expected columns (K, {', '.join(map(str, f.shape))}), got ({len(columns)}, *{shape}).")
        return columns
