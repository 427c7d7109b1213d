"""The prior precision by held-out data: how probable they are under the predictive distribution, on a grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    Dense,
    Engine,
    Likelihood,
    NetworkJacobian,
    SymmetricOperator,
    borrowed,
)
from lapkit.curvature.callers import callers_level
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.posteriors import (
    Fit,
    FunctionDistribution,
    GaussianPrior,
    Link,
    from_jacobian,
    laplace_posterior,
    linearized_pieces,
    predictive,
)
from lapkit.posteriors.links import probit

Loss = Callable[[Distribution, Tensor], Tensor]
Score = Callable[[FunctionDistribution, Tensor], Tensor]  # of a distribution of f and targets, (N,)


@dataclass(frozen=True)
class Grid:
    """Prior precisions, and what they are worth.

    Args:
        precisions: ascending, `(G,)`.
        scores: mean loss of a held-out example under each, infinite where the predictive has failed, `(G,)`.
    """

    precisions: Tensor
    scores: Tensor

    @property
    def best(self) -> int:
        """The place of the smallest score; of equal ones, the largest precision, which is the simplest model.

        Raises:
            ValueError: if all scores are equal, or none is finite.
        """
        finite = torch.isfinite(self.scores)
        if not finite.any():
            raise ValueError("The loss is infinite or NaN at every prior precision. Check targets and loss.")
        smallest, largest = (float(e) for e in self.scores[finite].aminmax())
        rounding = 1e3 * torch.finfo(torch.float64).eps * max(abs(smallest), abs(largest))
        if finite.sum() > 1 and largest - smallest <= rounding:
            raise ValueError(
                f"The loss is {smallest:g} at every prior precision: it does not see the predictive variance, as the "
                "squared error of the mean does not. Give no loss, for the negative log likelihood, or another one."
            )
        return int((self.scores <= smallest + rounding).nonzero().max())


def log_grid(bounds: tuple[float, float], size: int) -> Tensor:
    """Precisions at equal distances of their logarithms, `(G,)`, float64.

    Raises:
        ValueError: if bounds are not positive and ascending, or there are not at least two points.
    """
    if not 0 < bounds[0] < bounds[1] < math.inf or size < 2:
        raise ValueError(f"Expected positive ascending bounds and at least two points, got {bounds} and {size}.")
    first, last = torch.tensor(bounds, dtype=torch.float64).log10().tolist()
    return torch.logspace(first, last, size, dtype=torch.float64)


def grid_search(
    engine: Engine,
    fit: Fit,
    likelihood: Likelihood,
    prior: GaussianPrior,
    data: Iterable[Any],
    precisions: Tensor,
    score: Score,
    temperature: float = 1.0,
) -> Grid:
    """Score prior precisions in one pass over held-out data: each batch's Jacobian is computed once for all of them.

    Args:
        engine: the model at the mode.
        fit: curvature and mode.
        likelihood: of the targets.
        prior: whose mean is kept.
        data: batches `(inputs, targets)` or `(inputs, targets, weights)` that were not trained on.
        precisions: ascending, `(G,)`.
        score: of the outputs' distribution and the checked targets, `(N,)`.
        temperature: of the likelihood.

    Returns:
        The mean score at each. One that fails, because a matrix is not positive definite there, is infinite.

    Raises:
        TypeError: if a batch has the wrong type.
        ValueError: if there is no data, or targets do not fit the likelihood.
    """
    make = partial(_precision, fit, likelihood, prior, temperature)
    each = fit.curvature.size**2 * fit.mean.dtype.itemsize
    keep = not isinstance(fit.curvature, Dense) or 3 * len(precisions) * each <= engine.budget
    operators: Sequence[SymmetricOperator | None] = [make(p) if keep else None for p in precisions]
    totals, weight = torch.zeros(len(precisions), dtype=torch.float64), 0.0
    for number, batch in numbered(data):
        x, y, weights = to_device(unpack(batch, number), engine.parameters.device)
        with borrowed(engine.model, engine.parameters):
            begin = 0
            for mean, jacobian in linearized_pieces(engine, x):
                part = slice(begin, begin + len(mean))
                begin = part.stop
                target = likelihood.check(mean, y[part], engine.output_axis)
                w = mean.new_ones(len(mean)) if weights is None else weights[part].to(mean)
                for index, operator in enumerate(operators):
                    operator = make(precisions[index]) if operator is None else operator
                    totals[index] += _total(mean, jacobian, operator, score, target, w)
                weight += float(w.sum())
    if not weight:
        raise ValueError("There is no validation data: val_loader gave no batch, or all weights are zero.")
    return Grid(precisions, torch.nan_to_num(totals / weight, nan=math.inf, posinf=math.inf))


def _precision(
    fit: Fit, likelihood: Likelihood, prior: GaussianPrior, temperature: float, value: Tensor
) -> SymmetricOperator:
    """The posterior's precision under another prior."""
    return laplace_posterior(fit, likelihood, GaussianPrior(value.to(fit.mean), prior.mean), temperature).precision


