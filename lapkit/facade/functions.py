"""The outputs f as random functions: Gaussians of the linearised network, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from lapkit.choices import PRED_TYPES, choice
from lapkit.curvature import borrowed
from lapkit.curvature.inputs import to_device
from lapkit.facade.posterior import Posterior
from lapkit.posteriors import (
    FunctionDistribution,
    differentiable_joint,
    differentiable_linearized,
    differentiable_samples,
    function_samples,
    jointly_linearized,
    linearized,
    sampled_outputs,
)

_Statistic = TypeVar("_Statistic")


class Functions(Posterior):
    """What the posterior over weights means for the network's outputs."""

    def function_distribution(self, x: Any) -> FunctionDistribution:
        """The Gaussian over the outputs f of the linearised network, `N(f(x), J P^{-1} J^T)` for each input.

        Args:
            x: a batch of inputs.

        Returns:
            Means `(N, C)` and covariances `(N, C, C)`, without observation noise.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        precision, engine, differentiable = self.posterior.precision, self._checked_engine(), self._differentiable(x)
        with borrowed(self.model, engine.parameters):
            of_x = differentiable_linearized if differentiable else linearized
            found = of_x(engine, to_device(x, engine.parameters.device), precision)
        self._check_outputs(found.mean)
        return found

    def functional_variance(self, x: Any) -> Tensor:
        """`J P^{-1} J^T` of each input, `(N, C, C)`: the covariance of its outputs, without observation noise.

        Args:
            x: a batch of inputs; differentiable in them as predictions are.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        return self.function_distribution(x).covariance

    def functional_covariance(self, x: Any) -> Tensor:
        """`J P^{-1} J^T` of all inputs together, `(N C, N C)`, inputs first; without observation noise.

        Args:
            x: a batch of inputs; differentiable in them as predictions are.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        return self._all_functions(x)[1].flatten(2).flatten(0, 1)

    def functional_samples(
        self,
        x: Any,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        *,
        joint: bool = False,
        pred_type: str = "glm",
        diagonal_output: bool = False,
    ) -> Tensor:
        """Samples of the outputs f.

        Args:
            x: a batch of inputs.
            n_samples: how many, S.
            generator: the only source of randomness.
            joint: of "glm": draw whole functions, in which the outputs of all inputs vary together, not each input by
                itself.
            pred_type: "glm", of the linearised network; or "nn", of the network itself at samples of its weights, which
                are whole functions always.
            diagonal_output: draw the outputs of an input independently; not with whole functions.

        Returns:
            `(S, N, C)`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if `pred_type` is unknown, independent outputs are asked of whole functions, or there is not at
                least one sample.
        """
        choice(PRED_TYPES, pred_type, "pred_type")
        if n_samples < 1:
            raise ValueError(f"Expected at least one sample, got n_samples={n_samples}.")
        if diagonal_output and (joint or pred_type == "nn"):
            raise ValueError(
                "Outputs of whole functions vary together: diagonal_output goes with neither joint=True nor "
                "pred_type='nn'."
            )
        if pred_type == "nn":
            return self._at_samples(lambda f: torch.stack(list(f)), x, n_samples, generator)
        if not joint:
            f = self.function_distribution(x)
            return (f.independent() if diagonal_output else f).sample(n_samples, generator)
        engine, differentiable = self._checked_engine(), self._differentiable(x)
        deviations = engine.complete(self.posterior.sample(n_samples, generator)) - engine.complete(self.mean)
        with borrowed(self.model, engine.parameters):
            of_x = differentiable_samples if differentiable else function_samples
            found = of_x(engine.of_tensors, to_device(x, engine.parameters.device), deviations)
        self._check_outputs(found[0])
        return found

    def predictive_samples(
        self,
        x: Any,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        *,
        joint: bool = False,
        pred_type: str = "glm",
        diagonal_output: bool = False,
    ) -> Tensor:
        """Samples of the mean of y: class probabilities, or f for regression, `(S, N, C)`.

        Args:
            x: a batch of inputs.
            n_samples: how many, S.
            generator: the only source of randomness.
            joint: as for `functional_samples`; so too for classes.
            pred_type: as for `functional_samples`.
            diagonal_output: as for `functional_samples`.

        Returns:
            `(S, N, C)`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if `pred_type` is unknown, or independent outputs are asked of whole functions.
        """
        f = self.functional_samples(
            x, n_samples, generator, joint=joint, pred_type=pred_type, diagonal_output=diagonal_output
        )
        return self.likelihood.inverse_link(f)

    def _at_samples(
        self,
        statistic: Callable[[Iterator[Tensor]], _Statistic],
        x: Any,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> _Statistic:
        """A statistic of the network's outputs `(N, *, C)` at samples of its weights, which it sees one by one."""
        posterior, engine, differentiable = self.posterior, self._checked_engine(), self._differentiable(x)
        with borrowed(self.model, engine.parameters), torch.set_grad_enabled(differentiable):
            samples = sampled_outputs(engine, posterior, x, n_samples, generator)
            return statistic(self._check_outputs(f) for f in samples)

    def _all_functions(self, x: Any) -> tuple[Tensor, Tensor]:
        """Means `(N, *, C)` of the outputs at all inputs together, and their covariance `(N, K, N, K)`."""
        precision, engine, differentiable = self.posterior.precision, self._checked_engine(), self._differentiable(x)
        with borrowed(self.model, engine.parameters):
            of_x = differentiable_joint if differentiable else jointly_linearized
            mean, covariance = of_x(engine, to_device(x, engine.parameters.device), precision)
        self._check_outputs(mean)
        return mean, covariance

    def _check_outputs(self, mean: Tensor) -> Tensor:
        """Outputs `(N, *, C)`, of as many numbers as those that were fitted: one example without an axis has others.

        Raises:
            ValueError: if they differ.
        """
        outputs = self.fitted.outputs
        if mean.ndim == 2 and mean.shape[1] not in self.likelihood.predicted_outputs(outputs):
            raise ValueError(
                f"The network has {mean.shape[1]} outputs for each of {len(mean)} examples; it was fitted to "
                f"{outputs:g}. A single input needs an axis for the examples, x[None]."
            )
        return mean

    def _differentiable(self, x: Any) -> bool:
        """Whether a gradient in the inputs is wanted.

        Raises:
            ValueError: if one in hyper-parameters is wanted too.
        """
        wanted = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        hyper = (torch.as_tensor(h) for h in (self.prior.precision, self.likelihood.precision))
        if wanted and any(h.requires_grad for h in hyper):
            raise ValueError(
                "Inputs and hyper-parameters both require gradients; predictions have them in one or the other. Detach "
                "the prior precision and the noise, or the inputs."
            )
        return wanted
