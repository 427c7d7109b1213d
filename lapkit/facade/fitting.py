"""A pass over the data: the curvature at a trained network's weights, and the network it belongs to."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Iterable
from operator import length_hint
from typing import Any, TypeVar

import torch
from torch import nn

from lapkit.backends import BACKENDS
from lapkit.curvature import (
    Columns,
    Engine,
    Likelihood,
    Parameters,
    Subnetwork,
    SubnetworkEngine,
    SymmetricOperator,
)
from lapkit.curvature.accumulate import Totals
from lapkit.curvature.callers import callers_level
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.fingerprint import fingerprint
from lapkit.curvature.inputs import check_batches
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.operators.woodbury import Woodbury
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.posteriors import Fit, GaussianPosterior, GaussianPrior
from lapkit.posteriors.function_space.subset import Subset as SubsetOfData
from lapkit.posteriors.function_space.subset import chosen_examples
from lapkit.structures import Structure, added
from lapkit.subnetworks import Task
from lapkit.subsets import Subset, Weights

_Self = TypeVar("_Self", bound="Fitting")
MANY = 5000  # columns, of which the factorisation of a matrix between them takes minutes


class Fitting(ABC):
    """What a `Laplace` holds, and how data come to it."""

    model: nn.Module
    likelihood: Likelihood
    subset_of_weights: str | tuple[str, ...]
    subset: Subset
    subset_of_data: SubsetOfData | None
    structure: Structure
    columns: Columns
    prior: GaussianPrior
    temperature: float
    memory_budget: int | None
    forward_fn: ForwardFunction | None
    output_axis: int | None
    backend: str
    _fit: Fit | None
    _sums: tuple[CurvatureSum, Totals] | None
    _likelihood_of_fit: Likelihood
    _subnetwork: Subnetwork | None
    _engine: Engine | None
    _fitted_to: list[int]
    _posterior: tuple[tuple[Any, ...], GaussianPosterior] | None

    def fit(
        self: _Self,
        train_loader: Iterable[Any],
        override: bool = True,
        *,
        progress_bar: bool = False,
        generator: torch.Generator | None = None,
    ) -> _Self:
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
        sums, totals = BACKENDS[self.backend].sum(
            self.structure,
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
        _warn_of_size(self.fitted.curvature)
        _warn_of_silence(self.fitted)
        return self

    def _adopt(self, weights: Weights, sums: CurvatureSum, totals: Totals, likelihood: Likelihood) -> None:
        """Be fitted by these sums, at the network's present weights."""
        random = weights.weights if isinstance(weights, Subnetwork) else weights
        mean, curvature = summable(random.vector()), self.structure.operator(sums, weights)
        fit = Fit(
            parameters=random,
            mean=mean,
            curvature=curvature,
            loss=totals.loss.clone(),
            count=totals.weight,
            outputs=totals.outputs,
            dispersion_power=self.columns.dispersion_power,
        )
        engine, fitted_to = self._made_engine(weights), fingerprint(self.model)
        self._fit, self._engine, self._fitted_to = fit, engine, fitted_to
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

    def _checked_engine(self) -> Engine:
        assert self._engine is not None  # `fitted` has been asked before
        same = fingerprint(self.model) == self._fitted_to
        present = self._engine.parameters.vector()
        present = present if self._subnetwork is None else present[self._subnetwork.indices]
        if not (same and torch.equal(summable(present), self.fitted.mean)):
            raise RuntimeError(
                "The network's weights are not those that were fitted, or its buffers (such as running statistics) are "
                "not: it was trained or loaded since. Call fit again."
            )
        return self._engine

    @property
    def _weights(self) -> Weights:
        """The random weights: of whole tensors, or single ones."""
        return self.fitted.parameters if self._subnetwork is None else self._subnetwork


def _warn_of_silence(fit: Fit) -> None:
    """Say that the posterior is the prior."""
    if not fit.loss and not fit.curvature.trace():
        warnings.warn(
            f"The {float(fit.count):g} examples say nothing of the weights: loss and curvature are exactly zero. "
            "No label counts (all are -100, or all weights of examples are zero), or the network gives every label a "
            "probability of one to all digits, or no residual is left.",
            stacklevel=callers_level(),
        )


def _warn_of_size(curvature: SymmetricOperator) -> None:
    """Say before it happens that predictions and evidences will take long."""
    if isinstance(curvature, Woodbury) and curvature.rank > MANY:
        size = curvature.rank
        warnings.warn(
            f"The curvature has {size} columns, one for each example and output or for each weight, whichever are "
            f"fewer. Each new prior precision or noise factors a matrix of {size} x {size} numbers, which takes "
            "minutes where there are many. To be faster, condition on fewer examples (hessian_structure='gp' with "
            "subset_of_data=500), or choose 'kron' or fewer weights (subset_of_weights='last_layer').",
            stacklevel=callers_level(),
        )
