"""The facade: a trained network in, a posterior over its weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import length_hint
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Gamma

from lapkit.checkpoint import Checkpoint, read_state, write_state
from lapkit.choices import CURVATURES, LIKELIHOODS, PRIOR_STRUCTURES, choice, curvature_structure
from lapkit.curvature import (
    Columns,
    Engine,
    Gaussian,
    Likelihood,
    Parameters,
    Subnetwork,
    SubnetworkEngine,
    SymmetricOperator,
    borrowed,
)
from lapkit.curvature.accumulate import Totals
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.inputs import check_batches, to_device
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.evidence_search import OPTIMIZERS, group_sizes
from lapkit.grid_search import Loss, Score, grid_search, log_grid, score_of, warn_at_edge
from lapkit.posteriors import (
    LINKS,
    Fit,
    FunctionDistribution,
    GaussianPosterior,
    GaussianPrior,
    Uncertainty,
    class_distribution,
    differentiable_joint,
    differentiable_linearized,
    differentiable_samples,
    function_samples,
    jointly_linearized,
    laplace_posterior,
    linearized,
    log_det_posterior,
    log_det_ratio,
    log_evidence,
    mean_of,
    mean_outputs,
    predictive,
    sampled_moments,
    sampled_outputs,
    uncertainty,
)
from lapkit.posteriors.function_space.subset import Subset as SubsetOfData
from lapkit.posteriors.function_space.subset import chosen_examples
from lapkit.refit import refit
from lapkit.selection import NOISE_BOUNDS, PRECISION_BOUNDS, Selection, maximize_evidence
from lapkit.structures import added
from lapkit.subnetworks import SubnetworkMask, Task
from lapkit.subsets import Subset, Weights, places_among

PRED_TYPES = ("glm", "nn")
_Statistic = TypeVar("_Statistic")
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
        subset_of_weights: "last_layer", "all", names of parameters or modules, or "subnetwork": single weights. Frozen
            parameters (`requires_grad=False`) are left out.
        hessian_structure: "kron", "ekfac" (its eigenvectors with eigenvalues that fit best, by two passes over the
            data), "diag", "blockdiag", "full", or "lowrank" (ViViT): the full matrix by its columns, `V V^T` with as
            many of them as there are examples times outputs, for more weights than a full matrix has room for. It is
            exact unless a rank is given. "gp" is "lowrank" in the space of the outputs, a Gaussian process with the
            tangent kernel, for any number of weights and few examples.
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
        subnetwork: of "subnetwork": a mask of `lapkit.subnetworks`, or indices or a Boolean mask over the flat vector
            of the weights that require gradients. The posterior is the conditional one, the others staying at the mode:
            its precision has the rows and columns of these weights. Of "kron" and "ekfac" these are those of the
            factored matrix of the tensors that hold them; see `lapkit.curvature.principal`.
        last_layer_name: of "last_layer": the module, by default the one nearest to the outputs.
        subset_of_data: of "gp": condition on some of the examples alone: a number, drawn at random, or their places.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

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
        subnetwork: SubnetworkMask | Tensor | None = None,
        last_layer_name: str | None = None,
        subset_of_data: SubsetOfData | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"The temperature must be positive and finite, got {temperature}.")
        wanted = subset_of_weights if isinstance(subset_of_weights, str) else tuple(subset_of_weights)
        self.subset_of_weights, self.subset = wanted, Subset(wanted, subnetwork, last_layer_name)
        if subset_of_data is not None and hessian_structure != "gp":
            raise ValueError(
                f"subset_of_data was given beside hessian_structure={hessian_structure!r}; it belongs to 'gp' only, "
                "whose cost grows with the data. Give other structures a loader of some of the data."
            )
        self.model = model
        self.likelihood: Likelihood = self._likelihood(likelihood, sigma_noise)
        self.structure = curvature_structure(hessian_structure, rank, per_parameter, space)
        self.prior = GaussianPrior(prior_precision, prior_mean)
        self.temperature = temperature
        self.columns: Columns = (
            curvature if isinstance(curvature, Columns) else choice(CURVATURES, curvature, "curvature")
        )
        self.memory_budget, self.subset_of_data = memory_budget, subset_of_data
        self.forward_fn, self.output_axis = forward_fn, output_axis
        self.subset.known(model)  # a subset that names nothing is an error now, not when data come
        self._fit: Fit | None = None
        self._sums: tuple[CurvatureSum, Totals] | None = None
        self._likelihood_of_fit = self.likelihood  # with its noise then: sums of other settings do not add up
        self._subnetwork: Subnetwork | None = None
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

    def __repr__(self) -> str:
        about = "not fitted" if self._fit is None else f"{self.n_params} weights, {self._fit.count:g} examples"
        return f"{type(self).__name__}({type(self.model).__name__}, {self.likelihood}; {about})"

    # -- fitting

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        *,
        progress_bar: bool = False,
        generator: torch.Generator | None = None,
    ) -> Laplace:
        """Sum the curvature at the current weights over the data.

        An error or an interrupt leaves an earlier fit as it was.

        Args:
            train_loader: batches `(inputs, targets)`, or `(inputs, targets, weights)` with floating weights `(N,)` that
                multiply the examples' log likelihoods; any iterable, for "ekfac" one that can be run through twice.
            override: forget an earlier fit; otherwise these data come to those that were seen, at the same weights.
            progress_bar: show one.
            generator: for Monte Carlo curvature, and a random subset of the data.

        Returns:
            Itself.

        Raises:
            TypeError: if a batch, its inputs or its targets have the wrong type.
            ValueError: if there is no data, a batch does not fit model and likelihood, examples influence each other,
                or data cannot come to what was fitted.
            RuntimeError: if the model's Jacobian cannot be captured, or has changed since the fit that is continued.
        """
        check_batches(train_loader)
        if not override and self._sums is not None:
            weights, data, likelihood = self._continued(), train_loader, self._likelihood_of_fit
        else:
            override, likelihood = True, self.likelihood
            weights, data = self.subset.found(self._task(train_loader), again=self.structure.refine is not None)
        if self.subset_of_data is not None:
            data = chosen_examples(data, self.subset_of_data, generator)
        random = weights.weights if isinstance(weights, Subnetwork) else weights
        self.prior.shift(random)  # a prior of impossible length is an error before the work, not after
        self.prior.centre(random)
        sums, totals = self.structure.sum(
            self.model,
            weights,
            likelihood,
            self.columns,
            data,
            generator=generator,
            memory_budget=self.memory_budget,
            forward_fn=self.forward_fn,
            output_axis=self.output_axis,
            progress_bar=progress_bar,
            total=length_hint(train_loader) or None,
        )
        with torch.inference_mode(False):  # results are for any use, whoever calls
            if not override and self._sums is not None:
                sums, totals = added(self._sums[0], sums, random), self._sums[1] + totals
            self._adopt(weights, sums, totals, likelihood)
        return self

    def _adopt(self, weights: Weights, sums: CurvatureSum, totals: Totals, likelihood: Likelihood) -> None:
        """Be fitted by these sums, at the network's present weights."""
        random = weights.weights if isinstance(weights, Subnetwork) else weights
        mean, curvature = summable(random.vector()), self.structure.operator(sums, weights)
        fit = Fit(
            parameters=random,
            mean=mean,
            curvature=curvature,
            loss=totals.loss,
            count=totals.weight,
            outputs=totals.outputs,
            dispersion_power=self.columns.dispersion_power,
        )
        engine, fingerprint = self._made_engine(weights), _fingerprint(self.model)
        self._fit, self._engine, self._fitted_to = fit, engine, fingerprint
        self._subnetwork = weights if isinstance(weights, Subnetwork) else None
        self._sums, self._likelihood_of_fit = (sums, totals), likelihood

    def _made_engine(self, weights: Weights) -> Engine:
        """What gives the Jacobians in these weights."""
        options: dict[str, Any] = {
            "memory_budget": self.memory_budget,
            "forward_fn": self.forward_fn,
            "output_axis": self.output_axis,
        }
        if isinstance(weights, Subnetwork):
            return SubnetworkEngine(self.model, weights, **options)
        return Engine(self.model, weights, **options)

    def _continued(self) -> Weights:
        """The weights of the fit that more data come to.

        Raises:
            RuntimeError: if the network has changed since.
            ValueError: if the structure does not add up.
        """
        if self.structure.refine is not None:
            raise ValueError(
                "EKFAC's eigenvalues belong to the eigenvectors of the data they were fitted to, and other data have "
                "others: fits do not add up. Fit all data at once, or choose 'kron', whose factors do."
            )
        engine = self._checked_engine()
        return engine.parameters if self._subnetwork is None else self._subnetwork

    def _task(self, batches: Iterable[Any]) -> Task:
        return Task(self.model, self.likelihood, batches, self.forward_fn, self.output_axis)

    def select(self, batches: Iterable[Any]) -> Parameters:
        """The weights that the approximation is over; the last layer is found by running the model on the first batch.

        Args:
            batches: as for `fit`.

        Returns:
            The weights.

        Raises:
            ValueError: if there is no batch, or they are single weights, which are no parameters of the model.
        """
        weights, _ = self.subset.found(self._task(batches))
        if isinstance(weights, Subnetwork):
            raise ValueError(
                "A subnetwork's weights are parts of parameters, of which this takes whole ones. Choose 'all', "
                "'last_layer', or names of parameters or modules."
            )
        return weights

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
        """Standard deviation of the observation noise; one where the likelihood has none.

        Of a `PerOutputGaussian` it is the factor of all its noises, which alone can be set after a fit.
        """
        return torch.as_tensor(self.likelihood.precision) ** -0.5

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self.likelihood = self.likelihood.with_noise(value)

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
        likelihood = self.likelihood if sigma_noise is None else self.likelihood.with_noise(sigma_noise)
        return log_evidence(self.fitted, likelihood, prior, self.temperature)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        *,
        optimizer: str = "lbfgs",
        tune_noise: bool = False,
        n_steps: int = 100,
        bounds: tuple[float, float] = PRECISION_BOUNDS,
        noise_bounds: tuple[float, float] = NOISE_BOUNDS,
        hyper_prior: Gamma | None = None,
        refit_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        loss: Loss | None = None,
        grid_size: int = 29,
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """Set the prior precision to the one under which the data are most probable, or held-out data.

        Args:
            method: "marglik": of the data that were fitted, by the evidence; or "gridsearch": of held-out data, by the
                predictive distribution, over one prior precision for all weights. The arguments from `val_loader` on
                are of "gridsearch", those from `optimizer` on, except for `bounds`, of "marglik".
            prior_structure: "scalar", "layerwise" (one for each parameter tensor), "unit" (one for each row of a weight
                matrix, or filter, that is for each output; tensors of one axis have one), or "diag" (one for each
                weight).
            optimizer: "lbfgs", "mackay" (the fixed point, without step lengths) or "newton" (for "scalar"). The
                evidence is concave in the logarithms, so that all find the same maximum.
            tune_noise: also tune the observation noise of a regression.
            n_steps: iterations at most.
            bounds: smallest and largest precision; a search that ends there warns.
            noise_bounds: smallest and largest standard deviation of the noise.
            hyper_prior: `torch.distributions.Gamma(a, b)` over each precision, for where the data say nothing of it;
                with it `delta = (gamma + 2 a) / (|w - m|^2 + 2 b)` at the maximum.
            refit_loader: the batches that were fitted, once more: the evidence of the linearised network is maximised,
                at its own mode, which is found in turn with the precisions (see `lapkit.refit`). For networks that
                stopped training early, or whose normalisation makes the scale of the weights arbitrary.
            val_loader: batches `(inputs, targets)`, or `(inputs, targets, weights)`, that were not trained on.
            loss: of a `torch.distributions.Distribution` of targets and the targets: one number for each example, or
                their mean. By default the negative log likelihood, observation noise included.
            grid_size: how many precisions between the bounds.
            link_approx: for classes, as for predictions.
            n_samples: of "mc" and "qmc".
            generator: of "mc" and "qmc"; all precisions see the same numbers.

        Returns:
            How the search went; the best values are set.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if a name is unknown, there is no noise to tune, bounds are not positive and ascending, or
                Newton's method is asked for several precisions; or there are no held-out data, or their loss is the
                same everywhere.
        """
        if choice(("marglik", "gridsearch"), method, "method") == "gridsearch":
            if prior_structure != "scalar" or tune_noise or val_loader is None:
                raise ValueError(
                    "A grid search needs val_loader=, and finds one number: prior_structure='scalar', without "
                    "tune_noise. For more hyper-parameters use method='marglik'."
                )
            link = choice(LINKS, link_approx, "link_approx")
            score = score_of(self.likelihood, loss, link, n_samples, generator)
            return self._on_grid(val_loader, log_grid(bounds, grid_size), score)
        if val_loader is not None or loss is not None:
            raise ValueError("val_loader and loss belong to method='gridsearch'; the evidence needs no held-out data.")
        search = choice(OPTIMIZERS, optimizer, "optimizer")
        structure = choice(PRIOR_STRUCTURES, prior_structure, "prior_structure")
        tune = partial(
            maximize_evidence,
            groups=group_sizes(self.fitted, structure),
            search=search,
            tune_noise=tune_noise,
            temperature=self.temperature,
            n_steps=n_steps,
            bounds=bounds,
            noise_bounds=noise_bounds,
            hyper_prior=hyper_prior,
            left_out=Parameters.of(self.model).numel - self.fitted.parameters.numel,
        )
        given = self.fitted, self.likelihood, self.prior
        if refit_loader is None:
            found = tune(*given)
        else:
            engine = self._checked_engine()
            found = refit(engine, *given, refit_loader, tune, temperature=self.temperature).selection
        self.prior, self.likelihood = found.prior, found.likelihood
        return found

    def _on_grid(self, data: Iterable[Any], precisions: Tensor, score: Score) -> Selection:
        """Set the prior precision to the best of a grid."""
        fit, engine = self.fitted, self._checked_engine()
        grid = grid_search(engine, fit, self.likelihood, self.prior, data, precisions, score, self.temperature)
        best = grid.best
        warn_at_edge(grid, best)
        self.prior = GaussianPrior(grid.precisions[best].to(fit.mean), self.prior.mean)
        return Selection(
            prior=self.prior,
            likelihood=self.likelihood,
            log_evidence=float(self.log_marginal_likelihood()),
            converged=0 < best < len(precisions) - 1,
            evaluations=len(precisions),
            slope=math.nan,
            effective=(self.n_params - self.prior_precision * self.posterior.variance.sum()).reshape(1),
            grid=grid,
        )

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
        precision, engine, differentiable = self.posterior.precision, self._checked_engine(), self._differentiable(x)
        with borrowed(self.model, engine.parameters):
            of_x = differentiable_linearized if differentiable else linearized
            found = of_x(engine, to_device(x, engine.parameters.device), precision)
        self._check_outputs(found.mean)
        return found

    def _check_outputs(self, mean: Tensor) -> None:
        """Refuse outputs of another number than those that were fitted, as one example without an axis for it has.

        Raises:
            ValueError: if they differ.
        """
        outputs = self.fitted.outputs
        if mean.ndim == 2 and mean.shape[1] != outputs:
            raise ValueError(
                f"The network has {mean.shape[1]} outputs for each of {len(mean)} examples; it was fitted to "
                f"{outputs:g}. A single input needs an axis for the examples, x[None]."
            )

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

    def _checked_engine(self) -> Engine:
        assert self._engine is not None  # `fitted` has been asked before
        same = _fingerprint(self.model) == self._fitted_to
        present = self._engine.parameters.vector()
        present = present if self._subnetwork is None else present[self._subnetwork.indices]
        if not (same and torch.equal(summable(present), self.fitted.mean)):
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

    def _functions(
        self, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None
    ) -> FunctionDistribution:
        """The outputs' Gaussian: of the linearised network, or with the moments of samples."""
        if pred_type == "glm":
            return self.function_distribution(x)
        return self._at_samples(sampled_moments, x, n_samples, generator)

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
            return statistic(sampled_outputs(engine, posterior, x, n_samples, generator))

    def _joint(self, x: Any) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the targets' means at all inputs together, inputs first."""
        mean, covariance = self._all_functions(x)
        outputs = mean.shape[-1]
        kept, rows = mean_outputs(self.likelihood, outputs), mean.numel() // outputs
        mean, boxed = mean[..., :kept].flatten(), covariance.reshape(rows, outputs, rows, outputs)
        return mean, boxed[:, :kept, :, :kept].reshape(len(mean), len(mean))

    def _all_functions(self, x: Any) -> tuple[Tensor, Tensor]:
        """Means `(N, *, C)` of the outputs at all inputs together, and their covariance `(N, K, N, K)`."""
        precision, engine, differentiable = self.posterior.precision, self._checked_engine(), self._differentiable(x)
        with borrowed(self.model, engine.parameters):
            of_x = differentiable_joint if differentiable else jointly_linearized
            mean, covariance = of_x(engine, to_device(x, engine.parameters.device), precision)
        self._check_outputs(mean)
        return mean, covariance

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

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights, `(S, P)`."""
        return self.posterior.sample(n_samples, generator)

    def log_prob(self, weights: Tensor, normalized: bool = True) -> Tensor:
        """The posterior's log density at weights `(P,)`, or at several `(S, P)`; see `GaussianPosterior.log_prob`."""
        return self.posterior.log_prob(weights, normalized)

    def square_norm(self, weights: Tensor) -> Tensor:
        """`(w - w*)^T P (w - w*)` with the posterior precision P, at weights `(P,)`, or at several `(S, P)`."""
        return self.posterior.square_norm(weights)

    @property
    def posterior_variance(self) -> Tensor:
        """Marginal variances of the weights, `(P,)`."""
        return self.posterior.variance

    @property
    def posterior_covariance(self) -> Tensor:
        """The whole matrix `P^{-1}`, `(P, P)`."""
        return self.posterior.covariance

    @property
    def posterior_scale(self) -> Tensor:
        """`S` with `S S^T = P^{-1}`, `(P, P)`; for "diag" the standard deviations, `(P,)`."""
        return self.posterior.scale

    # -- storage

    def state_dict(self) -> dict[str, Any]:
        """All but the network, as tensors and plain values: fit, settings, hyper-parameters, and what the model was.

        Returns:
            `tensors` by name, sharing memory with what they are taken from, beside numbers, words, and lists and dicts
            of them, which `torch.load(weights_only=True)` reads as well.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        self.fitted  # noqa: B018 (an error before the fit)
        self._checked_engine()
        assert self._sums is not None
        return Checkpoint(self._settings(), self._weights, *self._sums).state(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another `Laplace` was when `state_dict` was called.

        Args:
            state: made by `state_dict`.

        Raises:
            ValueError: if the state is of another kind or version, the model is not the one that was fitted or was
                trained since, or functions that a setting holds (such as `forward_fn`) are not this object's own.
        """
        found = Checkpoint.of(state, self.model, self._settings())
        for name, value in found.settings.items():
            setattr(self, name, value)
        with torch.inference_mode(False):
            self._adopt(found.weights, found.sums, found.totals, self._likelihood_of_fit)

    def save(self, path: str | PathLike[str]) -> None:
        """Write `state_dict` to a safetensors file; the network's weights are not in it.

        With "gp", or "lowrank" in the space of functions, what the training examples were to the layers is.

        Args:
            path: the file.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            FileNotFoundError: if there is no such folder.
        """
        write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module, **settings: Any) -> Laplace:
        """Read what `save` has written; nothing in the file is executed.

        Args:
            path: the file.
            model: the network that was fitted, with the weights that it had, on any device, where all goes.
            settings: arguments of the constructor that hold functions, such as `forward_fn` or a likelihood of one's
                own, which the file does not, and `memory_budget`.

        Returns:
            Fitted, with the hyper-parameters of that time.

        Raises:
            TypeError: if the model is no module.
            ValueError: if it is no file of a `Laplace`, of another version, or the model is not the one that was fitted
                or was trained since.
        """
        # The constructor refuses a network of frozen weights, with which predictions are welcome.
        la = cls(nn.ParameterList([torch.zeros(1)]), **{"likelihood": "classification", **settings})
        la.model = model
        la.load_state_dict(read_state(path))
        return la

    @property
    def _weights(self) -> Weights:
        """The random weights: of whole tensors, or single ones."""
        return self.fitted.parameters if self._subnetwork is None else self._subnetwork

    def _settings(self) -> dict[str, Any]:
        """What is stored of an object, by the names of its attributes; a mask as the weights that it has chosen."""
        subset = self.subset
        if self._subnetwork is not None:
            subset = Subset("subnetwork", places_among(self._subnetwork, self.model))
        return {
            "likelihood": self.likelihood,
            "_likelihood_of_fit": self._likelihood_of_fit,
            "columns": self.columns,
            "structure": self.structure,
            "prior": self.prior,
            "temperature": self.temperature,
            "subset": subset,
            "subset_of_weights": self.subset_of_weights,
            "subset_of_data": self.subset_of_data,
            "forward_fn": self.forward_fn,
            "output_axis": self.output_axis,
        }
