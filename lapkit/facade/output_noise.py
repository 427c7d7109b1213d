"""A noise for each output, found together with the prior: the evidence by turns, with a pass over the data at each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature import Likelihood, PerOutputGaussian
from lapkit.curvature.callers import callers_level
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.facade.functions import Functions
from lapkit.posteriors import Fit, GaussianPrior
from lapkit.selection import EXHAUSTED, Selection

TOLERANCE = 1e-5  # of the noises' logarithms, between steps


@dataclass(frozen=True)
class _Residuals:
    """Sums over the data, by output.

    Args:
        squares: of `y - f`, `(C,)`.
        variances: of f under the posterior, `(C,)`.
        count: of targets of one output.
    """

    squares: Tensor
    variances: Tensor
    count: float

    def effective(self, noise: Tensor) -> Tensor:
        """`gamma_c = tr(P^{-1} H_c) / noise_c^2`: how many parameters the targets of each output determine, `(C,)`."""
        return self.variances / noise.square()

    def better(self, noise: Tensor) -> Tensor:
        """Noises at which the evidence is larger, `(C,)`.

        MacKay's `|r_c|^2 / (N - gamma_c)` where the data are many, and otherwise EM's `(|r_c|^2 + tr(P^{-1} H_c)) / N`,
        which never leads down; both stand still where the evidence has no slope.
        """
        gamma = self.effective(noise)
        mackay = self.squares / (self.count - gamma).clamp_min(self.count / 2)
        em = (self.squares + self.variances) / self.count
        return torch.where(gamma < self.count / 2, mackay, em).sqrt()


def tune_output_noise(
    la: Functions,
    data: Iterable[Any],
    tune: Callable[[Fit, Likelihood, GaussianPrior], Selection],
    n_steps: int,
    bounds: tuple[float, float],
) -> bool:
    """Find the noise of each output, and the prior that belongs to it.

    Args:
        la: fitted to `PerOutputGaussian`; it is fitted again at each step, and is left with what was found.
        data: the batches that were fitted.
        tune: finds the prior at the noise that there is.
        n_steps: at most.
        bounds: smallest and largest noise.

    Returns:
        Whether the noises stand still.

    Raises:
        ValueError: if the likelihood has no noise for each output, curvature is random or no GGN, steps or bounds are
            none, or the data are not those that were fitted.

    Reference:
        MacKay, Bayesian interpolation, 1992, eq. (4.9), for each output.
    """
    if not isinstance(la.likelihood, PerOutputGaussian) or la.columns.random or la.columns.dispersion_power != 1:
        raise ValueError(
            "noise_loader finds a noise for each output, by the exact GGN: it needs the likelihood PerOutputGaussian "
            f"and curvature='ggn', got {la.likelihood} and {la.columns}. One noise for all needs no noise_loader."
        )
    if n_steps < 1 or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(
            f"Expected at least one step, and noise bounds that ascend, got n_steps={n_steps} and {bounds}."
        )
    change = math.inf
    for _ in range(n_steps):
        with warnings.catch_warnings():  # those of the last search are the caller's to hear
            warnings.simplefilter("ignore")
            la.prior = tune(la.fitted, la.likelihood, la.prior).prior
        residuals, old = _residuals(la, data), _noise(la)
        new = residuals.better(old).clamp(*bounds)
        la._likelihood = PerOutputGaussian(new)  # of another fit, which follows
        la.fit(data)
        change = float((new / old).log().abs().max())
        if change < TOLERANCE:
            break
    _warn(_noise(la), residuals, bounds)
    return change < TOLERANCE


def _noise(la: Functions) -> Tensor:
    """Of each output, `(C,)`."""
    assert isinstance(la.likelihood, PerOutputGaussian)
    return (la.likelihood.noise * la.likelihood.scale).to(la.mean)


def _residuals(la: Functions, data: Iterable[Any]) -> _Residuals:
    """One pass over the data that were fitted.

    Raises:
        ValueError: if they are others.
    """
    parts, loss = [], torch.zeros((), dtype=torch.float64)
    for number, batch in numbered(data):
        x, y, weights = to_device(unpack(batch, number), la.mean.device)
        f = la.function_distribution(x)
        y = la.likelihood.check(f.mean, y, la.output_axis)
        weights = f.mean.new_ones(len(y)) if weights is None else weights.to(f.mean)
        loss += (la.likelihood.loss(f.mean, y) * weights).sum().double().cpu()
        rows = weights.reshape(-1, *[1] * (y.ndim - 1)).expand(*y.shape[:-1], 1)
        squares, variances = ((rows * t).flatten(0, -2).sum(0) for t in ((y - f.mean).square(), f.variance))
        parts.append(_Residuals(squares, variances, float(rows.sum())))
    if not torch.isclose(loss, la.fitted.loss.double().cpu(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The data have a loss of {float(loss):g}, those that were fitted one of {float(la.fitted.loss):g}. Give "
            "the same batches again, in a container that can be read more than once."
        )
    return _Residuals(
        torch.stack([p.squares for p in parts]).sum(0),
        torch.stack([p.variances for p in parts]).sum(0),
        sum(p.count for p in parts),
    )


def _warn(noise: Tensor, residuals: _Residuals, bounds: tuple[float, float]) -> None:
    """Tell of noises that the data do not determine."""
    effective = residuals.effective(noise)
    exhausted = effective > EXHAUSTED * residuals.count
    odd = exhausted | (noise <= bounds[0]) | (noise >= bounds[1])
    if odd.any():
        listed = [f"{float(noise[c]):.3g} of output {c} ({float(effective[c]):.1f} effective parameters)"
                  for c in odd.nonzero().flatten().tolist()]  # fmt: skip
        warnings.warn(
            f"Tuned noises may mean nothing: {', '.join(listed)}, for {residuals.count:g} targets each. A network that "
            "reproduces its targets shows no noise. Set the noise from held-out residuals, or tune it during training, "
            "by lapkit.marglik.marglik_training.",
            stacklevel=callers_level(),
        )
