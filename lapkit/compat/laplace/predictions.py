"""Predictions and samples in the reference's order of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lapkit.compat.laplace.base import BaseLaplace
from lapkit.compat.laplace.options import whole
from lapkit.compat.laplace.utils.enums import Likelihood, LinkApprox, PredType
from lapkit.compat.laplace.utils.matrix import quadratic_form
from lapkit.curvature import Categorical
from lapkit.posteriors import LINKS


class Predictions(BaseLaplace):
    """What a posterior over weights predicts."""

    def __call__(
        self,
        x: Any,
        pred_type: str = PredType.GLM,
        joint: bool = False,
        link_approx: str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The predictive, as `lapkit.Laplace.__call__` has it.

        Args:
            x: inputs; a mapping goes to the model whole.
            pred_type: "glm" or "nn".
            joint: for regression, mean `(N C,)` and covariance `(N C, N C)` of all inputs together.
            link_approx: for classes; not read by "nn".
            n_samples: of "mc" and "nn".
            diagonal_output: outputs of an input are taken for independent.
            generator: the only source of randomness.
            fitting: of reward models: `x` are pairs, and probabilities of the preference are wanted instead of rewards.
            model_kwargs: must be empty.

        Returns:
            Probabilities `(N, C)`, or, for regression and rewards, mean and covariance of the outputs, without
            observation noise.

        Raises:
            TypeError: if there are arguments for the model.
        """
        _refuse(model_kwargs)
        if fitting and self.likelihood is Likelihood.REWARD_MODELING:
            link = LINKS[LinkApprox(link_approx).value]
            f = self.laplace.function_distribution(whole(x))
            return link(Categorical(), f.independent() if diagonal_output else f, n_samples, generator)
        return self.laplace(
            whole(x),
            PredType(pred_type).value,
            joint,
            LinkApprox(link_approx).value,
            n_samples,
            diagonal_output,
            generator,
        )

    def predictive(
        self,
        x: Any,
        pred_type: str = PredType.GLM,
        link_approx: str = LinkApprox.PROBIT,
        n_samples: int = 100,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same as calling."""
        return self(x, pred_type, link_approx=link_approx, n_samples=n_samples)

    def functional_samples(
        self,
        x: Any,
        pred_type: str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs, `(S, N, C)`.

        Args:
            x: inputs.
            pred_type: "glm" (independent between inputs) or "nn".
            n_samples: S.
            diagonal_output: outputs of an input are taken for independent; of "glm".
            generator: the only source of randomness.

        Returns:
            One function a row.
        """
        return self.laplace.functional_samples(
            whole(x), n_samples, generator, pred_type=PredType(pred_type).value, diagonal_output=diagonal_output
        )

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the mean of y: the softmax of samples of logits, or the outputs themselves, `(S, N, C)`.

        Args:
            x: inputs.
            pred_type: as for `functional_samples`.
            n_samples: S.
            diagonal_output: as for `functional_samples`.
            generator: the only source of randomness.

        Returns:
            One sample a row.
        """
        return self.laplace.predictive_samples(
            whole(x), n_samples, generator, pred_type=PredType(pred_type).value, diagonal_output=diagonal_output
        )

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights, `(S, P)`."""
        return self.laplace.sample(n_samples, generator)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """`J P^{-1} J^T` for each Jacobian `(C, P)` of a batch `(N, C, P)`: `(N, C, C)`."""
        return quadratic_form(self.laplace.posterior_precision, Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """`J P^{-1} J^T` for the Jacobians `(N, C, P)` of all inputs together: `(N C, N C)`."""
        return quadratic_form(self.laplace.posterior_precision, Js.reshape(1, -1, Js.shape[-1]))[0]

    def _glm_predictive_distribution(self, x: Any, joint: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs: private in the reference, and widely used."""
        if joint:
            return self.laplace(whole(x), joint=True)  # type: ignore[return-value]
        f = self.laplace.function_distribution(whole(x))
        return f.mean, f.covariance


def _refuse(model_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments for the model.

    Raises:
        TypeError: if there are any.
    """
    if model_kwargs:
        raise TypeError(
            f"Arguments for the model, {sorted(model_kwargs)}, are not passed on: the posterior was fitted to it "
            "without them. Put them into the batches, as a mapping of inputs, or into a module around the model."
        )
