"""A process of gpytorch that is conditioned on rows of a network's Jacobian instead of on inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Size, Tensor

from lapkit.posteriors.function_space.gaussian_processes import gpytorch
from lapkit.posteriors.function_space.joint import JointPosterior
from lapkit.posteriors.function_space.kernel import TangentKernel
from lapkit.posteriors.function_space.noise import AtTheMode, WhitenedNoise
from lapkit.posteriors.function_space.rows import TangentRows
from lapkit.posteriors.function_space.strategy import ObservedStrategy


class ObservedProcess(gpytorch.models.ExactGP):  # type: ignore[misc]  # gpytorch has no types
    """An `ExactGP` with the network's outputs for a mean and observations `V (w - w*) + noise`, all of them zero.

    gpytorch's marginal likelihood, prediction strategy and solvers see the observations' covariance, and that of them
    with the outputs at new inputs; neither is a value of the kernel at inputs.

    Args:
        kernel: with the network and the prior.
        observations: the rows V.
        noise: of the observations.
        iterative: leave the choice of solvers to gpytorch's settings; Cholesky by default.
    """

    prediction_strategy: ObservedStrategy | None

    def __init__(
        self, kernel: TangentKernel, observations: TangentRows, noise: WhitenedNoise, *, iterative: bool = False
    ) -> None:
        places = torch.arange(len(observations), dtype=torch.float64, device=kernel.tangents.parameters.device)
        super().__init__(places[:, None], torch.zeros_like(places), noise)
        self.covar_module, self.observations, self.iterative = kernel, observations, iterative
        self.tangents = kernel.tangents
        self._tuned_at: tuple[Tensor, Tensor] | None = None
        self.register_added_loss_term("at_the_mode")
        self.eval()

    @abstractmethod
    def at_the_mode(self) -> Tensor:
        """All of the log evidence but the observations' log density; their own normaliser does not count."""

    def __call__(self, *args: Tensor, **kwargs: Any) -> gpytorch.distributions.MultivariateNormal:
        """The posterior at inputs `(*, q, D)`; in training mode, given `train_inputs`, the observations' prior."""
        with self.solvers():
            if not self.training and gpytorch.settings.prior_mode.off():
                self.strategy()  # otherwise gpytorch makes one of its own
            return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The observations' prior in training mode, the outputs' elsewhere; see gpytorch's `ExactGP`."""
        if self.training:
            self.update_added_loss_term("at_the_mode", AtTheMode(self.at_the_mode()))
            return self.whitened()
        self.check_inputs(x)
        outputs, rows = self.tangents(self.covar_module.examples(x))
        mean, own, _ = self.prior_at(outputs, rows, x.shape[:-2])
        return JointPosterior(mean.unflatten(-1, (-1, outputs[0].numel())), own.to_dense()).distribution

    def set_train_data(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the observations belong to the data of the fit.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The observations belong to the network and its data: make another by laplace_gp.")

    def get_fantasy_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: new data would move the mode, which is the network's.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("New data move the mode: train the network on, and make another by laplace_gp.")

    def whitened(self) -> gpytorch.distributions.MultivariateNormal:
        """The observations' prior, `N(0, V P0^{-1} V^T)`."""
        gram = self.observations.gram(self.covar_module.variance)
        return gpytorch.distributions.MultivariateNormal(self.train_targets.double(), to_linear_operator(gram))

    def strategy(self) -> ObservedStrategy:
        """The prediction strategy, with its caches, for the present hyper-parameters."""
        if self.prediction_strategy is None:
            self.prediction_strategy = ObservedStrategy(
                list(self.train_inputs), self.whitened(), self.train_targets, self.likelihood, iterative=self.iterative
            )
        return self.prediction_strategy

    def _get_train_prior_distribution(self, train_inputs: Any, **kwargs: Any) -> Any:
        return self.whitened()

    def _get_test_prior_mean_and_covariances(
        self, train_inputs: Iterable[Tensor], test_inputs: Iterable[Tensor], **kwargs: Any
    ) -> tuple[Any, ...]:
        """What gpytorch's posterior is made of; the joint Gaussian with the observations is never formed."""
        (x,) = test_inputs
        self.check_inputs(x)
        batch = x.shape[:-2]
        outputs, rows = self.tangents(self.covar_module.examples(x))
        shape = Size((x.shape[-2], outputs[0].numel()))
        moments = self.prior_at(outputs, rows, batch)
        single = shape[1] == 1
        kinds = gpytorch.distributions
        kind = kinds.MultivariateNormal if single else kinds.MultitaskMultivariateNormal
        return (*moments, batch, shape[:1] if single else shape, kind)

    @contextmanager
    def solvers(self) -> Iterator[None]:
        """Exact solvers unless others are allowed, and no caches of earlier hyper-parameters."""
        now = (self.covar_module.prior_precision.detach().clone(), self.likelihood.noise.detach().clone())
        if self._tuned_at is None or not all(map(torch.equal, self._tuned_at, now)):
            self._clear_cache()
            self._tuned_at = now
        with gpytorch.settings.fast_pred_var(True):
            if self.iterative:
                yield
                return
            with gpytorch.settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False):
                yield

    @property
    def variance(self) -> Tensor:
        """Of the weights under the prior; predictions have a gradient in it only where gpytorch's caches have one."""
        found = self.covar_module.variance
        return found.detach() if gpytorch.settings.detach_test_caches.on() else found

    def prior_at(
        self, outputs: Tensor, rows: TangentRows, batch: Size
    ) -> tuple[Tensor, LinearOperator, LinearOperator]:
        """Before the data: mean `(*, q C)`, covariance `(*, q C, q C)`, and with the observations `(*, q C, R)`."""
        own = self.covar_module.between(rows, None, batch, self.variance)
        cross = rows.inner_products(self.observations, self.variance)
        cross = cross.reshape(*batch, own.shape[-1], len(self.observations))
        mean = outputs.double().reshape(*batch, own.shape[-1])
        return mean, to_linear_operator(own), to_linear_operator(cross)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse what cannot be inputs `(*, q, D)`.

        Raises:
            ValueError: if it is not, or the model takes no single tensor.
        """
        if self.covar_module.input_shape is None:
            raise ValueError(
                "This network does not take one tensor of examples of one shape, so that its inputs are no vectors "
                "(..., q, D). Call functions(x) or joint(x), which take inputs as the model does."
            )
        if not isinstance(x, Tensor) or x.ndim < 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Expected inputs (..., q, D), examples as vectors, got {got}.")
