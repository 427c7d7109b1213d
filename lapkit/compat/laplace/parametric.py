"""A Gaussian over weights, with the reference's attributes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lapkit.compat.laplace.base import number
from lapkit.compat.laplace.options import Batches
from lapkit.compat.laplace.predictions import Predictions
from lapkit.compat.laplace.tuning import Tuning
from lapkit.curvature import Parameters, Subnetwork, SymmetricOperator


class ParametricLaplace(Predictions, Tuning):
    """A Gaussian over weights."""

    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> None:
        """Sum the curvature over the data.

        Args:
            train_loader: batches `(X, y)`, or mappings that hold the targets under `dict_key_y`; any iterable.
            override: start anew; otherwise add to what was fitted.
            progress_bar: show one.
        """
        batches = Batches(train_loader, self.options.dict_key_y)
        self.laplace.fit(batches, override=override, progress_bar=progress_bar)

    @property
    def parameters(self) -> Parameters:
        """The random weights; known before `fit`, but for a last layer that has no name."""
        known = self.laplace.subset.known(self.model)
        if known is None:
            return self.laplace.fitted.parameters
        return known.weights if isinstance(known, Subnetwork) else known

    @property
    def params(self) -> list[Tensor]:
        """The tensors of random weights."""
        return list(self.parameters.tensors)

    @property
    def n_params(self) -> int:
        """Number of random weights."""
        return self.parameters.numel

    @property
    def n_layers(self) -> int:
        """Number of parameter tensors: weight and bias of a layer are two."""
        return len(self.parameters.sizes)

    @property
    def n_data(self) -> int:
        """Number of examples that were seen."""
        return int(self.laplace.fitted.count)

    @property
    def n_outputs(self) -> int:
        """Number of outputs."""
        return int(self.laplace.fitted.outputs)

    @property
    def mean(self) -> Tensor:
        """The weights at the MAP estimate, `(P,)`."""
        return self.laplace.mean

    @property
    def loss(self) -> Tensor:
        """Sum over the data of cross entropies, or of halved squared errors."""
        return self.laplace.fitted.loss

    @property
    def H(self) -> Any:
        """The curvature, without noise, temperature and prior, in the form of `posterior_precision`."""
        return self._form(self.laplace.fitted.curvature)

    @property
    def posterior_precision(self) -> Any:
        """The posterior precision, in the form that the reference gives it: see the class."""
        return self._form(self.laplace.posterior_precision)

    @abstractmethod
    def _form(self, matrix: SymmetricOperator) -> Any:
        """A matrix as the reference has it."""

    @property
    def prior_precision_diag(self) -> Tensor:
        """The prior precision of each weight, `(P,)`."""
        return self.laplace.prior.diagonal(self.parameters)

    # -- evidence

    @property
    def log_likelihood(self) -> Tensor:
        """Of the data at the MAP estimate, divided by the temperature."""
        return self.laplace.log_likelihood

    @property
    def scatter(self) -> Tensor:
        """`(w* - m)^T P0 (w* - m)`."""
        return self.laplace.scatter

    @property
    def log_det_prior_precision(self) -> Tensor:
        """`log det` of the prior precision."""
        return self.laplace.log_det_prior_precision

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """`log det` of the posterior precision."""
        return self.laplace.log_det_posterior_precision

    @property
    def log_det_ratio(self) -> Tensor:
        """The difference of the two."""
        return self.laplace.log_det_ratio

    def square_norm(self, value: Tensor) -> Tensor:
        """`(value - mean)^T P (value - mean)`."""
        return self.laplace.posterior_precision.quadratic(value - self.mean)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """The log density of weights `(P,)`, with or without its normaliser."""
        return self.laplace.posterior.log_prob(value) if normalized else -self.square_norm(value) / 2

    def log_marginal_likelihood(
        self, prior_precision: float | Tensor | None = None, sigma_noise: float | Tensor | None = None
    ) -> Tensor:
        """The Laplace approximation of the log evidence.

        As in the reference, values that are given stay set, which scripts with a loop over them count on; their graphs
        do not stay. `lapkit.Laplace.log_marginal_likelihood` only answers.

        Args:
            prior_precision: to be set; the result is differentiable in it.
            sigma_noise: likewise.

        Returns:
            A number.
        """
        noise = None if sigma_noise is None else number(sigma_noise)
        value = self.laplace.log_marginal_likelihood(prior_precision, noise)
        if prior_precision is not None:
            self.prior_precision = torch.as_tensor(prior_precision).detach()
        if noise is not None:
            self.sigma_noise = noise.detach()
        return value

    # -- storage

    def state_dict(self) -> dict[str, Any]:
        """All but the network, in plain form: see `lapkit.Laplace.state_dict`."""
        return {**self.laplace.state_dict(), "cls_name": type(self).__name__, "kind": self.likelihood.value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Become what another object of this class was.

        Args:
            state_dict: made by `state_dict` here; those of laplace-torch are of another form.

        Raises:
            ValueError: if it is of another class, likelihood or library, or the network is not the one that was
                fitted.
        """
        state = dict(state_dict)
        name, kind = state.pop("cls_name", None), state.pop("kind", None)
        if name != type(self).__name__ or "format" not in state:
            raise ValueError(
                f"A state of {name} {'' if 'format' in state else 'of laplace-torch '}was given to "
                f"{type(self).__name__} of lapkit. Load into the class that saved; those of laplace-torch have to be "
                "fitted anew."
            )
        if kind != self.likelihood.value:
            raise ValueError(f"A state of likelihood {kind!r} was given to an object of {self.likelihood.value!r}.")
        self.laplace.load_state_dict(state)
