"""MAP training of small networks: what a Laplace approximation is fitted at when there is no trained network yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import Likelihood, Parameters
from lapkit.curvature.capture.forward import ForwardFunction, forward
from lapkit.posteriors import GaussianPrior

PATIENCE = 10  # epochs without a fall of the loss, after which training ends


@dataclass(frozen=True)
class Training:
    """How a training ended.

    Args:
        loss: the last value of the negative log posterior, without constants, in nats.
        steps: iterations of L-BFGS, or epochs of Adam.
        converged: whether the loss had stopped falling before the steps were used up.
    """

    loss: float
    steps: int
    converged: bool


def train_map(
    model: nn.Module,
    likelihood: Likelihood,
    x: Tensor,
    y: Tensor,
    prior: GaussianPrior,
    *,
    batch_size: int | None = None,
    max_iter: int = 200,
    learning_rate: float = 1e-2,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Training:
    """Minimise `-sum_n log p(y_n|f_n) + (w - m)^T diag(prior precision) (w - m) / 2` over the weights, in place.

    A sum, as in the evidence: the prior precision found by `optimize_prior_precision` goes in as it is. All examples at
    once go through L-BFGS with a line search; batches through Adam with a falling learning rate.

    Args:
        model: maps `(N, *)` to outputs `(N, C)`; trained in train mode and left in the mode it had.
        likelihood: of the targets, with its noise.
        x: inputs.
        y: targets.
        prior: over the trainable weights.
        batch_size: of Adam; all examples at once, by L-BFGS, by default.
        max_iter: iterations or epochs at most.
        learning_rate: of Adam at the start.
        tolerance: relative fall of the loss between iterations, or epochs, below which training ends.
        generator: for the order of the batches.

    Returns:
        How it went.

    Raises:
        ValueError: if a number is not positive, the loss becomes NaN or infinite, or the likelihood refuses the data.
    """
    if max_iter < 1 or (batch_size is not None and batch_size < 1) or not learning_rate > 0:
        raise ValueError(
            f"Steps, batch size and learning rate are positive, got {max_iter}, {batch_size} and {learning_rate}."
        )
    parameters = Parameters.of(model)
    terms = negative_log_posterior(model, parameters, likelihood, prior)

    def objective(part: Tensor | slice, share: float) -> Tensor:
        misfit, complexity = terms(x[part], y[part])
        return misfit + share * complexity

    mode = model.training
    model.train()
    try:
        if batch_size is None or batch_size >= len(x):
            return _all_at_once(parameters, lambda: objective(slice(None), 1.0), max_iter, tolerance)
        batches = lambda: torch.randperm(len(x), generator=generator).split(batch_size)  # noqa: E731
        return _in_batches(parameters, objective, batches, len(x), max_iter, learning_rate, tolerance)
    finally:
        model.train(mode)


def negative_log_posterior(
    model: nn.Module,
    parameters: Parameters,
    likelihood: Likelihood,
    prior: GaussianPrior,
    temperature: float = 1.0,
    *,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What MAP training minimises, up to constants, as its two terms.

    Args:
        model: in whatever mode it is to be trained in.
        parameters: the weights that the prior is over.
        likelihood: of the targets, with its noise.
        prior: over these weights.
        temperature: of the likelihood.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Returns:
        A function of a batch `(x, y, example_weights=None)` with the value `-(1/T) sum_n log p(y_n|f_n)` of the batch
        and `(w - m)^T diag(prior precision) (w - m) / 2`, both differentiable in the weights.
    """
    precision, centre = prior.shift(parameters), prior.centre(parameters)
    scale = likelihood.precision / temperature

    def terms(x: Any, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = forward(model, x, parameters, forward_fn=forward_fn, output_axis=output_axis, y=y)
        losses = likelihood.loss(f, likelihood.check(f.detach(), y, output_axis))
        deviation = torch.cat([p.reshape(-1) for p in parameters.tensors]) - centre
        misfit = losses.sum() if weights is None else (losses * weights).sum()
        return scale * misfit, (precision * deviation.square()).sum() / 2

    return terms


def _all_at_once(parameters: Parameters, objective: Callable[[], Tensor], max_iter: int, tolerance: float) -> Training:
    optimizer = torch.optim.LBFGS(
        parameters.tensors,
        max_iter=max_iter,
        tolerance_change=0.0,
        tolerance_grad=tolerance,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = _finite(objective())
        for parameter, g in zip(parameters.tensors, torch.autograd.grad(loss, parameters.tensors), strict=True):
            parameter.grad = g
        return loss

    try:
        optimizer.step(closure)
        steps = int(optimizer.state[parameters.tensors[0]]["n_iter"])
        with torch.no_grad():
            loss = float(_finite(objective()))
    finally:
        for parameter in parameters.tensors:
            parameter.grad = None
    return Training(loss, max(steps, 1), converged=steps < max_iter)


def _in_batches(
    parameters: Parameters,
    objective: Callable[[Tensor, float], Tensor],
    batches: Callable[[], Iterator[Tensor]],
    examples: int,
    epochs: int,
    learning_rate: float,
    tolerance: float,
) -> Training:
    optimizer = torch.optim.Adam(parameters.tensors, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=learning_rate / 100)
    best, stalled, total = math.inf, 0, math.inf
    try:
        for epoch in range(1, epochs + 1):
            total = 0.0
            for part in batches():
                loss = _finite(objective(part, len(part) / examples))
                for p, g in zip(parameters.tensors, torch.autograd.grad(loss, parameters.tensors), strict=True):
                    p.grad = g
                optimizer.step()
                total += float(loss.detach())
            schedule.step()
            stalled = 0 if total < best - tolerance * abs(best) or best == math.inf else stalled + 1
            best = min(best, total)
            if stalled == PATIENCE:
                return Training(total, epoch, converged=True)
    finally:
        for parameter in parameters.tensors:
            parameter.grad = None
    return Training(total, epochs, converged=False)


def _finite(loss: Tensor) -> Tensor:
    """The loss.

    Raises:
        ValueError: if it is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise ValueError(
            f"The training loss is {float(loss.detach())}: check the data for NaN and huge values, and scale them."
        )
    return loss