def _total(
    mean: Tensor, jacobian: NetworkJacobian, operator: SymmetricOperator, score: Score, y: Tensor, weights: Tensor
) -> float:
    """The weighted sum of scores, infinite where a factorisation fails."""
    try:
        f = from_jacobian(mean, jacobian, operator)
    except (ValueError, LinAlgError):  # a matrix that is not positive definite in its type
        return math.inf
    if not torch.isfinite(f.covariance).all():
        return math.inf
    return float((score(f, y).double() * weights.double()).sum())


def score_of(
    likelihood: Likelihood, loss: Loss | None, link: Link, n_samples: int, generator: torch.Generator | None
) -> Score:
    """What is to be small: a loss of the predictive distribution, by default its negative log likelihood.

    Args:
        likelihood: of targets given outputs.
        loss: of a distribution and targets: one number for each example `(N,)`, or their mean.
        link: for classes.
        n_samples: of links that sample; all precisions see the same random numbers.
        generator: of links that sample.
    """
    state = None if generator is None else generator.get_state()

    def score(f: FunctionDistribution, y: Tensor) -> Tensor:
        source = generator if generator is None or state is None else _copy(generator, state)
        if loss is None:
            return negative_log_predictive(likelihood, f, y, link, n_samples, source)
        found = loss(predictive(likelihood, f, link, n_samples, source), y)
        return found.expand(len(y)) if found.ndim == 0 else found.flatten(1).sum(1) if found.ndim > 1 else found

    return score


def _copy(generator: torch.Generator, state: Tensor) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(state)
    return copy


@singledispatch
def negative_log_predictive(
    likelihood: Likelihood,
    f: FunctionDistribution,
    y: Tensor,
    link: Link = probit,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`-log p(y|x)` of each example, observation noise included, summed over positions.

    Args:
        likelihood: of targets given outputs.
        f: the outputs' distribution.
        y: checked targets; missing ones count nothing, and weighted or smoothed ones as in the loss.
        link: for classes.
        n_samples: of links that sample.
        generator: of links that sample.

    Returns:
        `(N,)`.
    """
    log_prob: Tensor = predictive(likelihood, f, link, n_samples, generator).log_prob(y)
    return -log_prob.reshape(len(y), -1).sum(1)


@negative_log_predictive.register
def _(
    likelihood: Categorical,
    f: FunctionDistribution,
    y: Tensor,
    link: Link = probit,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    p = link(likelihood, f, n_samples, generator)
    return likelihood.loss(p.clamp_min(torch.finfo(p.dtype).tiny).log(), y)


@negative_log_predictive.register
def _(
    likelihood: Bernoulli,
    f: FunctionDistribution,
    y: Tensor,
    link: Link = probit,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    p = link(likelihood, f, n_samples, generator)
    return likelihood.loss(torch.logit(p, eps=torch.finfo(p.dtype).eps), y)


def warn_at_edge(grid: Grid, best: int) -> None:
    """Tell that a better precision may lie outside."""
    if best in (0, len(grid.precisions) - 1):
        side, remedy = "smallest", "a smaller one may be better still: widen the bounds"
        if best:
            side, remedy = "largest", "as good as no uncertainty of the weights, or widen the bounds for a larger one"
        warnings.warn(
            f"The {side} prior precision of the grid, {float(grid.precisions[best]):g}, is the best: {remedy}.",
            stacklevel=callers_level(),
        )
