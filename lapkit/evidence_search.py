"""Ways to the top of the evidence: MacKay's condition and its fixed point, L-BFGS, and Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lapkit.evidence_surface import EvidenceSurface
from lapkit.posteriors import Fit

TOLERANCE = 1e-9  # of the logarithms, between steps
LAST_STEP = 1e-6  # of Newton's method for a root, whose error is squared by each step
LONGEST_STEP = 4.0  # of Newton's method, in a logarithm


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Args:
        logs: logarithms of precisions and noise.
        converged: whether it ended by itself.
        evaluations: of evidence and gradient, or of the effective numbers of parameters.
    """

    logs: Tensor
    converged: bool
    evaluations: int


Search = Callable[[EvidenceSurface, Tensor, Tensor, Tensor, int], Found]


def automatic(surface: EvidenceSurface, start: Tensor, lower: Tensor, upper: Tensor, n_steps: int) -> Found:
    """Newton's method on MacKay's condition for one precision over known eigenvalues; L-BFGS for all else."""
    chosen = lbfgs if surface.eigenvalues is None or surface.tune_noise else root_of_condition
    return chosen(surface, start, lower, upper, n_steps)


def root_of_condition(surface: EvidenceSurface, start: Tensor, lower: Tensor, upper: Tensor, n_steps: int) -> Found:
    """The root of MacKay's condition for one precision, `log(gamma + 2 a) = log(delta (|w - m|^2 + 2 b))`.

    Their difference falls in log delta, with a slope between -2 and -1: its value anywhere brackets the root. Newton's
    steps stay within these brackets. Each is one pass over the eigenvalues.

    Raises:
        ValueError: if there are several hyper-parameters, or the curvature's eigenvalues are not known.
    """
    values = surface.eigenvalues
    if values is None or surface.tune_noise:
        raise ValueError(
            "MacKay's condition is for one prior precision over known eigenvalues; choose optimizer='lbfgs'."
        )
    shape, rate = surface.gamma
    log_scale = float(surface.log_scale(start).detach())
    denominator = float(surface.squares.detach()) + 2 * rate
    shares = torch.empty_like(values)
    log, low, high = float(start), float(lower), float(upper)
    for number in range(1, n_steps + 1):
        torch.add(values, math.exp(log - log_scale), out=shares)
        torch.div(values, shares, out=shares)
        effective = float(shares.sum())
        numerator = effective + 2 * shape
        if math.isnan(numerator) or numerator == denominator == 0:  # NaN is told by what reads the evidence there
            return Found(start, True, number)
        if numerator <= 0 or denominator <= 0:
            return Found(lower if numerator <= 0 else upper, True, number)
        excess = math.log(numerator) - math.log(denominator) - log
        low, high = max(low, log + min(excess, excess / 2)), min(high, log + max(excess, excess / 2))
        if low >= high:  # also where rounding is all that is left of the excess
            inside = float(lower) < log + excess < float(upper)
            return Found(torch.full_like(start, log) if inside else (lower if excess < 0 else upper), True, number)
        steepness = 1 + (effective - float(shares @ shares)) / numerator
        following = log + excess / steepness
        if abs(following - log) < LAST_STEP:
            return Found(torch.full_like(start, following), True, number)
        log = following if low < following < high else (low + high) / 2
    return Found(torch.full_like(start, log), False, n_steps)


def lbfgs(surface: EvidenceSurface, start: Tensor, lower: Tensor, upper: Tensor, n_steps: int) -> Found:
    """L-BFGS-B with exact gradients: for any number of precisions."""

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = surface.slope(torch.tensor(point, dtype=torch.float64, device=start.device))
        return -value, -gradient.cpu().numpy()

    found = minimize(
        objective,
        start.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack([lower.cpu().numpy(), upper.cpu().numpy()], axis=1),
        options={"maxiter": n_steps, "ftol": 1e-14, "gtol": 1e-9, "maxls": 40, "maxfun": 20 * n_steps},
    )
    return Found(torch.tensor(found.x, dtype=torch.float64, device=start.device), bool(found.success), int(found.nfev))


def fixed_point(surface: EvidenceSurface, start: Tensor, lower: Tensor, upper: Tensor, n_steps: int) -> Found:
    """MacKay: `delta <- (gamma + 2 a) / (|w - m|^2 + 2 b)`, `noise^2 <- (|r|^2 + noise^2 gamma) / (N C)`.

    There is no step length. Of the old precision and the new one the geometric mean is taken: where a precision is
    large, `gamma` falls as fast as it rises, and the plain iteration swings about the fixed point for ever; the mean
    halves the distance or does better. A step that does not lead up is cut. The noise at the fixed point is MacKay's
    `|r|^2 / (N C - gamma)`, but on the way there `gamma` may exceed N C.

    Reference:
        MacKay, A practical Bayesian framework for backpropagation networks, 1992; Tipping, Sparse Bayesian learning
        and the relevance vector machine, 2001, for the hyper-prior Gamma(a, b).
    """
    logs, value = start, float(surface(start))
    evaluations = 1
    for _ in range(n_steps):
        target, slope = _fixed_point_of(surface, logs)
        target = torch.maximum(torch.minimum(target, upper), lower)
        step = (target - logs) / 2
        for halvings in range(12):
            following = logs + step * 0.5**halvings
            new_value = float(surface(following))
            evaluations += 2
            if new_value >= value - 1e-13 * abs(value):
                break
        else:  # no way up that shows in the digits of the evidence
            return Found(logs, bool(step.abs().max() < math.sqrt(TOLERANCE)), evaluations)
        reached = step.abs().max() < TOLERANCE or slope < TOLERANCE
        # The edge itself, which halves would only come near to.
        logs = torch.where((target - following).abs() < 4 * TOLERANCE, target, following)
        value = new_value
        if reached:
            return Found(logs, True, evaluations)
    return Found(logs, False, evaluations)


