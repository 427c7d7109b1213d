"""The reference's choices of single weights, as doors to `lapkit.subnetworks`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lapkit.choices import LIKELIHOODS
from lapkit.compat.laplace.utils.enums import Likelihood
from lapkit.curvature import Categorical, Parameters
from lapkit.curvature import Likelihood as Distribution
from lapkit.laplace import Laplace
from lapkit.subnetworks import (
    LargestMagnitude,
    LargestSwagVariance,
    LargestVariance,
    Named,
    RandomWeights,
    SubnetworkMask,
    Task,
)

if TYPE_CHECKING:
    from lapkit.compat.laplace.parametric import ParametricLaplace


class SubnetMask(ABC):
    """A choice of weights that is made once, by `select`.

    Args:
        model: the network.
    """

    distribution: Distribution = Categorical()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._indices: Tensor | None = None

    @abstractmethod
    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        """What lapkit calls it."""

    def select(self, train_loader: Iterable[Any] = ()) -> Tensor:
        """Choose.

        Args:
            train_loader: batches, for choices that need data.

        Returns:
            Indices into the flat vector of the weights that require gradients, ascending.

        Raises:
            ValueError: if the choice has been made before.
        """
        if self._indices is not None:
            raise ValueError("The subnetwork has been selected before; see `indices`.")
        chosen = self._mask(train_loader).choose(Task(self.model, self.distribution, train_loader))
        self._indices = chosen if chosen.dtype.is_signed else chosen.nonzero()[:, 0]
        return self._indices

    @property
    def indices(self) -> Tensor:
        """The chosen weights.

        Raises:
            AttributeError: before `select`.
        """
        if self._indices is None:
            raise AttributeError("Nothing has been selected: call select(train_loader) first.")
        return self._indices

    @property
    def n_params_subnet(self) -> int:
        """How many were chosen."""
        return len(self.indices)


class _Scored(SubnetMask):
    """A number of weights."""

    def __init__(self, model: nn.Module, n_params_subnet: int) -> None:
        super().__init__(model)
        self._count = n_params_subnet


class RandomSubnetMask(_Scored):
    """Weights drawn at random."""

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        return RandomWeights(self._count)


class LargestMagnitudeSubnetMask(_Scored):
    """The weights with the largest absolute values."""

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        return LargestMagnitude(self._count)


class LargestVarianceDiagLaplaceSubnetMask(_Scored):
    """The weights with the largest marginal variances under a diagonal posterior, which is fitted if it is not.

    Args:
        model: the network.
        n_params_subnet: how many.
        diag_laplace_model: over all weights.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, diag_laplace_model: ParametricLaplace) -> None:
        super().__init__(model, n_params_subnet)
        self.diag_laplace_model = diag_laplace_model

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        self.diag_laplace_model.fit(batches)
        return LargestVariance(self._count, self.diag_laplace_model.laplace)


class LargestVarianceSWAGSubnetMask(_Scored):
    """The weights that vary most along stochastic gradient descent.

    Args:
        model: the network, which is not touched.
        n_params_subnet: how many.
        likelihood: "classification" or "regression".
        swag_n_snapshots: of the descent.
        swag_snapshot_freq: epochs between two of them.
        swag_lr: learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        n_params_subnet: int,
        likelihood: str = Likelihood.CLASSIFICATION,
        swag_n_snapshots: int = 40,
        swag_snapshot_freq: int = 1,
        swag_lr: float = 0.01,
    ) -> None:
        super().__init__(model, n_params_subnet)
        self.distribution = LIKELIHOODS[Likelihood(likelihood).value]()
        self._descent = {"snapshots": swag_n_snapshots, "every": swag_snapshot_freq, "lr": swag_lr}

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        return LargestSwagVariance(self._count, **self._descent)  # type: ignore[arg-type]


class ParamNameSubnetMask(SubnetMask):
    """All weights of named parameters.

    Args:
        model: the network.
        parameter_names: as in `model.named_parameters()`.
    """

    def __init__(self, model: nn.Module, parameter_names: Sequence[str]) -> None:
        super().__init__(model)
        self._names = tuple(parameter_names)

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        return Named(self._names)


class ModuleNameSubnetMask(SubnetMask):
    """All weights of named modules, with those of modules inside.

    Args:
        model: the network.
        module_names: as in `model.named_modules()`.
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str]) -> None:
        super().__init__(model)
        self._names = tuple(module_names)

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        return Named(self._names)


class LastLayerSubnetMask(SubnetMask):
    """The last layer.

    Args:
        model: the network.
        last_layer_name: found by running the network on the first batch by default.
    """

    def __init__(self, model: nn.Module, last_layer_name: str | None = None) -> None:
        super().__init__(model)
        self._name = last_layer_name

    def _mask(self, batches: Iterable[Any]) -> SubnetworkMask:
        if self._name is not None:
            return Named((self._name,))
        last: Parameters = Laplace(self.model, self.distribution, "last_layer").select(islice(iter(batches), 1))
        return Named(last.names)
