"""Hyper-parameters set by the evidence, or by held-out data."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Gamma
from tqdm import tqdm

from lapkit.choices import PRIOR_STRUCTURES, choice
from lapkit.curvature import Parameters
from lapkit.curvature.callers import callers_level
from lapkit.curvature.inputs import check_batches
from lapkit.evidence_search import OPTIMIZERS, Found, Search, group_sizes
from lapkit.evidence_surface import EvidenceSurface
from lapkit.facade.functions import Functions
from lapkit.facade.output_noise import tune_output_noise
from lapkit.grid_search import Loss, Score, grid_search, log_grid, score_of, warn_at_edge
from lapkit.posteriors import LINKS, GaussianPrior
from lapkit.refit import refit
from lapkit.selection import NOISE_BOUNDS, PRECISION_BOUNDS, Selection, maximize_evidence

STEPS = 100  # of a search, at most
STEEP = 0.01  # nats; less of a slope makes no difference that anyone would see


class Tuning(Functions):
    """The one explicit call that changes hyper-parameters."""

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        *,
        optimizer: str = "auto",
        tune_noise: bool = False,
        n_steps: int = STEPS,
        bounds: tuple[float, float] = PRECISION_BOUNDS,
        noise_bounds: tuple[float, float] = NOISE_BOUNDS,
        hyper_prior: Gamma | None = None,
        refit_loader: Iterable[Any] | None = None,
        noise_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        loss: Loss | None = None,
        grid_size: int = 29,
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
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
                evidence is concave in the logarithms, so that all find the same maximum. "auto" is Newton's method
                on MacKay's condition for one precision over known eigenvalues, the fastest, and "lbfgs" for all else.
            tune_noise: also tune the observation noise of a regression; of a `PerOutputGaussian` the factor that all
                noises share, or each by itself with `noise_loader`.
            n_steps: iterations at most.
            bounds: smallest and largest precision; a search that ends there warns.
            noise_bounds: smallest and largest standard deviation of the noise.
            hyper_prior: `torch.distributions.Gamma(a, b)` over each precision, for where the data say nothing of it;
                with it `delta = (gamma + 2 a) / (|w - m|^2 + 2 b)` at the maximum.
            refit_loader: the batches that were fitted, once more: the evidence of the linearised network is maximised,
                at its own mode, which is found in turn with the precisions (see `lapkit.refit`). For networks that
                stopped training early, or whose normalisation makes the scale of the weights arbitrary. All Jacobians
                stay in memory, factored, and hundreds of products with them are made: seconds for a last layer,
                minutes for all layers of a small convolutional network.
            noise_loader: of a `PerOutputGaussian` with `tune_noise`: the batches that were fitted, once more. The noise
                of each output is tuned, by turns with the prior, which takes two passes over the data at each step.
            val_loader: batches `(inputs, targets)`, or `(inputs, targets, weights)`, that were not trained on.
            loss: of a `torch.distributions.Distribution` of targets and the targets: one number for each example, or
                their mean. By default the negative log likelihood, observation noise included.
            grid_size: how many precisions between the bounds.
            link_approx: for classes, as for predictions.
            n_samples: of "mc" and "qmc".
            generator: of "mc" and "qmc"; all precisions see the same numbers.
            progress_bar: count batches of a grid search, and steps of a search that factors a matrix at each of them.

        Returns:
            How the search went; the best values are set.

        Raises:
            RuntimeError: before `fit`.
            TypeError: if the held-out data are no batches.
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
            check_batches(val_loader)
            link = choice(LINKS, link_approx, "link_approx")
            score = score_of(self.likelihood, loss, link, n_samples, generator)
            batches = tqdm(val_loader, desc="grid search", leave=False) if progress_bar else val_loader
            return self._on_grid(batches, log_grid(bounds, grid_size), score)
        if val_loader is not None or loss is not None:
            raise ValueError("val_loader and loss belong to method='gridsearch'; the evidence needs no held-out data.")
        search = choice(OPTIMIZERS, optimizer, "optimizer")
        structure = choice(PRIOR_STRUCTURES, prior_structure, "prior_structure")
        with tqdm(desc="prior precision", unit="step", disable=not progress_bar, leave=False) as bar:
            tune = partial(
                maximize_evidence,
                groups=group_sizes(self.fitted, structure),
                search=_watched(search, bar),
                tune_noise=tune_noise and noise_loader is None,
                temperature=self.temperature,
                n_steps=n_steps,
                bounds=bounds,
                noise_bounds=noise_bounds,
                hyper_prior=hyper_prior,
                left_out=Parameters.of(self.model).numel - self.fitted.parameters.numel if tune_noise else 0,
            )
            found_all = True
            if noise_loader is not None:
                if not tune_noise or refit_loader is not None:
                    raise ValueError("noise_loader belongs to tune_noise=True, without refit_loader.")
                other = copy.copy(self)  # which is fitted again and again; an error leaves this one as it is
                found_all = tune_output_noise(other, noise_loader, tune, n_steps, noise_bounds)
                vars(self).update(vars(other))
            given = self.fitted, self.likelihood, self.prior
            if refit_loader is None:
                found = tune(*given)
            else:
                engine = self._checked_engine()
                options = {"temperature": self.temperature, "tick": bar.update}
                found = refit(engine, *given, refit_loader, tune, **options).selection
        self.prior, self._likelihood = found.prior, found.likelihood
        found = replace(found, converged=found.converged and found_all)
        if not found.converged and found.slope > STEEP and n_steps >= STEPS:  # who asks for fewer expects no maximum
            warnings.warn(
                f"The search stopped before the maximum of the evidence: a slope of {found.slope:.3g} nats is left. "
                f"Take more steps than n_steps={n_steps}, or another optimizer.",
                stacklevel=callers_level(),
            )
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


def _watched(search: Search, bar: tqdm[Any]) -> Search:
    """The same search, which counts its evaluations."""

    def run(surface: EvidenceSurface, *given: Any) -> Found:
        return search(replace(surface, tick=bar.update), *given)

    return run
