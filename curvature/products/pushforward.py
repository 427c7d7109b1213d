"""`J v` of a batch for changes v of the weights: through the graph for a few of them, by the Jacobian for many."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import forward
from lapkit.curvature.inputs import can_be_cut, cut, to_device
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.products.forward_mode import ForwardMode
from lapkit.curvature.products.linearised import Linearised
from lapkit.curvature.products.passes import Batch
from lapkit.curvature.products.vectors import (
    CACHE,
    NotTwiceDifferentiable,
    Passage,
    bytes_each,
    twice_differentiable,
)


def pushforward(engine: Engine, x: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs f, and by how much each of S changes of the weights moves them if the network is made linear.

    The factored Jacobian costs a backward pass for each of an example's K outputs, and then little for a vector;
    through the graph each vector costs about two forward passes, and nothing else. The Jacobian is taken for S > K.
    Measured on one core in ms, Jacobian against graph, for S = 1, 10, 100: an MLP with K = 10 5/1, 21/11, 163/162; with
    K = 100 19/0.5, 27/2, 60/35; a convolutional net with K = 10 34/4, 42/48, 48/313; one with K = 192 76/0.7, 77/8,
    77/19; a transformer with K = 10 41/3, 54/47, 113/369. Where the Jacobian is there already, as for predictive
    variances, `Jacobian.project` alone was 159/162, 50/35, 24/313, 2/19 and 84/369 for S = 100, and is always taken.

    Args:
        engine: the model; inside `borrowed`.
        x: a batch of inputs.
        vectors: `(S, P)`.

    Returns:
        The outputs `(N, *, C)`, and `J v`, `(S, N, *, C)`.
    """
    x = to_device(x, engine.parameters.device)
    with twice_differentiable(engine.model):
        output = engine.outputs(x)
        if len(vectors) <= output[0].numel():
            try:
                return summable(output.detach()), _through_graph(engine, x, output, vectors)
            except NotTwiceDifferentiable:
                pass
    return _by_jacobian(engine, x, vectors)


def _through_graph(engine: Engine, x: Any, output: Tensor, vectors: Tensor) -> Tensor:
    """Vector by vector, or some together where that is cheaper.

    Raises:
        NotTwiceDifferentiable: if an operation has no second derivative, or a wrong one.
    """
    parameters = engine.parameters
    run = partial(forward, x=x, parameters=parameters, forward_fn=engine.forward_fn, output_axis=engine.output_axis)
    batch = Batch(output, output.detach(), None, (x, None, 0), engine.model, run)
    linear = Linearised(output, parameters, ForwardMode(parameters).push(batch, len(vectors)))
    linear.check()
    linear.prepare()
    each = bytes_each(output, parameters)
    passage, chunk = Passage(engine.budget), chunk_length(len(vectors), each, engine.budget)
    passage.together = parameters.device.type != "cpu" or each <= CACHE
    everything = range(len(parameters.tensors))
    found = []
    for number, some in enumerate(vectors.split(chunk)):
        parts = zip(parameters.split(some).values(), parameters.tensors, strict=True)
        given = tuple(v.to(t.dtype) for v, t in parts)
        found.append(passage(lambda v: (linear.push(everything, v),), given, verify=number == 0)[0])
    return summable(torch.cat(found))


def _by_jacobian(engine: Engine, x: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Some examples at a time, where the inputs can be cut."""
    backprop: Backprop = engine(x)
    examples, step = backprop.examples, backprop.examples_per_piece()
    if step < examples and can_be_cut(x, examples):
        pieces = [_by_jacobian(engine, cut(x, slice(i, i + step)), vectors) for i in range(0, examples, step)]
        return torch.cat([f for f, _ in pieces]), torch.cat([moved for _, moved in pieces], dim=1)
    f = summable(backprop.output.detach())
    moved = backprop.jacobian().project(vectors.T)  # (K, N, S)
    return f, moved.permute(2, 1, 0).reshape(len(vectors), *f.shape)
