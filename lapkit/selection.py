"""Hyper-parameters by marginal likelihood: prior precision and observation noise that make the data most probable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Gamma

from lapkit.curvature import Likelihood
from lapkit.curvature.callers import callers_level
from lapkit.evidence_search import Search, automatic
from lapkit.evidence_surface import EvidenceSurface
from lapkit.grid_search import Grid
from lapkit.posteriors import Fit, GaussianPrior
from lapkit.posteriors.eigenvalues import known_eigenvalues

# Values outside are beyond what data of any scale can tell; the search stops there and says so.
PRECISION_BOUNDS = (1e-6, 1e8)
NOISE_BOUNDS = (1e-6, 1e6)
NO_PRIOR = ("no prior at all, or say nothing (inputs always zero, dead units)", "all weights at the prior mean")
NO_NOISE = ("no noise at all, as if the network reproduced the targets", "nothing but noise")
EXHAUSTED = 0.9  # of the target values: with so many effective parameters, residuals say little of the noise
AT_EDGE = 1e-6  # from it, in a logarithm
SHOWN = 6  # parameters that a warning names
LEFT_OUT = 0.1  # of the target values: so many weights that were trained but are not random hide some of the noise


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of a search; prints in a line.

    Args:
        prior: with the best precision.
        likelihood: with the best noise, if that was tuned.
        log_evidence: reached, in nats; a hyper-prior is not in it.
        converged: whether the optimiser was satisfied.
        evaluations: of evidence and gradient.
        slope: the largest slope left of what was maximised, in any logarithm that is not held by its bound, in nats.
        effective: MacKay's effective number of parameters of each group of weights, `(G,)`: how many of them the data
            determine rather than the prior.
        grid: the scores of a search on a grid; there, `converged` says that the best is not at its edge, and no slope
            is known.
    """

    prior: GaussianPrior
    likelihood: Likelihood
    log_evidence: float
    converged: bool
    evaluations: int
    slope: float
    effective: Tensor
    grid: Grid | None = None

    def __repr__(self) -> str:
        precision = torch.as_tensor(self.prior.precision).detach().flatten()
        found = f"prior precision {float(precision.max()):.4g}"
        if len(self.effective) > 1:
            found = (
                f"{len(self.effective)} prior precisions, {float(precision.min()):.4g} to {float(precision.max()):.4g}"
            )
        if self.grid is not None:
            place = "inside" if self.converged else "at the edge of"
            score = float(self.grid.scores[self.grid.best])
            return f"Selection({found}; held-out loss {score:.6g}; {place} a grid of {self.evaluations})"
        ended = "converged" if self.converged else "not converged"
        return f"Selection({found}; log evidence {self.log_evidence:.6g}; {ended} after {self.evaluations} evaluations)"


def maximize_evidence(
    fit: Fit,
    likelihood: Likelihood,
    prior: GaussianPrior,
    *,
    groups: Sequence[int] | None = None,
    search: Search = automatic,
    tune_noise: bool = False,
    temperature: float = 1.0,
    n_steps: int = 100,
    bounds: tuple[float, float] = PRECISION_BOUNDS,
    noise_bounds: tuple[float, float] = NOISE_BOUNDS,
    hyper_prior: Gamma | None = None,
    left_out: int = 0,
) -> Selection:
    """Maximise the log evidence over the logarithms of prior precisions and, if asked, of the noise, in float64.

    The curvature's eigenvalues are computed once; with one precision an evaluation costs O(P). At the fixed mode the
    evidence is concave in these logarithms, so that every search finds the same maximum, from every start.

    Args:
        fit: curvature, loss and mode.
        likelihood: of the targets.
        prior: where the search starts; its mean is kept.
        groups: sizes of the groups of consecutive weights that have a precision each; all weights share one by default.
        search: one of `evidence_search.OPTIMIZERS`.
        tune_noise: also tune a Gaussian likelihood's noise.
        temperature: of the likelihood.
        n_steps: iterations at most.
        bounds: smallest and largest precision.
        noise_bounds: smallest and largest standard deviation of the noise.
        hyper_prior: `Gamma(a, b)` over each precision. Its density over the log precision counts, which has the mode
            a / b, so that `delta = (gamma + 2 a) / (|w - m|^2 + 2 b)` at the maximum.
        left_out: number of trained weights that the fit is not over.

    Returns:
        The best hyper-parameters.

    Raises:
        ValueError: if noise is to be tuned that the likelihood does not have, bounds are not positive and ascending,
            groups do not make up the weights, or the evidence is not finite.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the search needs gradients, wherever it is called
        if tune_noise:
            likelihood.with_noise(1.0)  # an error, if it has none
        groups = (fit.parameters.numel,) if groups is None else tuple(groups)
        if sum(groups) != fit.parameters.numel:
            raise ValueError(f"Groups of {sum(groups)} weights in all were given for {fit.parameters.numel} weights.")
        values = known_eigenvalues(fit.curvature) if len(groups) == 1 else None
        curvature = fit.curvature.to(torch.float64) if values is None else fit.curvature
        double = replace(fit, curvature=curvature, mean=fit.mean.double(), loss=fit.loss.double())
        mean = prior.mean.double() if isinstance(prior.mean, Tensor) else prior.mean
        surface = EvidenceSurface(double, likelihood, mean, groups, tune_noise, temperature, hyper_prior, values)
        lower, upper = _edges(surface, bounds, noise_bounds)
        found = search(surface, _start(surface, prior).clamp(lower, upper), lower, upper, n_steps)
        logs = found.logs
        reached = surface.at(logs)
        tell, free = _Warnings(surface, logs, lower, upper), reached.gradient
        if ((logs - lower < AT_EDGE) | (upper - logs < AT_EDGE)).any():
            tell.edges()
            held = ((logs <= lower) & (free < 0)) | ((logs >= upper) & (free > 0))
            free = torch.where(held, 0.0, free)
        if tune_noise:
            tell.noise(float(reached.effective.sum()), left_out)
        return Selection(
            prior=GaussianPrior(surface.precision(logs).to(fit.mean.dtype), prior.mean),
            likelihood=likelihood.with_noise(float(logs[-1].exp())) if tune_noise else likelihood,
            log_evidence=float(reached.log_evidence),
            converged=found.converged,
            evaluations=found.evaluations,
            slope=float(free.abs().max()),
            effective=reached.effective,
        )


def _edges(
    surface: EvidenceSurface, precision: tuple[float, float], noise: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Logarithms of the bounds.

    Raises:
        ValueError: if they are not positive and ascending.
    """
    if not all(0 < low < high < math.inf for low, high in (precision, noise)):
        raise ValueError(f"Bounds are positive and ascending, got {precision} for precisions, {noise} for noise.")
    size = len(surface.groups) + surface.tune_noise
    lower, upper = (surface.squares.new_full((size,), math.log(edge)) for edge in precision)
    if surface.tune_noise:
        lower[-1], upper[-1] = (math.log(edge) for edge in noise)
    return lower, upper


