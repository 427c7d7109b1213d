"""Scikit-learn estimators: a Bayesian neural network that fits into pipelines, grids and cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor, nn

from lapkit.choices import choice
from lapkit.curvature import Categorical, Gaussian
from lapkit.estimator_base import LaplaceEstimator
from lapkit.posteriors import LINKS


class LaplaceClassifier(ClassifierMixin, LaplaceEstimator):  # type: ignore[misc]
    """A classifier whose probabilities average over the posterior of its weights.

    A network is trained to its MAP estimate, the Laplace approximation fitted there, the prior precision set by the
    evidence, and the network trained again under it, a few times. Probabilities are those of the linearised predictive.

    Args:
        module: None for an MLP of this class's own, a `torch.nn.Module` that maps `(N, features)` to logits
            `(N, classes)`, or a function `(features, outputs) -> Module`. A module is copied, never changed.
        train: False takes the module as trained.
        hidden_layer_sizes: of the own MLP.
        activation: of the own MLP: "tanh", "relu", "gelu", "silu".
        subset_of_weights: as for `Laplace`.
        hessian_structure: as for `Laplace`.
        prior_precision: of the first training; a sum over examples stands beside it, see `train_map`. From a strong
            prior the evidence finds simple explanations, from a weak one it may stay with an overfitted network.
        prior_structure: "scalar", "layerwise", "unit" or "diag", as for `Laplace.optimize_prior_precision`.
        tune: set the prior precision by the evidence.
        refits: how often to train again under the tuned prior.
        batch_size: of Adam; all examples at once by L-BFGS by default.
        max_iter: iterations of L-BFGS, or epochs of Adam.
        learning_rate: of Adam.
        device: where to compute.
        random_state: of the initial weights and the order of batches.
        link_approx: how logits become probabilities, as for `Laplace`.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> X, y = load_iris(return_X_y=True)
        >>> model = make_pipeline(StandardScaler(), LaplaceClassifier(random_state=0)).fit(X, y)
        >>> bool(model.score(X, y) > 0.95)
        True

    Attributes: `classes_`, `module_` (trained), `laplace_` (the `Laplace`), `log_marginal_likelihood_` in nats,
    `n_iter_`, `n_features_in_`.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[int, int], nn.Module] | None = None,
        *,
        train: bool = True,
        hidden_layer_sizes: tuple[int, ...] = (50,),
        activation: str = "tanh",
        subset_of_weights: Any = "all",
        hessian_structure: str = "kron",
        prior_precision: float = 10.0,
        prior_structure: str = "scalar",
        tune: bool = True,
        refits: int = 3,
        batch_size: int | None = None,
        max_iter: int = 200,
        learning_rate: float = 1e-2,
        device: str = "cpu",
        random_state: Any = None,
        link_approx: str = "probit",
    ) -> None:
        super().__init__(
            module,
            train=train,
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            subset_of_weights=subset_of_weights,
            hessian_structure=hessian_structure,
            prior_precision=prior_precision,
            prior_structure=prior_structure,
            tune=tune,
            refits=refits,
            batch_size=batch_size,
            max_iter=max_iter,
            learning_rate=learning_rate,
            device=device,
            random_state=random_state,
        )
        self.link_approx = link_approx

    def fit(self, X: Any, y: Any) -> LaplaceClassifier:
        """Train and approximate.

        Args:
            X: `(N, features)`.
            y: `(N,)`, classes of any type.

        Returns:
            Itself.

        Raises:
            ValueError: if the data or a setting are refused, or there are fewer than two classes.
        """
        choice(LINKS, self.link_approx, "link_approx")  # before the training, as the base reads the others
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"A classifier needs at least two classes, got 1 class: {self.classes_.tolist()[0]!r}.")
        self._fit_network(X, torch.as_tensor(labels), Categorical(), len(self.classes_))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, `(N, classes)`, in the order of `classes_`."""
        inputs = self._inputs(X)
        found = self.laplace_(inputs, link_approx=self.link_approx)
        probabilities = found.detach().double().cpu().numpy()  # type: ignore[union-attr]
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each input."""
        chosen = self.predict_proba(X).argmax(axis=1)
        return self.classes_[chosen]


class LaplaceRegressor(RegressorMixin, LaplaceEstimator):  # type: ignore[misc]
    """A regression with error bars: the linearised predictive of a network around its MAP estimate.

    Targets are standardised inside. Prior precision and observation noise, one for all inputs, are set by the evidence;
    for a noise that depends on the input see `lapkit.curvature.HeteroscedasticGaussian`. Arguments are those of
    `LaplaceClassifier`, without `link_approx`.

    Example:
        >>> import numpy as np
        >>> X = np.linspace(-1, 1, 40)[:, None]
        >>> model = LaplaceRegressor(random_state=0).fit(X, np.sin(3 * X[:, 0]))
        >>> mean, std = model.predict(np.array([[0.0], [5.0]]), return_std=True)
        >>> bool(std[1] > 3 * std[0])
        True

    Attributes: `module_` (trained, for standardised targets), `laplace_`, `log_marginal_likelihood_` (of standardised
    targets, in nats), `sigma_noise_` (in units of y), `n_iter_`, `n_features_in_`.
    """

    def fit(self, X: Any, y: Any) -> LaplaceRegressor:
        """Train and approximate.

        Args:
            X: `(N, features)`.
            y: `(N,)` or `(N, C)`.

        Returns:
            Itself.

        Raises:
            ValueError: if the data or a setting are refused.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        if np.ndim(y) == 2 and np.shape(y)[1] == 1:
            y = column_or_1d(y, warn=True)
        columns = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        self._flat = np.ndim(y) == 1
        self._centre, self._spread = columns.mean(0), columns.std(0)
        self._spread = np.where(self._spread > 0, self._spread, 1.0)
        if isinstance(self.module, nn.Module) and not self.train:  # its outputs are in units of y
            self._centre, self._spread = np.zeros_like(self._centre), np.ones_like(self._spread)
        scaled = torch.as_tensor((columns - self._centre) / self._spread)
        self._fit_network(X, scaled, Gaussian(), columns.shape[1])
        noise = float(self.laplace_.sigma_noise) * self._spread
        self.sigma_noise_ = float(noise[0]) if self._flat else noise
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Mean of the targets.

        Args:
            X: `(N, features)`.
            return_std: also the standard deviation, of weights and observation noise together.

        Returns:
            `(N,)` or `(N, C)`, one or two of them.
        """
        inputs = self._inputs(X)
        if not return_std:
            with torch.no_grad():
                return self._in_units(self.module_(inputs).detach())
        mean, variance = self.laplace_(inputs, diagonal_output=True)
        std = (variance + self.laplace_.sigma_noise**2).sqrt().detach().double().cpu().numpy() * self._spread
        return self._in_units(mean), std[:, 0] if self._flat else std

    def _in_units(self, outputs: Tensor) -> np.ndarray:
        y = outputs.detach().double().cpu().numpy() * self._spread + self._centre
        return y[:, 0] if self._flat else y
