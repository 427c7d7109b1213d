"""What the network itself, not made linear, says at draws of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import canonical, run
from lapkit.curvature.inputs import can_be_cut, cut, tensors, to_device
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.gaussian import GaussianPosterior

FEW = 2  # examples that tell whether the last module can be run alone
PIECE = 2**26  # numbers of drawn weights at a time; fixed, since what a generator gives depends on it
OUTPUTS = 2**22  # numbers of outputs at several draws of a linear layer that are computed at once


class _Caller(nn.Module):
    """The engine's forward pass as a module, so that other weights can be put in for one call.

    Args:
        engine: the model.
        prefix: the name of its last module, where `x` is what goes into that one alone.
        x: inputs.
    """

    def __init__(self, engine: Engine, prefix: str, x: Any) -> None:
        super().__init__()
        self.model, self.engine = engine.model.get_submodule(prefix), engine
        self.forward_fn = None if prefix else engine.forward_fn
        self.skipped, self.x = len(prefix) + 1 if prefix else 0, x
        self.linear: nn.Linear | None = None

    def forward(self) -> Tensor:
        """Outputs `(N, *, C)`."""
        return canonical(run(self.model, self.x, self.engine.parameters, self.forward_fn), self.engine.output_axis)

    def at(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs at other weights, by their names in the whole model."""
        given = {f"model.{name[self.skipped :]}": weight for name, weight in weights.items()}
        return summable(functional_call(self, given, ()))

    def outputs(self, weights: Tensor) -> Iterator[Tensor]:
        """At each of several draws `(S, P)`; of a linear layer, some together in one product."""
        layer = self.linear
        if layer is None:
            yield from (self.at(_named(self.engine, row)) for row in weights)
            return
        for some in weights.split(max(1, OUTPUTS // max(1, self.x.shape[:-1].numel() * len(layer.weight)))):
            given = {name[self.skipped :]: part for name, part in _named(self.engine, some).items()}
            found = F.linear(self.x, given["weight"].flatten(0, 1)).unflatten(-1, given["weight"].shape[:2])
            bias = given.get("bias", layer.bias)
            found = found if bias is None else found + bias
            yield from (summable(canonical(f, self.engine.output_axis)) for f in found.unbind(-2))


def _named(engine: Engine, weights: Tensor) -> dict[str, Tensor]:
    """Draws of the weights that the Jacobians are in, `(*, P)`, as tensors `(*, *shape)` of the parameters' types."""
    parts = zip(engine.parameters.split(engine.complete(weights)).items(), engine.parameters.tensors, strict=True)
    return {name: part.to(p.dtype) for (name, part), p in parts}


def _caller(engine: Engine, x: Any, n_samples: int) -> _Caller:
    """The whole forward pass, or, where all random weights are those of the last module, the pass of that one alone.

    It is the last one if the model returns the very tensor that it returned, and what came in carries no graph, that
    is, does not depend on the random weights.
    """
    whole = _Caller(engine, "", x)
    owners = {name.rpartition(".")[0] for name in engine.parameters.names}
    if n_samples == 1 or len(owners) > 1 or owners == {""}:
        return whole
    (prefix,) = owners
    calls: list[tuple[Any, ...]] = []

    def recorded(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append((given, named, output, [x._version for x in tensors((given, output))]))

    hook = engine.model.get_submodule(prefix).register_forward_hook(recorded, with_kwargs=True)
    try:
        with torch.enable_grad():
            returned = run(engine.model, x, engine.parameters, engine.forward_fn)
    finally:
        hook.remove()
    given, named, output, versions = calls[0] if len(calls) == 1 else ((), {}, None, [])
    alone = output is returned and len(given) == 1 and isinstance(given[0], Tensor) and not named
    if alone and not given[0].requires_grad and versions == [given[0]._version, output._version]:
        last = _Caller(engine, prefix, given[0])
        if f"{prefix}.weight" in engine.parameters.names:
            last.linear = _product(last.model, last.x, output)
        return last
    return whole


def _product(module: nn.Module, x: Tensor, output: Tensor) -> nn.Linear | None:
    """The module, if it is a linear layer and nothing more: no hooks, no autocast, no forward pass of its own."""
    if type(module) is not nn.Linear or "forward" in vars(module) or internals.hooked(module):
        return None
    if not x.dtype == output.dtype == module.weight.dtype:
        return None
    return module if torch.equal(F.linear(x, module.weight, module.bias), output) else None


def _same(engine: Engine, x: Any, weights: Mapping[str, Tensor], found: Tensor) -> bool:
    """Whether the whole network gives the same: hooks, or a body that reads the last weights, make another function."""
    parts = [cut(x, slice(FEW)), x] if can_be_cut(x, len(found)) else [x]
    for part in parts:
        try:
            expected = _Caller(engine, "", part).at(weights)
        except Exception:
            if part is x:
                raise
            continue  # a model for batches of one length
        some, size = found[: len(expected)], float(expected.abs().max())
        return some.shape == expected.shape and torch.allclose(some, expected, rtol=1e-4, atol=1e-6 * size)
    return False


def network_outputs(engine: Engine, x: Any, weights: Tensor) -> Iterator[Tensor]:
    """The outputs at some weights, one forward pass for each; the model's own weights stay what they are.

    Of weights of the last module alone the rest of the network is run once, where a few examples show no difference.

    Args:
        engine: the model; inside `borrowed`.
        x: a batch of inputs, whatever the model takes.
        weights: those that the engine's Jacobians are in, `(S, P)`.

    Yields:
        S times `(N, C)` or `(N, T, C)`.
    """
    x = to_device(x, engine.parameters.device)
    weights = weights.contiguous()  # a draw's numbers side by side, as products like them
    caller = _caller(engine, x, len(weights))
    found = caller.outputs(weights)
    if caller.skipped:
        first = next(found)
        same = _same(engine, x, _named(engine, weights[0]), first)
        found = chain([first], found) if same else _Caller(engine, "", x).outputs(weights)
    yield from found


def sampled_outputs(
    engine: Engine, posterior: GaussianPosterior, x: Any, n_samples: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """The outputs at draws from a posterior: those of `posterior.sample`, some at a time where they are many.

    Args:
        engine: the model; inside `borrowed`.
        posterior: over the weights that the engine's Jacobians are in.
        x: a batch of inputs, whatever the model takes.
        n_samples: how many draws, S.
        generator: the only source of randomness.

    Yields:
        S times `(N, C)` or `(N, T, C)`.

    Raises:
        ValueError: if there is not at least one sample.
    """
    if n_samples < 1:
        raise ValueError(f"Expected at least one sample of the weights, got n_samples={n_samples}.")
    piece = max(1, PIECE // len(posterior.mean))
    for start in range(0, n_samples, piece):
        yield from network_outputs(engine, x, posterior.sample(min(piece, n_samples - start), generator))


def mean_of(samples: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a function of samples that are seen one by one.

    Args:
        samples: S tensors of one shape.
        function: of one of them.

    Returns:
        A tensor like its results.
    """
    count, total = 0, torch.zeros(())
    for sample in samples:
        value = function(sample)
        count, total = count + 1, total + value if count else value
    return total / count


def sampled_moments(samples: Iterable[Tensor]) -> FunctionDistribution:
    """Mean and unbiased covariance of samples that are seen one by one.

    Args:
        samples: S outputs `(N, C)` or `(N, T, C)`.

    Returns:
        The Gaussian with these moments.

    Raises:
        ValueError: if there are not at least two.

    Reference:
        Welford, Note on a method for calculating corrected sums of squares and products, 1962.
    """
    count, mean, products = 0, torch.empty(0), torch.empty(0)
    for count, sample in enumerate(samples, start=1):
        if count == 1:
            mean, products = sample, sample.new_zeros(*sample.shape, sample.shape[-1])
        before = sample - mean
        mean = mean + before / count
        products = products + before[..., :, None] * (sample - mean)[..., None, :]
    if count < 2:
        raise ValueError(f"A variance needs at least two samples, got {count}: give a larger n_samples.")
    return FunctionDistribution(mean, (products + products.mT) / (2 * (count - 1)))