def _start(surface: EvidenceSurface, prior: GaussianPrior) -> Tensor:
    """Logarithms of the precisions now, averaged over each group, and of the noise."""
    if isinstance(prior.precision, Tensor) and prior.precision.numel() > 1:
        own = prior.diagonal(surface.fit.parameters).detach().double().log()
        start = surface.total(own) / surface.sizes
    else:
        start = prior.values(surface.fit.parameters).detach().to(surface.squares).log().expand(len(surface.groups))
    if not surface.tune_noise:
        return start
    precision = torch.as_tensor(surface.likelihood.precision).detach().to(start).reshape(1)
    return torch.cat([start, -precision.log() / 2])


@dataclass(frozen=True, eq=False)
class _Warnings:
    """What a search has found that its user should know."""

    surface: EvidenceSurface
    logs: Tensor
    lower: Tensor
    upper: Tensor

    def edges(self) -> None:
        """Of values at the edge of the search."""
        for side, edge in enumerate((self.lower, self.upper)):
            at = (self.logs - edge).abs() < AT_EDGE
            inside = at[: len(self.surface.groups)]
            if inside.any():
                of = "" if len(self.surface.groups) == 1 else f" of {self._listed(inside)}"
                self._edge("prior precision", float(edge[0].exp()), NO_PRIOR[side], of)
            if self.surface.tune_noise and at[-1]:
                self._edge("noise", float(edge[-1].exp()), NO_NOISE[side], "")

    def noise(self, effective: float, left_out: int) -> None:
        """Of a noise that the residuals of the data that were trained on do not tell."""
        targets = self.surface.fit.count * self.surface.fit.outputs
        why = None
        if effective > EXHAUSTED * targets:
            why = f"the fit has {effective:.1f} effective parameters for {targets:g} target values"
        elif left_out > LEFT_OUT * targets:
            why = (
                f"{left_out} more weights than the approximation is over were trained on the same {targets:g} target "
                "values, and what they took up of the noise is not counted"
            )
        if why:
            warnings.warn(
                f"The tuned noise {float(self.logs[-1].exp()):.3g} may be far too small: {why}. Set sigma_noise from "
                "held-out residuals, or tune it during training, by lapkit.marglik.marglik_training.",
                stacklevel=callers_level(),
            )

    def _listed(self, groups: Tensor) -> str:
        """The parameters that groups belong to, with how many of each; the first few."""
        parameters, sizes = self.surface.fit.parameters, self.surface.sizes
        ends = torch.tensor(parameters.sizes, device=sizes.device).cumsum(0)
        owners = torch.searchsorted(ends, sizes.cumsum(0)[groups] - 1, right=True)
        found = [(parameters.names[i], int(n)) for i, n in enumerate(owners.bincount(minlength=len(ends))) if n]
        shown = ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in found[:SHOWN])
        return shown + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

    @staticmethod
    def _edge(what: str, value: float, meaning: str, of: str) -> None:
        warnings.warn(
            f"The evidence is largest at the edge of the search, {what} {value:g}{of}: the data speak for {meaning}. "
            "Check that the network is trained, and the scale of the data.",
            stacklevel=callers_level(),
        )
