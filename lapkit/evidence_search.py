"""Three ways to the top of the evidence: L-BFGS, MacKay's fixed point, and Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import Gamma

from lapkit.curvature import Likelihood
from lapkit.posteriors import Fit, GaussianPrior, log_det_ratio

TOLERANCE = 1e-9  # of the logarithms, between steps
LONGEST_STEP = 4.0  # of Newton's method, in a logarithm


@dataclass(frozen=True, eq=False)
class EvidenceSurface:
    """The log evidence over the logarithms of prior precisions, one for each group of weights, and of the noise.

    For a fixed mode it is concave: the log likelihood and the scatter are minus an exponential of a logarithm each, and
    the log determinant of a sum of exponentials times positive matrices is convex. All ways up lead to one top.

    Args:
        fit: curvature, loss and mode, in float64.
        likelihood: of the targets.
        mean: of the prior.
        groups: sizes of the groups of consecutive weights.
        tune_noise: the last logarithm is that of a Gaussian likelihood's noise.
        temperature: of the likelihood.
        hyper_prior: over each precision.
    """

    fit: Fit
    likelihood: Likelihood
    mean: Tensor | float
    groups: tuple[int, ...]
    tune_noise: bool = False
    temperature: float = 1.0
    hyper_prior: Gamma | None = None

    @cached_property
    def squares(self) -> Tensor:
        """`|w - m|^2` of each group, `(G,)`."""
        centre = GaussianPrior(1.0, self.mean).centre(self.fit.parameters).double()
        return self.total((self.fit.mean - centre).square())

    @cached_property
    def sizes(self) -> Tensor:
        """How many weights each group has, `(G,)`."""
        return torch.tensor(self.groups, device=self.fit.mean.device)

    @cached_property
    def owner(self) -> Tensor:
        """The group of each weight, `(P,)`."""
        return torch.arange(len(self.groups), device=self.fit.mean.device).repeat_interleave(self.sizes)

    @property
    def gamma(self) -> tuple[float, float]:
        """Shape and rate of the hyper-prior's slope in a log precision; zero where there is none."""
        if self.hyper_prior is None:
            return 0.0, 0.0
        return float(self.hyper_prior.concentration), float(self.hyper_prior.rate)

    def total(self, values: Tensor) -> Tensor:
        """Sums over groups of values `(P,)`."""
        if len(self.groups) == len(values):
            return values
        return torch.zeros(len(self.groups), dtype=values.dtype, device=values.device).index_add(0, self.owner, values)

    def precision(self, logs: Tensor) -> Tensor:
        """The prior precision in the shape in which a curvature can use it best: `()`, `(L,)` or `(P,)`."""
        values = logs[: len(self.groups)].exp()
        if len(values) == 1:
            return values.reshape(())
        return values if self.groups == self.fit.parameters.sizes else values[self.owner]

    def noise(self, logs: Tensor) -> Likelihood:
        """The likelihood, with the noise of this point."""
        return self.likelihood.with_noise(logs[-1].exp()) if self.tune_noise else self.likelihood

    def complexity(self, logs: Tensor) -> Tensor:
        """`log det P - log det P0`."""
        prior = GaussianPrior(self.precision(logs))
        return log_det_ratio(self.fit, self.noise(logs), prior, self.temperature)

    def log_evidence(self, logs: Tensor) -> Tensor:
        """The log evidence, without the hyper-prior, in nats."""
        misfit = self.fit.log_likelihood(self.noise(logs), self.temperature)
        scatter = (logs[: len(self.groups)].exp() * self.squares).sum()
        return misfit - (scatter + self.complexity(logs)) / 2

    def __call__(self, logs: Tensor) -> Tensor:
        """What is maximised: the log evidence, and the log density of the hyper-prior over log precisions.

        Raises:
            ValueError: if it is not finite.
        """
        value = self.log_evidence(logs)
        if self.hyper_prior is not None:
            shape, rate = self.gamma
            own = logs[: len(self.groups)]
            value = value + (shape * own - rate * own.exp()).sum()
        if not torch.isfinite(value):
            raise ValueError("The evidence is not finite: the fit holds NaN or infinite curvature.")
        return value

    def slope(self, logs: Tensor) -> tuple[float, Tensor]:
        """Value and gradient."""
        logs = logs.detach().requires_grad_()
        value = self(logs)
        (gradient,) = torch.autograd.grad(value, logs)
        return float(value.detach()), gradient

    def effective(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """MacKay's effective numbers of parameters, `gamma = n - delta tr P^{-1}` of each group, `(G,)`.

        They are minus the slopes of the log determinant's ratio in log precisions, in which no digits cancel. With them
        its slope in the log noise, which is minus twice their sum (four times for the empirical Fisher).
        """
        logs = logs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.complexity(logs), logs)
        return -gradient[: len(self.groups)], gradient[-1]


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


OPTIMIZERS: dict[str, Search] = {"lbfgs": lbfgs, "mackay": fixed_point, "newton": newton}


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
