"""The mode of the linearised network, at which its evidence is one: refitted in turn with the hyper-parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature import Engine, Likelihood, borrowed
from lapkit.curvature.callers import callers_level
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.posteriors import Fit, GaussianPrior, laplace_posterior
from lapkit.selection import Selection

NEWTON_STEPS, SOLVER_STEPS, TOLERANCE = 50, 200, 1e-10


@dataclass(frozen=True)
class _Batch:
    """Outputs `(N, C)`, their Jacobian, targets, and the examples' weights."""

    f: Tensor
    jacobian: Jacobian
    y: Tensor
    weights: Tensor

    def outputs(self, change: Tensor) -> Tensor:
        """`f + J v`, `(N, C)`."""
        return self.f + self.jacobian.project(change[:, None])[..., 0].T


@dataclass(frozen=True, eq=False)
class LinearizedNetwork:
    """`f(x, w*) + J(x) (w - w*)` of all examples, whose Jacobians stay in memory, factored.

    Args:
        batches: of examples.
        fit: of the network at w*.
    """

    batches: list[_Batch]
    fit: Fit

    @classmethod
    def of(cls, engine: Engine, fit: Fit, likelihood: Likelihood, data: Iterable[Any]) -> LinearizedNetwork:
        """Linearise at the weights that were fitted.

        Args:
            engine: of the network.
            fit: at its present weights.
            likelihood: of the targets.
            data: the batches that were fitted.

        Raises:
            ValueError: if there are positions, or the data are not those that were fitted.
        """
        batches = []
        with borrowed(engine.model, engine.parameters):
            for number, batch in numbered(data):
                x, y, weights = to_device(unpack(batch, number), engine.parameters.device)
                f, jacobian = engine.jacobian(x)
                if f.ndim != 2:
                    raise ValueError(f"Outputs (N, C) can be refitted, got shape {tuple(f.shape)}.")
                weights = f.new_ones(len(f)) if weights is None else weights.to(f)
                batches.append(_Batch(f, jacobian, likelihood.check(f, y), weights))
        found = cls(batches, fit)
        loss = found.loss(likelihood, fit.mean)
        if not torch.isclose(loss, fit.loss.to(loss), rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"The data have a loss of {float(loss):g}, those that were fitted one of {float(fit.loss):g}. Give the "
                "same batches again, in a container that can be read more than once."
            )
        return found

    def loss(self, likelihood: Likelihood, weights: Tensor) -> Tensor:
        """Summed over examples, without dispersion."""
        change = weights - self.fit.mean
        losses = [(likelihood.loss(b.outputs(change), b.y) * b.weights).sum() for b in self.batches]
        return torch.stack(losses).sum()

    def mode(
        self,
        likelihood: Likelihood,
        prior: GaussianPrior,
        temperature: float,
        start: Tensor,
        tick: Callable[[], object] | None = None,
    ) -> tuple[Tensor, bool]:
        """The MAP estimate, by Newton's method; and whether it was reached.

        The problem is convex. Newton's systems are solved by conjugate gradients, preconditioned with the posterior
        precision of the fit, which for the full matrix and a Gaussian is the system itself.
        """
        parameters = self.fit.parameters
        precision, centre = prior.diagonal(parameters).to(start), prior.centre(parameters).to(start)
        scale = likelihood.precision / temperature
        preconditioner = laplace_posterior(self.fit, likelihood, prior, temperature).precision

        def objective(weights: Tensor) -> Tensor:
            return scale * self.loss(likelihood, weights) + (precision * (weights - centre).square()).sum() / 2

        weights = start
        for _ in range(NEWTON_STEPS):
            if tick is not None:
                tick()
            gradient = scale * self._gradient(likelihood, weights) + precision * (weights - centre)
            product = self._curvature(likelihood, weights)
            system = lambda v, product=product: scale * product(v) + precision * v  # noqa: E731
            step = -_conjugate_gradients(system, gradient, preconditioner.solve)
            decrease = float(-(gradient @ step))  # Newton's decrement, in nats
            value, length = objective(weights), 1.0
            if decrease <= max(TOLERANCE, torch.finfo(value.dtype).eps * float(value)):  # which nothing less can change
                return weights + step, True
            while objective(weights + length * step) > value - 1e-4 * length * decrease and length > 1e-8:
                length /= 2
            weights = weights + length * step
        return weights, False

    def _gradient(self, likelihood: Likelihood, weights: Tensor) -> Tensor:
        """Of the loss."""
        total = torch.zeros_like(weights)
        for b in self.batches:
            f = b.outputs(weights - self.fit.mean).requires_grad_()
            (cotangent,) = torch.autograd.grad((likelihood.loss(f, b.y) * b.weights).sum(), f)
            total += b.jacobian.pull_back(cotangent.T)
        return total

    def _curvature(self, likelihood: Likelihood, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """`v -> sum_n J_n^T S_n S_n^T J_n v`, with S at the linearised outputs."""
        roots = [likelihood.hessian_root(b.outputs(weights - self.fit.mean), b.y) for b in self.batches]  # (K, N, C)

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            for b, root in zip(self.batches, roots, strict=True):
                inner = torch.einsum("knc,cn->kn", root, b.jacobian.project(vector[:, None])[..., 0])
                total += b.jacobian.pull_back(torch.einsum("knc,kn,n->cn", root, inner, b.weights))
            return total

        return product


@dataclass(frozen=True)
class Refit:
    """The result of a refit.

    Args:
        selection: hyper-parameters, with the evidence of the linearised network at its own mode.
        weights: that mode, `(P,)`.
        fit: the network's, with loss and mode of the linearised one. The curvature is that at the network's outputs.
        rounds: of modes and hyper-parameters in turn.
        converged: whether they had stopped changing.
    """

    selection: Selection
    weights: Tensor
    fit: Fit
    rounds: int
    converged: bool


def refit(
    engine: Engine,
    fit: Fit,
    likelihood: Likelihood,
    prior: GaussianPrior,
    data: Iterable[Any],
    tune: Callable[[Fit, Likelihood, GaussianPrior], Selection],
    *,
    temperature: float = 1.0,
    rounds: int = 100,
    tolerance: float = 1e-8,
    tick: Callable[[], object] | None = None,
) -> Refit:
    """Find the mode of the linearised network and its hyper-parameters in turn, each given the other.

    The evidence of a Laplace approximation is one at a mode. A network's weights seldom are the mode of the linearised
    network that its predictions are made with: not if training stopped early, was for another prior precision, or if
    normalisation makes the scale of weights arbitrary. Then `|w|^2` misleads the precision. The linearised network has
    a mode of its own, by a convex problem.

    Args:
        engine: of the network.
        fit: at its weights.
        likelihood: where to begin.
        prior: likewise.
        data: the batches that were fitted.
        tune: the best hyper-parameters of a fit, as `maximize_evidence` finds them.
        temperature: of the likelihood.
        rounds: at most.
        tolerance: in the evidence, relative, between rounds.
        tick: called at each step of Newton's method, to show progress.

    Returns:
        Mode and hyper-parameters.

    Raises:
        ValueError: if the data are not those that were fitted, or outputs have positions.

    Reference:
        Antoran et al., Adapting the linearised Laplace model evidence for modern deep learning, 2022, section 3.
    """
    network = LinearizedNetwork.of(engine, fit, likelihood, data)
    weights, last = fit.mean, None
    for number in range(1, rounds + 1):
        weights, reached = network.mode(likelihood, prior, temperature, weights, tick)
        moved = replace(fit, mean=weights, loss=network.loss(likelihood, weights))
        with warnings.catch_warnings(record=True) as heard:  # those of the last round are the caller's to hear
            warnings.simplefilter("always")
            found = tune(moved, likelihood, prior)
        prior, likelihood = found.prior, found.likelihood
        settled = last is not None and abs(found.log_evidence - last) <= tolerance * max(1.0, abs(last))
        if settled or number == rounds:
            for each in heard:
                warnings.warn(each.message, each.category, stacklevel=callers_level())
            return Refit(found, weights, moved, number, settled and reached and found.converged)
        last = found.log_evidence
    raise ValueError(f"At least one round is needed, got rounds={rounds}.")


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """`A^{-1} b` for a positive definite A, to as many digits as a step of Newton's method has right.

    The energy of the residual is the decrement, in nats, that is left: a step that leaves its square converges as fast.
    """
    solution, residual = torch.zeros_like(target), target
    direction = scaled = precondition(residual)
    energy = first = residual @ scaled
    for _ in range(SOLVER_STEPS):
        if energy <= first * min(1e-2, float(first)):
            break
        image = product(direction)
        length = energy / (direction @ image)
        solution, residual = solution + length * direction, residual - length * image
        scaled = precondition(residual)
        energy, before = residual @ scaled, energy
        direction = scaled + energy / before * direction
    return solution
