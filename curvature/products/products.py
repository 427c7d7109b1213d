"""Curvature of a data set as a matrix that is only multiplied by: GGN, Fisher, empirical Fisher and Hessian.

Nothing of the size of the matrix is ever formed, so the number of weights does not matter. Each batch's graph is built
once and serves all vectors. A product with the GGN costs `J v` and `J^T w`, about a gradient without the forward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns, EmpiricalFisher
from lapkit.curvature.columns.random_columns import MonteCarloGGN
from lapkit.curvature.columns.sampling import seed_from
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.data_product import DataProduct
from lapkit.curvature.products.linearised import Linearised, Push, Restricted, check_symmetric
from lapkit.curvature.products.passes import Batch
from lapkit.curvature.products.vectors import Vectors, differentiated, pulled_back


@final
@dataclass(frozen=True, eq=False)
class GGNProduct(DataProduct):
    """The generalised Gauss-Newton, for most likelihoods the Fisher: `sum_n J_n^T (d^2 loss / df^2)_n J_n`.

    Arguments as for `lapkit.curvature.products.data_product.DataProduct`.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> product = GGNProduct(model, Gaussian(), [(torch.full((2, 1), 3.0), torch.zeros(2, 1))])
        >>> product @ torch.ones(1)
        tensor([18.])

    Reference:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002; Dangel,
        Backpropagation Beyond the Gradient, eq. (3.15b).
    """

    def _prepare(self, batch: Batch, count: int) -> Restricted:
        middle = partial(self.likelihood.hessian_product, batch.f, batch.y)
        return gauss_newton(batch, self.chosen, middle, self._pushed(batch, count))


@dataclass(frozen=True, eq=False)
class _OuterProducts(DataProduct):
    """`sum_n J_n^T S_n S_n^T J_n` with few columns S."""

    @property
    @abstractmethod
    def _columns(self) -> Columns: ...

    def _prepare(self, batch: Batch, count: int) -> Restricted:
        columns = self._columns(self.likelihood, batch.f, batch.y, batch.draws)[:].flatten(2)  # (K, N, T C)

        def outer(vector: Tensor) -> Tensor:
            coefficients = (columns * vector.flatten(1)).sum(-1, keepdim=True)
            return (columns * coefficients).sum(0).reshape(vector.shape)

        return gauss_newton(batch, self.chosen, outer, self._pushed(batch, count))


@final
@dataclass(frozen=True, eq=False)
class FisherProduct(_OuterProducts):
    """A Monte Carlo estimate of the Fisher, with gradients at sampled targets; unbiased for the GGN.

    The seed is drawn once and the random numbers belong to the examples: every product is with the same matrix,
    whatever the order of the data and the size of batches. Further arguments as for `DataProduct`.

    Args:
        samples: how many targets M are drawn for each example.
        generator: of the seed; torch's global one by default.

    Raises:
        ValueError: if there is not at least one sample.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.25), (5.8), (5.9).
    """

    samples: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self._columns  # noqa: B018 (too few samples are refused, and the seed is drawn, here)
        super().__post_init__()

    @cached_property
    def _columns(self) -> Columns:
        return MonteCarloGGN(self.samples, seed=seed_from(self.generator))


@final
@dataclass(frozen=True, eq=False)
class EmpiricalFisherProduct(_OuterProducts):
    """`sum_n g_n g_n^T` with the gradients of the examples' losses, which is not a curvature in general.

    Arguments as for `DataProduct`.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (3.29).
    """

    @property
    def _columns(self) -> Columns:
        return EmpiricalFisher()


@final
@dataclass(frozen=True, eq=False)
class HessianProduct(DataProduct):
    """The Hessian of the loss, `sum_n d^2 loss_n / d theta^2`, which may be indefinite; arguments as for `DataProduct`.

    It is the gradient of `g^T v`. The change of g in forward mode was measured and is not cheaper: in gradients, for
    each vector and without what serves them all, 1.5 against 1.4 for 3c3d, 2.2 against 1.3 for an MLP and 2.2 against
    2.0 for a transformer.

    Reference:
        Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """

    def _check_derivatives(self, batch: Batch) -> None:
        super()._check_derivatives(batch)
        check_symmetric(self._prepare(batch, 2), self.chosen)

    def _prepare(self, batch: Batch, count: int) -> Restricted:
        tensors = self.chosen.tensors
        gradients = differentiated(batch.losses(self.likelihood).sum(), tensors)

        def product(group: Sequence[int], vector: Vectors) -> Vectors:
            return pulled_back([gradients[i] for i in group], [tensors[i] for i in group], vector)

        return product


def gauss_newton(
    batch: Batch, parameters: Parameters, middle: Callable[[Tensor], Tensor], push: Push | None = None
) -> Restricted:
    """`J^T w M J v` with the weights w of the examples and a matrix M in the space of outputs.

    Args:
        batch: with its graph.
        parameters: the weights.
        middle: from `(N, *, C)` to the same, linear and symmetric.
        push: `J v` by other means than the derivative of `J^T u`.

    Returns:
        The product, over any of the parameters.
    """
    linear = Linearised(batch.output, parameters, push)
    linear.prepare()

    def product(group: Sequence[int], vector: Vectors) -> Vectors:
        return linear.pull(group, batch.weighted(middle(linear.push(group, vector).to(batch.f.dtype))))

    return product
