"""Predictions: what the random functions mean for the targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from lapkit.choices import PRED_TYPES, choice
from lapkit.facade.functions import Functions
from lapkit.posteriors import (
    LINKS,
    FunctionDistribution,
    Uncertainty,
    class_distribution,
    mean_of,
    mean_outputs,
    predictive,
    sampled_moments,
    uncertainty,
)


class Predictions(Functions):
    """Probabilities of classes, and moments of real targets."""

    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The predictive: of the linearised network (GLM), or of the network itself by samples of its weights.

        Args:
            x: a batch of inputs. If it is a tensor that requires a gradient, so do the results, at the cost of the
                expanded Jacobian and of a backward pass for each example and output.
            pred_type: "glm", in closed form; or "nn", one forward pass for each sample of the weights. Samples of the
                weights underfit badly where the network is far from linear in them; prefer "glm".
            joint: of "glm", for regression: the covariance between all inputs too, `(N C, N C)`.
            link_approx: for classes: "probit", "probit_centered" (blind to what all logits share, as the softmax is),
                "mean_field", "bridge", "bridge_norm" (closed forms), "gauss_hermite" (exact, for two classes), "mc" or
                "qmc" (samples of the outputs, independent or from a Sobol sequence). Of "glm" only.
            n_samples: for "mc", "qmc" and "nn".
            diagonal_output: take the outputs of an input for independent; for regression, give variances `(N, C)`.
            generator: for "mc", "qmc" and "nn", the only source of randomness.

        Returns:
            For classes, probabilities `(N, C)`. For regression, the outputs' mean `(N, C)` and covariance `(N, C,
            C)`, or for "nn" the samples' mean and unbiased variance, both `(N, C)`; add `sigma_noise ** 2` for targets,
            or ask `predictive_distribution`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if a name is unknown, `joint` is asked for classes or samples of the weights, or there are too
                few samples.
        """
        choice(PRED_TYPES, pred_type, "pred_type")
        link = choice(LINKS, link_approx, "link_approx")
        regression = mean_outputs(self.likelihood, 2) > 0
        if joint:
            if not regression or pred_type == "nn":
                raise ValueError(
                    "A joint predictive is defined for regression by the linearised network, pred_type='glm'; for "
                    "others use functional_samples or predictive_samples with joint=True."
                )
            return self._joint(x)
        if pred_type == "nn" and not regression:
            return self._at_samples(lambda f: mean_of(f, self.likelihood.inverse_link), x, n_samples, generator)
        f = self._functions(x, pred_type, n_samples, generator)
        if regression:
            f = f.first(mean_outputs(self.likelihood, f.mean.shape[-1]))
            return f.mean, f.variance if diagonal_output or pred_type == "nn" else f.covariance
        return link(self.likelihood, f.independent() if diagonal_output else f, n_samples, generator)

    def predictive_distribution(
        self,
        x: Any,
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        *,
        pred_type: str = "glm",
    ) -> Distribution:
        """`p(y|x)`, observation noise included.

        Args:
            x: a batch of inputs.
            link_approx: for classes, as for predictions.
            n_samples: of "mc", "qmc" and "nn".
            generator: of "mc", "qmc" and "nn".
            pred_type: "glm", or "nn": by samples of the weights; for real targets the Gaussian with their moments.

        Returns:
            `Categorical`, independent `Bernoulli` or `MultivariateNormal` of `torch.distributions`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if the link is unknown.
        """
        choice(PRED_TYPES, pred_type, "pred_type")
        link = choice(LINKS, link_approx, "link_approx")
        if pred_type == "nn" and not mean_outputs(self.likelihood, 2):
            mean = self._at_samples(lambda f: mean_of(f, self.likelihood.inverse_link), x, n_samples, generator)
            return class_distribution(self.likelihood, mean)
        f = self._functions(x, pred_type, n_samples, generator)
        return predictive(self.likelihood, f, link, n_samples, generator)

    def uncertainty(self, x: Any, n_samples: int = 512, generator: torch.Generator | None = None) -> Uncertainty:
        """How much of the predictive uncertainty is the weights' (epistemic) and how much the data's (aleatoric).

        Args:
            x: a batch of inputs.
            n_samples: for more than two classes, quasi-Monte Carlo samples of the outputs.
            generator: of these.

        Returns:
            For classes expected entropy and mutual information, in nats; for other targets, variances. `total` adds
            them.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            TypeError: if the split is not known for the likelihood.
        """
        return uncertainty(self.likelihood, self.function_distribution(x), n_samples, generator)

    def _functions(
        self, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None
    ) -> FunctionDistribution:
        """The outputs' Gaussian: of the linearised network, or with the moments of samples."""
        if pred_type == "glm":
            return self.function_distribution(x)
        return self._at_samples(sampled_moments, x, n_samples, generator)

    def _joint(self, x: Any) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the targets' means at all inputs together, inputs first."""
        mean, covariance = self._all_functions(x)
        outputs = mean.shape[-1]
        kept, rows = mean_outputs(self.likelihood, outputs), mean.numel() // outputs
        mean, boxed = mean[..., :kept].flatten(), covariance.reshape(rows, outputs, rows, outputs)
        return mean, boxed[:, :kept, :, :kept].reshape(len(mean), len(mean))
