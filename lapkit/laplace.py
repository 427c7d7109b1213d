"""The facade: a trained network in, a posterior over its weights out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lapkit.choices import CURVATURES, LIKELIHOODS, PRIOR_STRUCTURES, choice, curvature_structure
from lapkit.curvature import (
    Columns,
    Engine,
    Gaussian,
    Likelihood,
    Parameters,
    SymmetricOperator,
    accumulate,
    borrowed,
    last_layer,
)
from lapkit.curvature.accumulate import EMPTY
from lapkit.curvature.capture.forward import forward
from lapkit.curvature.inputs import check_batches, to_device, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.posteriors import (
    LINKS,
    Fit,
    FunctionDistribution,
    GaussianPosterior,
    GaussianPrior,
    Uncertainty,
    function_samples,
    laplace_posterior,
    linearized,
    log_det_posterior,
    log_det_ratio,
    log_evidence,
    predictive,
    uncertainty,
)
from lapkit.selection import Selection, maximize_evidence

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(model: nn.Module) -> list[int]:
    """One number for each parameter and buffer, in which training shows: of weights, and of running statistics.

    The bits are summed as integers, whose sum does not depend on the order, so not on threads and devices either.
    """
    real = [torch.view_as_real(p) if p.is_complex() else p for p in (*model.parameters(), *model.buffers())]
    return [int(p.detach().view(_INTEGERS[p.element_size()]).sum()) for p in real]


class Laplace:
    """A Laplace approximation of the posterior over a trained network's weights, `N(w*, (H + prior precision)^{-1})`.

    The network is borrowed: its weights, gradients, modes and buffers are after every call what they were before.

    Args:
        model: trained; maps a batch to outputs `(N, C)`, logits for classes.
        likelihood: "classification", "regression", "binary", or a `Likelihood` object.
        subset_of_weights: "last_layer", "all", or names of parameters or modules. Frozen parameters
            (`requires_grad=False`) are left out.
        hessian_structure: "kron", "diag", "blockdiag", "full", or "lowrank" (ViViT): the full matrix by its columns,
            `V V^T` with as many of them as there are examples times outputs, for more weights than a full matrix has
            room for. It is exact unless a rank is given.
        sigma_noise: standard deviation of the observation noise, for "regression".
        prior_precision: one number, one for each parameter tensor, or one for each weight.
        prior_mean: a number or one for each weight.
        temperature: of the likelihood, `p(y|f)^(1/T)`.
        curvature: "ggn" (exact), "mc" (one Monte Carlo column), "ef" (empirical Fisher), or a `Columns` object.
        memory_budget: bytes that intermediates may take; a quarter of what is free by default.
        rank: of "lowrank": keep only so many columns, the nearest matrix of that rank batch by batch. What is left out
            makes the posterior wider, never narrower.
        per_parameter: of "lowrank": the diagonal blocks of single parameters, instead of the whole matrix.
        space: of "lowrank": "weights" writes V out, "functions" keeps the layers' inputs and cotangents and computes in
            the space of the outputs; "auto" takes whichever needs less memory.

    Raises:
        ValueError: if a name is unknown, a number is not positive, settings do not go together, or nothing can be
            trained.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> la = Laplace(nn.Linear(2, 3), "classification", subset_of_weights="all", hessian_structure="full")
        >>> la.fit([(x, y)]).optimize_prior_precision().converged
        True
        >>> la(x[:5], link_approx="probit").sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])

    Reference:
        MacKay, 1992; Daxberger et al., Laplace Redux, 2021; Dangel, Backpropagation Beyond the Gradient, section 3.3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str | Iterable[str] = "last_layer",
        hessian_structure: str = "kron",
        *,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        curvature: str | Columns = "ggn",
        memory_budget: int | None = None,
        rank: int | None = None,
        per_parameter: bool = False,
        space: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"The temperature must be positive and finite, got {temperature}.")
        if isinstance(subset_of_weights, str) and subset_of_weights not in ("all", "last_layer"):
            raise ValueError(
                f"Unknown subset_of_weights {subset_of_weights!r}. Choose 'all', 'last_layer', or a list of names of "
                "parameters or modules."
            )
        self.model = model
        self.likelihood: Likelihood = self._likelihood(likelihood, sigma_noise)
        self.subset_of_weights = subset_of_weights if isinstance(subset_of_weights, str) else tuple(subset_of_weights)
        self.structure = curvature_structure(hessian_structure, rank, per_parameter, space)
        self.prior = GaussianPrior(prior_precision, prior_mean)
        self.temperature = temperature
        self.columns: Columns = (
            curvature if isinstance(curvature, Columns) else choice(CURVATURES, curvature, "curvature")
        )
        self.memory_budget = memory_budget
        self._select()  # a subset that names nothing is an error now, not when data come
        self._fit: Fit | None = None
        self._engine: Engine | None = None
        self._fitted_to: list[int] = []
        self._posterior: tuple[tuple[Any, ...], GaussianPosterior] | None = None

    @staticmethod
    def _likelihood(likelihood: str | Likelihood, sigma_noise: float | Tensor) -> Likelihood:
        if isinstance(likelihood, Likelihood):
            chosen = likelihood
        else:
            kind = choice(LIKELIHOODS, likelihood, "likelihood")
            if kind is Gaussian:
                return Gaussian(sigma_noise)
            chosen = kind()
        if float(sigma_noise) != 1.0:
            raise ValueError(
                f"sigma_noise={float(sigma_noise):g} was given beside the likelihood {likelihood!r}; it belongs to "
                "'regression' only. A Gaussian object has its own noise, other likelihoods have none."
            )
        return chosen

    def _select(self) -> Parameters | None:
        """The weights, where they are known without data; the last layer is found by running the model."""
        trainable = Parameters.of(self.model)
        if self.subset_of_weights == "last_layer":
            return None
        return trainable if self.subset_of_weights == "all" else Parameters.of(self.model, self.subset_of_weights)

    # -- fitting

    def fit(
        self, train_loader: Iterable[Any], *, progress_bar: bool = False, generator: torch.Generator | None = None
    ) -> Laplace:
        """Sum the curvature at the current weights over the data.

        Args:
            train_loader: batches `(inputs, targets)`, or `(inputs, targets, weights)` with floating weights `(N,)` that
                multiply the examples' log likelihoods; any iterable.
            progress_bar: show one.
            generator: for Monte Carlo curvature.

        Returns:
            Itself.

        Raises:
            TypeError: if a batch, its inputs or its targets have the wrong type.
            ValueError: if there is no data, a batch does not fit model and likelihood, or examples influence each
                other.
            RuntimeError: if the model's Jacobian cannot be captured.
        """
        check_batches(train_loader)
        batches = iter(train_loader)
        parameters, data = self._select(), batches
        if parameters is None:
            first = list(islice(batches, 1))
            parameters, data = self.select(first), chain(first, batches)
        self.prior.shift(parameters)  # a prior of impossible length is an error before the work, not after
        self.prior.centre(parameters)
        quantity = self.structure(parameters)
        totals = accumulate(
            self.model,
            parameters,
            self.likelihood,
            self.columns,
            data,
            [quantity],
            generator=generator,
            memory_budget=self.memory_budget,
            progress_bar=progress_bar,
            total=length_hint(train_loader) or None,
        )
        with torch.inference_mode(False):  # results are for any use, whoever calls
            mean, curvature = summable(parameters.vector()), quantity.result().operator()
        self._fit = Fit(
            parameters=parameters,
            mean=mean,
            curvature=curvature,
            loss=totals.loss,
            count=totals.weight,
            outputs=totals.outputs,
            dispersion_power=self.columns.dispersion_power,
        )
        self._engine = Engine(self.model, parameters, memory_budget=self.memory_budget)
        self._fitted_to = _fingerprint(self.model)
        return self

    def select(self, batches: Iterable[Any]) -> Parameters:
        """The weights that the approximation is over; the last layer is found by running the model on the first batch.

        Args:
            batches: as for `fit`.

        Returns:
            The weights.

        Raises:
            ValueError: if there is no batch.
        """
        parameters = self._select()
        if parameters is not None:
            return parameters
        trainable = Parameters.of(self.model)
        for batch in batches:
            x = to_device(unpack(batch, 0)[0], trainable.device)
            with borrowed(self.model, trainable):
                return last_layer(forward(self.model, x, trainable), trainable)
        raise ValueError(EMPTY)

    @property
    def fitted(self) -> Fit:
        """What the pass over the data has left.

        Raises:
            RuntimeError: before `fit`.
        """
        if self._fit is None:
            raise RuntimeError("This Laplace has not been fitted: call la.fit(train_loader) first.")
        return self._fit

    # -- the posterior and its hyper-parameters

    @property
    def posterior(self) -> GaussianPosterior:
        """The Gaussian over the fitted weights."""
        given = (self.fitted, self.likelihood, self.prior, self.temperature)
        if self._posterior is None or any(old is not new for old, new in zip(self._posterior[0], given, strict=True)):
            self._posterior = given, laplace_posterior(*given)
        return self._posterior[1]

    @property
    def posterior_precision(self) -> SymmetricOperator:
        """`scale * H + diag(prior precision)`."""
        return self.posterior.precision

    @property
    def prior_precision(self) -> Tensor:
        """The prior precision: one number, one for each parameter tensor, or one for each weight."""
        return torch.as_tensor(self.prior.precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        prior = GaussianPrior(value, self.prior.mean)
        if self._fit is not None:
            prior.shift(self._fit.parameters)
        self.prior = prior

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise; one where the likelihood has none."""
        return torch.as_tensor(self.likelihood.precision) ** -0.5

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self.likelihood = self._with_noise(value)

    def _with_noise(self, value: float | Tensor) -> Gaussian:
        if not isinstance(self.likelihood, Gaussian):
            raise ValueError(f"{type(self.likelihood).__name__} has no observation noise; only regression has.")
        return Gaussian(value)

    @property
    def n_params(self) -> int:
        """Number of random weights."""
        return self.fitted.parameters.numel

    @property
    def mean(self) -> Tensor:
        """The weights at the MAP estimate, `(P,)`."""
        return self.fitted.mean

    # -- evidence

    @property
    def log_likelihood(self) -> Tensor:
        """`(1 / T) sum_n log p(y_n | f_n)` at the MAP estimate."""
        return self.fitted.log_likelihood(self.likelihood, self.temperature)

    @property
    def scatter(self) -> Tensor:
        """`(w* - m)^T P0 (w* - m)` with the prior's mean m and precision P0."""
        return self.prior.scatter(self.fitted.parameters, self.fitted.mean)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """`log det` of the posterior precision."""
        return log_det_posterior(self.fitted, self.likelihood, self.prior, self.temperature)

    @property
    def log_det_prior_precision(self) -> Tensor:
        """`log det` of the prior precision."""
        return self.prior.logdet(self.fitted.parameters)

    @property
    def log_det_ratio(self) -> Tensor:
        """`log det` of the posterior precision minus that of the prior precision."""
        return log_det_ratio(self.fitted, self.likelihood, self.prior, self.temperature)

    def log_marginal_likelihood(
        self, prior_precision: float | Tensor | None = None, sigma_noise: float | Tensor | None = None
    ) -> Tensor:
        """The Laplace approximation of the log evidence, in nats; asking does not change anything.

        Args:
            prior_precision: evaluate there instead of at the current one; the result is differentiable in it.
            sigma_noise: likewise.

        Returns:
            A number.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if a value is not positive or has a wrong length, or there is no noise.
        """
        prior = self.prior if prior_precision is None else GaussianPrior(prior_precision, self.prior.mean)
        likelihood = self.likelihood if sigma_noise is None else self._with_noise(sigma_noise)
        return log_evidence(self.fitted, likelihood, prior, self.temperature)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        *,
        tune_noise: bool = False,
        n_steps: int = 100,
    ) -> Selection:
        """Set the prior precision to the one under which the data are most probable.

        Args:
            method: "marglik".
            prior_structure: "scalar", "layerwise" (one for each parameter tensor), or "diag" (one for each weight).
            tune_noise: also tune the observation noise of a regression.
            n_steps: iterations at most.

        Returns:
            How the search went; the best values are set.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if a name is unknown, or there is no noise to tune.
        """
        choice(("marglik",), method, "method")
        choice(PRIOR_STRUCTURES, prior_structure, "prior_structure")
        parameters = self.fitted.parameters
        groups = {"scalar": 1, "layerwise": len(parameters.sizes), "diag": parameters.numel}[prior_structure]
        found = maximize_evidence(
            self.fitted,
            self.likelihood,
            self.prior,
            groups=groups,
            tune_noise=tune_noise,
            temperature=self.temperature,
            n_steps=n_steps,
        )
        self.prior, self.likelihood = found.prior, found.likelihood
        return found

    # -- prediction

    def function_distribution(self, x: Any) -> FunctionDistribution:
        """The Gaussian over the outputs f of the linearised network, `N(f(x), J P^{-1} J^T)` for each input.

        Args:
            x: a batch of inputs.

        Returns:
            Means `(N, C)` and covariances `(N, C, C)`, without observation noise.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        precision = self.posterior.precision
        engine = self._checked_engine()
        with borrowed(self.model, engine.parameters):
            return linearized(engine, to_device(x, engine.parameters.device), precision)

    def _checked_engine(self) -> Engine:
        assert self._engine is not None  # `fitted` has been asked before
        same = _fingerprint(self.model) == self._fitted_to
        if not (same and torch.equal(summable(self._engine.parameters.vector()), self.fitted.mean)):
            raise RuntimeError(
                "The network's weights are not those that were fitted, or its buffers (such as running statistics) are "
                "not: it was trained or loaded since. Call fit again."
            )
        return self._engine

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
        """The linearised (GLM) predictive.

        Args:
            x: a batch of inputs.
            pred_type: "glm".
            joint: for regression, the covariance between all inputs too, `(N C, N C)`.
            link_approx: for classes: "probit", "probit_centered" (blind to what all logits share, as the softmax is),
                "mean_field", "bridge", "bridge_norm" (closed forms), "gauss_hermite" (exact, for two classes), "mc" or
                "qmc" (samples of the outputs, independent or from a Sobol sequence).
            n_samples: for "mc" and "qmc".
            diagonal_output: for regression, only the variances `(N, C)`.
            generator: for "mc" and "qmc", the only source of randomness.

        Returns:
            For classes, probabilities `(N, C)`. For regression, the outputs' mean `(N, C)` and covariance `(N, C,
            C)`; add `sigma_noise ** 2` for targets, or ask `predictive_distribution`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if a name is unknown, or `joint` is asked for classes.
        """
        choice(("glm",), pred_type, "pred_type")
        link = choice(LINKS, link_approx, "link_approx")
        regression = isinstance(self.likelihood, Gaussian)
        if joint:
            if not regression:
                raise ValueError("A joint predictive is defined for regression; for classes use functional_samples.")
            return self._joint(x)
        f = self.function_distribution(x)
        if regression:
            return f.mean, f.variance if diagonal_output else f.covariance
        return link(self.likelihood, f, n_samples, generator)

    def _joint(self, x: Any) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs of all inputs together, inputs first."""
        precision = self.posterior.precision
        engine = self._checked_engine()
        with borrowed(self.model, engine.parameters):
            mean, jacobian = engine.jacobian(to_device(x, engine.parameters.device))
        covariance = precision.inverse_gram(jacobian).permute(1, 0, 3, 2)  # (N, C, N, C)
        return summable(mean.flatten()), covariance.reshape(mean.numel(), mean.numel())

    def predictive_distribution(
        self, x: Any, link_approx: str = "probit", n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Distribution:
        """`p(y|x)`, observation noise included.

        Args:
            x: a batch of inputs.
            link_approx: for classes, as for predictions.
            n_samples: of "mc" and "qmc".
            generator: of "mc" and "qmc".

        Returns:
            `Categorical`, independent `Bernoulli` or `MultivariateNormal` of `torch.distributions`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            ValueError: if the link is unknown.
        """
        link = choice(LINKS, link_approx, "link_approx")
        return predictive(self.likelihood, self.function_distribution(x), link, n_samples, generator)

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

    def functional_samples(
        self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None, *, joint: bool = False
    ) -> Tensor:
        """Samples of the outputs f of the linearised network.

        Args:
            x: a batch of inputs.
            n_samples: how many, S.
            generator: the only source of randomness.
            joint: draw whole functions, in which the outputs of all inputs vary together, not each input by itself.

        Returns:
            `(S, N, C)`.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        if not joint:
            return self.function_distribution(x).sample(n_samples, generator)
        deviations = self.posterior.sample(n_samples, generator) - self.mean
        engine = self._checked_engine()
        with borrowed(self.model, engine.parameters):
            return function_samples(engine, x, deviations)

    def predictive_samples(self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the mean of y: class probabilities, or f for regression, `(S, N, C)`."""
        return self.likelihood.inverse_link(self.functional_samples(x, n_samples, generator))

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights, `(S, P)`."""
        return self.posterior.sample(n_samples, generator)