def _fixed_point_of(surface: EvidenceSurface, logs: Tensor) -> tuple[Tensor, float]:
    """Logarithms that MacKay's formulas give for the effective numbers here, and the largest slope in any of them.

    An approximate log determinant, as of Kronecker blocks under a prior that is not one number in a block, may make
    gamma negative away from the top. There EM, whose formula is `delta <- n / (|w - m|^2 + tr P^{-1})`, goes on.
    """
    gammas, noise_slope = surface.effective(logs)
    shape, rate = surface.gamma
    own = logs[: len(gammas)]
    numerator, squares = gammas + 2 * shape, surface.squares + 2 * rate
    em = surface.sizes / (squares * own.exp() + surface.sizes - numerator)
    ratio = torch.where(numerator > 0, numerator / (squares * own.exp()), em)
    target = own + torch.where(ratio.isnan(), 0.0, ratio.log())  # zero of zero: the evidence is flat
    slopes = (numerator - squares * own.exp()) / 2
    if surface.tune_noise:
        misfit = 2 * surface.fit.loss * (-2 * logs[-1]).exp() - surface.temperature * noise_slope / 2
        targets = surface.fit.count * surface.fit.outputs
        change = (misfit / targets).log()  # twice EM's, as half of it is taken
        target = torch.cat([target, (logs[-1] + change).reshape(1)])
        slopes = torch.cat([slopes, (misfit - targets).reshape(1) / surface.temperature])
    return target, float(slopes.abs().max())


def newton(surface: EvidenceSurface, start: Tensor, lower: Tensor, upper: Tensor, n_steps: int) -> Found:
    """Newton's method for one precision, and the noise: O(P) a step once the curvature's eigenvalues are known.

    Steps are cut where the surface is nearly flat, and halved until they lead up; at an edge that the slope points
    beyond, a logarithm stays there.

    Raises:
        ValueError: if there are several precisions.
    """
    if len(surface.groups) > 1:
        raise ValueError(
            f"Newton's method is for one prior precision, not for {len(surface.groups)}. Choose optimizer='mackay' or "
            "'lbfgs', or prior_structure='scalar'."
        )
    logs, evaluations = start, 0
    value, gradient = surface.slope(logs)
    for _ in range(n_steps):
        hessian = torch.autograd.functional.hessian(surface, logs)
        evaluations += 2
        free = ~(((logs <= lower) & (gradient < 0)) | ((logs >= upper) & (gradient > 0)))
        step = _ascent(hessian, gradient, free)
        for halvings in range(60):
            following = (logs + step * 0.5**halvings).clamp(lower, upper)
            new_value, new_gradient = surface.slope(following)
            evaluations += 1
            if new_value >= value - 1e-14 * abs(value):
                break
        moved = float((following - logs).abs().max())
        logs, value, gradient = following, new_value, new_gradient
        if moved < TOLERANCE:
            return Found(logs, True, evaluations)
    return Found(logs, False, evaluations)


def _ascent(hessian: Tensor, gradient: Tensor, free: Tensor) -> Tensor:
    """The Newton step in the coordinates that are free; up the slope in directions without curvature."""
    step = torch.zeros_like(gradient)
    if free.any():
        values, vectors = torch.linalg.eigh(hessian[free][:, free])
        along = vectors.T @ gradient[free]
        along = along / (-values).clamp_min(math.ulp(1.0) * float(values.abs().max().clamp_min(1e-300)))
        step[free] = vectors @ along.clamp(-LONGEST_STEP, LONGEST_STEP)
    return step


OPTIMIZERS: dict[str, Search] = {"auto": automatic, "lbfgs": lbfgs, "mackay": fixed_point, "newton": newton}


def group_sizes(fit: Fit, structure: str) -> tuple[int, ...]:
    """The groups of consecutive weights that share a prior precision.

    Args:
        fit: whose weights are grouped.
        structure: "scalar", "layerwise" (each parameter tensor), "unit" (each row of a weight matrix or filter of a
            convolution, that is each output; tensors of one axis, such as biases, have one), or "diag" (each weight).

    Returns:
        Their sizes.
    """
    return GROUPS[structure](fit)


def _units(fit: Fit) -> tuple[int, ...]:
    rows = ((p.numel(), len(p) if p.ndim > 1 else 1) for p in fit.parameters.tensors)
    return tuple(size // n for size, n in rows for _ in range(n))


GROUPS: dict[str, Callable[[Fit], tuple[int, ...]]] = {
    "scalar": lambda fit: (fit.parameters.numel,),
    "layerwise": lambda fit: fit.parameters.sizes,
    "unit": _units,
    "diag": lambda fit: (1,) * fit.parameters.numel,
}
