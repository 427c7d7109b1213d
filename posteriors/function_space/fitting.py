"""From a network and its data to a Gaussian process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.accumulate import accumulate
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.columns.columns import GGN
from lapkit.curvature.inputs import check_batches
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters
from lapkit.posteriors.function_space.process import LaplaceGP
from lapkit.posteriors.function_space.subset import Subset, chosen_examples
from lapkit.posteriors.function_space.tangents import Tangents
from lapkit.posteriors.function_space.whitened import WhitenedObservations
from lapkit.posteriors.priors import GaussianPrior


def laplace_gp(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    prior: GaussianPrior | None = None,
    *,
    parameters: Parameters | Iterable[str] | None = None,
    subset_of_data: Subset | None = None,
    temperature: float = 1.0,
    iterative: bool = False,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    memory_limit: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    progress_bar: bool = False,
) -> LaplaceGP:
    """The Laplace approximation of a trained network with the full GGN, in function space.

    Its cost grows with the cube of the number of observations, C - 1 for each example of C classes, C for other
    outputs, and with the number of weights not at all beyond the passes; with more observations than weights, with the
    cube of that number.

    Args:
        model: the network at its MAP estimate; it is given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)`, or `(inputs, targets, weights)` with weights `(N,)` that multiply the
            examples' log likelihoods.
        prior: over the weights; of precision one by default.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        subset_of_data: condition on some of the examples alone: a number, drawn at random, or their places in the order
            of the data. Posterior and evidence are then those of a data set of these examples, and variances larger.
        temperature: of the likelihood, `p(y|f)^(1/T)`.
        iterative: let gpytorch choose approximate solvers for many observations.
        generator: draws the subset.
        memory_budget: bytes that intermediates may take.
        memory_limit: bytes that the observations and their covariance may take, by default half of what is free.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        progress_bar: show one.

    Returns:
        The process, in eval mode.

    Raises:
        TypeError: if model, likelihood or data are of a wrong type.
        ValueError: if there is no data, a batch is refused, the prior has a wrong length, or memory does not suffice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lapkit.curvature import Categorical
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(20, 2), torch.arange(20) % 3
        >>> gp = laplace_gp(nn.Linear(2, 3), Categorical(), [(x, y)])
        >>> gp.functions(x[:5]).covariance.shape, gp.joint(x[:5]).covariance.shape
        (torch.Size([5, 3, 3]), torch.Size([15, 15]))
        >>> bool(gp.log_marginal_likelihood() < 0)
        True

    Reference:
        See `LaplaceGP`.
    """
    prior = GaussianPrior() if prior is None else prior
    tangents = Tangents(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
    tangents.precision(prior)  # a prior of impossible length is an error before the work, not after
    check_batches(data)
    observations = WhitenedObservations(tangents.parameters, memory_limit=memory_limit)
    shapes: set[tuple[int, ...] | None] = set()
    batches = data if subset_of_data is None else chosen_examples(data, subset_of_data, generator)
    totals = accumulate(
        model,
        tangents.parameters,
        likelihood,
        GGN(),
        _watched(batches, shapes),
        [observations],
        memory_budget=memory_budget,
        forward_fn=forward_fn,
        output_axis=output_axis,
        progress_bar=progress_bar,
        total=length_hint(batches) or None,
    )
    shape = shapes.pop() if len(shapes) == 1 else None
    return LaplaceGP(
        tangents,
        observations.rows(),
        totals,
        likelihood,
        prior,
        temperature=temperature,
        input_shape=shape,
        iterative=iterative,
    )


def _watched(data: Iterable[Any], shapes: set[tuple[int, ...] | None]) -> Iterator[Any]:
    """The batches, and the shapes of an example where inputs are one tensor."""
    for batch in data:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else None
        shapes.add(tuple(x.shape[1:]) if isinstance(x, Tensor) and x.ndim else None)
        yield batch
