"""Sums made of each example's gradient `g_n = w_n d loss_n / d theta`: mean, moments, covariance.

Gradients carry no factor 1/N: results are sums and a count, from which means follow. `w_n` is the example's weight, 1
where the data give none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import LossGradient
from lapkit.curvature.jacobians.conversion import converted
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.dense import GGNDense
from lapkit.curvature.quantities.quantity import Quantity, add_to
from lapkit.curvature.quantities.results import Sum

if TYPE_CHECKING:
    from typing_extensions import Self


class GradientTotal(Sum):
    """`sum_n g_n`, as `sum/NAME` in the shape of each parameter."""

    main: ClassVar[str] = "sum"

    def sum(self) -> dict[str, Tensor]:
        """`sum_n g_n`."""
        return self.part("sum")

    def mean(self) -> dict[str, Tensor]:
        """`(1/N) sum_n g_n`."""
        return {name: total / self.count for name, total in self.sum().items()}

    def vector(self) -> Tensor:
        """The mean as one vector `(P,)` in flat order."""
        return torch.cat([g.flatten() for g in self.mean().values()])


class MomentSum(GradientTotal):
    """Sums of gradients and of their squares, `sum/NAME`, `squares/NAME`, and `centred/NAME` about their mean.

    The last is `sum_n (g_n - mean)^2`, kept by itself: as a difference of the others it would be lost in single
    precision where gradients are nearly equal.
    """

    def __add__(self, other: Self) -> Self:
        """The result for the examples of both.

        Reference:
            Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983, eq. (2.1).
        """
        total = super().__add__(other)
        weight = self.count * other.count / total.count
        one, two = self.mean(), other.mean()
        between = {f"centred/{n}": weight * (one[n] - two[n]).square() for n in self.shapes}
        return replace(total, tensors={k: t + between[k] if k in between else t for k, t in total.tensors.items()})

    def sum_of_squares(self) -> dict[str, Tensor]:
        """`sum_n g_n^2`, entry by entry."""
        return self.part("squares")

    def second_moment(self) -> dict[str, Tensor]:
        """`(1/N) sum_n g_n^2`.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (B.3).
        """
        return {name: total / self.count for name, total in self.sum_of_squares().items()}

    def variance(self, *, unbiased: bool = False) -> dict[str, Tensor]:
        """`(1/N) sum_n (g_n - mean_n g_n)^2 = (1/N) sum_n g_n^2 - (mean_n g_n)^2`.

        Args:
            unbiased: multiply by `N / (N - 1)`.

        Returns:
            One tensor in the shape of each parameter.

        Raises:
            ValueError: if an unbiased one is asked for with a single example.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (B.4). BackPACK's `Variance` is this divided by `N^2`.
        """
        factor = bessel(self.count) if unbiased else 1.0
        return {name: total * (factor / self.count) for name, total in self.part("centred").items()}


class CovarianceSum(Sum):
    """`sum_n g_n g_n^T` as `matrix` `(P, P)`, and `sum_n g_n` as `sum` `(P,)`."""

    def uncentred(self) -> Tensor:
        """`(1/N) sum_n g_n g_n^T`, also called the empirical Fisher; not a curvature in general.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (3.29).
        """
        return self.tensors["matrix"] / self.count

    def centred(self, *, unbiased: bool = False) -> Tensor:
        """`(1/N) sum_n (g_n - g)(g_n - g)^T` with the mean gradient g.

        Args:
            unbiased: multiply by `N / (N - 1)`.

        Returns:
            `(P, P)`.

        Raises:
            ValueError: if an unbiased one is asked for with a single example.

        In single precision the difference of the two sums leaves an error of some 1e-7 times `uncentred()`; where
        gradients are nearly equal compute in double precision.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (3.30), (3.31).
        """
        mean = self.tensors["sum"] / self.count
        return (self.uncentred() - torch.outer(mean, mean)) * (bessel(self.count) if unbiased else 1.0)


def bessel(count: int) -> float:
    """`N / (N - 1)`.

    Raises:
        ValueError: if there is only one example.
    """
    if count < 2:
        raise ValueError("An unbiased variance needs at least two examples.")
    return count / (count - 1)


class GradientSum(Quantity):
    """`sum_n g_n`.

    Args:
        parameters: the weights.
    """

    columns = LossGradient()

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        ones = summable(self.parameters.tensors[0].detach()).new_ones(jacobian.shape[:2])
        add_to(self.sums, f"sum/{name}", jacobian.pull_back(ones))

    def filled(self, *what: str) -> dict[str, Tensor]:
        """Copies of the sums in the shapes of the parameters, zero where the outputs do not depend on one."""
        like = summable(self.parameters.tensors[0].detach())
        found = {(w, n): self.sums.get(f"{w}/{n}") for w in what for n in self.shapes}
        return {
            f"{w}/{n}": like.new_zeros(self.shapes[n]) if t is None else t.clone().reshape(self.shapes[n])
            for (w, n), t in found.items()
        }

    def result(self) -> GradientTotal:
        """See `Quantity.result`."""
        return GradientTotal(self.shapes, self.filled("sum"), self.count, self.about)


@final
class GradientMoments(GradientSum):
    """`sum_n g_n` and `sum_n g_n^2`: mean, second moment and variance of the gradients, entry by entry.

    Sums are made in double precision, since the variance is their difference.

    Args:
        parameters: the weights.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (B.3), (B.4).
    """

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        double = converted(jacobian, torch.float64)
        add_to(
            self.sums,
            f"sum/{name}",
            double.pull_back(self.parameters.tensors[0].detach().new_ones(jacobian.shape[:2], dtype=torch.float64)),
        )
        add_to(self.sums, f"squares/{name}", double.square_sum())

    def result(self) -> MomentSum:
        """See `Quantity.result`."""
        sums = self.filled("sum", "squares")
        for name in self.shapes:
            squares, total = sums[f"squares/{name}"], sums[f"sum/{name}"]
            sums[f"centred/{name}"] = (squares - total.square() / max(self.count, 1)).clamp_min(0)
        like = summable(self.parameters.tensors[0].detach())
        return MomentSum(self.shapes, {key: t.to(like) for key, t in sums.items()}, self.count, self.about)


@final
class GradientCovariance(Quantity):
    """`sum_n g_n g_n^T` over all weights, with the mean that centres it.

    Args:
        parameters: the weights.

    Raises:
        ValueError: if the matrix would not fit into the memory that is free.
    """

    columns = LossGradient()

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.matrix, self.sum = GGNDense(parameters), GradientSum(parameters)

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        super().begin_batch(examples, weights)
        self.matrix.begin_batch(examples, weights)

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.matrix.update(name, jacobian, first=first)
        self.sum.update(name, jacobian, first=first)

    def end_columns(self) -> None:
        """See `Quantity.end_columns`."""
        self.matrix.end_columns()

    def result(self) -> CovarianceSum:
        """See `Quantity.result`."""
        total = torch.cat([t.flatten() for t in self.sum.filled("sum").values()])
        tensors = {**self.matrix.result().tensors, "sum": total}
        return CovarianceSum(self.shapes, tensors, self.count, self.about)
