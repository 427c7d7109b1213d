"""The reference's names for posteriors over functions. lapkit's is exact for the examples that it sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from lapkit.compat.laplace.last_layer import LLLaplace
from lapkit.compat.laplace.options import KEYS, PRIOR, Batches
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.utils.enums import LinkApprox, PredType
from lapkit.curvature import SymmetricOperator

_LAST = ("backend", "backend_kwargs", "independent_outputs", "seed")


class BaseFunctionalLaplace(ParametricLaplace):
    """A Gaussian process with the network's tangent kernel: the full GGN, in the space of the outputs.

    `n_subset` examples, drawn at random with `seed`, are all that the posterior and its evidence are of; without it all
    are seen. `pred_type` may be left out, or is "gp".
    """

    structure = "gp"

    def _weights(self) -> dict[str, Any]:
        return {**super()._weights(), "subset_of_data": self.options.n_subset}

    def _form(self, matrix: SymmetricOperator) -> SymmetricOperator:
        return matrix

    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> None:
        """Condition on the data, or on a random part of them.

        Args:
            train_loader: batches.
            override: start anew.
            progress_bar: show one.

        Raises:
            ValueError: if `independent_outputs` is asked for.
        """
        if self.options.independent_outputs:
            raise ValueError("independent_outputs=True is not offered: outputs that share weights are not independent.")
        batches = Batches(train_loader, self.options.dict_key_y)
        generator = torch.Generator().manual_seed(self.options.seed)
        self.laplace.fit(batches, override, progress_bar=progress_bar, generator=generator)

    def __call__(
        self,
        x: Any,
        pred_type: str = PredType.GP,
        joint: bool = False,
        link_approx: str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The predictive; see `ParametricLaplace`."""
        return super().__call__(
            x,
            _linearized(pred_type),
            joint,
            link_approx,
            n_samples,
            diagonal_output,
            generator,
            fitting,
            **model_kwargs,
        )

    def functional_samples(
        self,
        x: Any,
        pred_type: str = PredType.GP,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        joint: bool = False,
    ) -> Tensor:
        """Samples of the outputs, with `joint` of all inputs together; see `ParametricLaplace`."""
        if joint:
            return self.laplace.functional_samples(x, n_samples, generator, joint=True)
        return super().functional_samples(x, _linearized(pred_type), n_samples, diagonal_output, generator)

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = PredType.GP,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        joint: bool = False,
    ) -> Tensor:
        """Samples of the mean of y; see `functional_samples`."""
        if joint:
            return self.laplace.predictive_samples(x, n_samples, generator, joint=True)
        return super().predictive_samples(x, _linearized(pred_type), n_samples, diagonal_output, generator)

    def predictive_moments(self, x: Any, *, joint: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs, at each input or of all together."""
        return self._glm_predictive_distribution(x, joint)


class FunctionalLaplace(BaseFunctionalLaplace):
    """All weights."""

    order: ClassVar[tuple[str, ...]] = ("n_subset", *PRIOR, "enable_backprop", *KEYS, *_LAST)


class FunctionalLLLaplace(BaseFunctionalLaplace, LLLaplace):
    """The last layer."""

    order: ClassVar[tuple[str, ...]] = (
        "n_subset",
        *PRIOR,
        "enable_backprop",
        "feature_reduction",
        *KEYS,
        "last_layer_name",
        *_LAST,
    )


class ELLA:
    """Nyström features of the tangent kernel; not offered.

    Raises:
        ValueError: always.
    """

    def __init__(self, model: nn.Module, likelihood: str, *args: Any, **options: Any) -> None:
        _not_offered("ELLA", "it leaves out the prior's variance outside its K features, and is too sure")


class VaLLA:
    """Variational inducing outputs; not offered.

    Raises:
        ValueError: always.
    """

    def __init__(self, model: nn.Module, likelihood: str, *args: Any, **options: Any) -> None:
        _not_offered("VaLLA", "its posterior and prior come of a training of their own")


def _not_offered(name: str, why: str) -> NoReturn:
    """Say what there is instead.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{name} is not offered: {why}. The exact posterior over functions is hessian_structure='gp' (n_subset= for "
        "many data); with few columns, 'lowrank' of lapkit.Laplace with a rank."
    )


def _linearized(pred_type: str) -> str:
    """The reference calls the linearised network of this posterior "gp"."""
    return PredType.GLM if PredType(pred_type) is PredType.GP else pred_type
