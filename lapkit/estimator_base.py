"""What the scikit-learn estimators share: a network, its MAP training, and the Laplace approximation around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from lapkit.choices import PRIOR_STRUCTURES, choice
from lapkit.curvature import Gaussian, Likelihood
from lapkit.laplace import Laplace
from lapkit.posteriors import GaussianPrior
from lapkit.training import train_map

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
FIT_BATCH = 256  # examples that the curvature is computed for at a time


class LaplaceEstimator(BaseEstimator):  # type: ignore[misc]
    """The settings of both estimators, and how they train; see `lapkit.estimators`."""

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
    ) -> None:
        self.module, self.train = module, train
        self.hidden_layer_sizes, self.activation = hidden_layer_sizes, activation
        self.subset_of_weights, self.hessian_structure = subset_of_weights, hessian_structure
        self.prior_precision, self.prior_structure = prior_precision, prior_structure
        self.tune, self.refits = tune, refits
        self.batch_size, self.max_iter, self.learning_rate = batch_size, max_iter, learning_rate
        self.device, self.random_state = device, random_state

    def _network(self, inputs: int, outputs: int, seed: int) -> nn.Module:
        """A network of the estimator's own: what was given is not changed.

        Raises:
            ValueError: if there is nothing trained to take as it is.
        """
        if not self.train and not isinstance(self.module, nn.Module):
            raise ValueError("train=False takes a trained module: give module=..., or leave train=True.")
        if isinstance(self.module, nn.Module):
            return (copy.deepcopy(self.module) if self.train else self.module).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self._mlp(inputs, outputs) if self.module is None else self.module(inputs, outputs)
        return made.to(self.device)

    def _mlp(self, inputs: int, outputs: int) -> nn.Module:
        """In double precision: small networks gain nothing from single, and L-BFGS loses digits.

        Raises:
            ValueError: if the activation is unknown or a size not positive.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}. Choose one of {', '.join(ACTIVATIONS)}.")
        if any(size < 1 for size in self.hidden_layer_sizes):
            raise ValueError(f"Hidden layers have at least one unit, got {self.hidden_layer_sizes}.")
        widths = [inputs, *self.hidden_layer_sizes]
        layers: list[nn.Module] = []
        for one, two in pairwise(widths):
            layers += [nn.Linear(one, two), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], outputs)).double()

    def _fit_network(self, X: np.ndarray, y: Tensor, likelihood: Likelihood, outputs: int) -> None:
        """Train, approximate, tune; train again under the tuned prior as often as `refits` says.

        Raises:
            ValueError: if that is negative, or the network does not have so many outputs.
        """
        if self.refits < 0:
            raise ValueError(f"refits counts trainings after the first, got {self.refits}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        self.module_ = self._network(X.shape[1], outputs, seed).eval()
        x, y = self._tensor(X), y.to(self.device)
        with torch.no_grad():
            returned = tuple(self.module_(x[:1]).shape)
        if returned != (1, outputs):
            raise ValueError(
                f"The module returned {returned} for one example; the targets need (1, {outputs}) outputs."
            )
        prior = GaussianPrior(self.prior_precision)
        choice(PRIOR_STRUCTURES, self.prior_structure, "prior_structure")  # before the training, like the others:
        Laplace(self.module_, likelihood, self.subset_of_weights, self.hessian_structure)
        self.n_iter_ = 1
        for _ in range(1 + self.refits * (self.tune and self.train)):
            if self.train:
                self.training_ = train_map(
                    self.module_,
                    likelihood,
                    x,
                    y,
                    prior,
                    batch_size=self.batch_size,
                    max_iter=self.max_iter,
                    learning_rate=self.learning_rate,
                    generator=generator,
                )
                self.n_iter_ = self.training_.steps
            self.laplace_ = Laplace(
                self.module_,
                likelihood,
                self.subset_of_weights,
                self.hessian_structure,
                prior_precision=prior.precision,
            ).fit([(x[i : i + FIT_BATCH], y[i : i + FIT_BATCH]) for i in range(0, len(x), FIT_BATCH)])
            if self.tune:
                self.laplace_.optimize_prior_precision(
                    prior_structure=self.prior_structure, tune_noise=isinstance(likelihood, Gaussian)
                )
                likelihood, tuned = self.laplace_.likelihood, self.laplace_.prior
                if self.laplace_.fitted.parameters.numel == sum(p.numel() for p in self.module_.parameters()):
                    prior = tuned
        self.log_marginal_likelihood_ = float(self.laplace_.log_marginal_likelihood())

    def _tensor(self, X: np.ndarray) -> Tensor:
        dtype = next((p.dtype for p in self.module_.parameters()), torch.float64)
        return torch.tensor(X, dtype=dtype, device=self.device)

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._tensor(validate_data(self, X, reset=False, dtype=np.float64))
