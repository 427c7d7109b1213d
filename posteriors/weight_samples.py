"""What the network itself, not made linear, says at draws of its weights."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction, call, canonical, run
from lapkit.curvature.inputs import tensors
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.gaussian import GaussianPosterior

PIECE = 2**26  # numbers of drawn weights at a time; fixed, since what a generator gives depends on it
NEAR = 2**20  # numbers that come out of the last module at a time


class _Called(nn.Module):
    """A call of the model as a module, so that other weights can be put in for the time being.

    Args:
        engine: the model.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.model, self.forward_fn = engine.model, engine.forward_fn

    def forward(self, x: Any) -> Any:
        """What the model returns."""
        return call(self.model, x) if self.forward_fn is None else self.forward_fn(self.model, x)


class _Caller(ABC):
    """The forward pass of a part of the model at other weights than its own.

    Args:
        engine: the model.
        module: the part.
        x: what goes in.
    """

    def __init__(self, engine: Engine, module: nn.Module, x: Any) -> None:
        self.engine, self.module, self.x = engine, module, x

    @abstractmethod
    def __call__(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Outputs `(N, *, C)` one after the other, of weights `(S, *)` by their names in the whole model."""

    def _at(self, given: dict[str, Tensor]) -> Tensor:
        """Outputs at weights by their names in the module."""
        return self._outputs(self._run(lambda module, x: functional_call(module, given, (x,))))

    def _run(self, forward: ForwardFunction) -> Any:
        return run(self.module, self.x, self.engine.parameters, forward)

    def _outputs(self, returned: Any) -> Tensor:
        return summable(canonical(returned, self.engine.output_axis))


@final
class _Whole(_Caller):
    """The whole forward pass."""

    def __init__(self, engine: Engine, x: Any) -> None:
        super().__init__(engine, _Called(engine), x)

    def __call__(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """See `_Caller`."""
        for row in _rows(weights):
            yield self._at({f"model.{name}": weight for name, weight in row.items()})


@final
class _Last(_Caller):
    """The last module alone, at several weights in one pass where its operations can be done so.

    Args:
        engine: the model.
        prefix: the module's name.
        x: what goes into it.
        each: how many numbers come out.
    """

    def __init__(self, engine: Engine, prefix: str, x: Tensor, each: int) -> None:
        super().__init__(engine, engine.model.get_submodule(prefix), x)
        self.skipped, self.step, self.together = len(prefix) + 1, max(1, NEAR // each), True

    def __call__(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """See `_Caller`."""
        parts = zip(*(weight.split(self.step) for weight in weights.values()), strict=True)
        for part in parts:
            given = {name[self.skipped :]: weight for name, weight in zip(weights, part, strict=True)}
            found = self._all(given) if self.together else None
            self.together = found is not None
            yield from map(self._at, _rows(given)) if found is None else map(self._outputs, found)

    def _all(self, given: Mapping[str, Tensor]) -> Any:
        """What comes out at several weights, None if an operation cannot be done at several in one."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return self._run(lambda m, x: vmap(lambda row: functional_call(m, row, (x,)))(given))
        except Exception:  # what is wrong with the module itself, the passes one by one tell
            return None


def _rows(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights of one draw after the other, from those of all `(S, *)`."""
    for row in zip(*(weight.unbind() for weight in weights.values()), strict=True):
        yield dict(zip(weights, row, strict=True))


def _caller(engine: Engine, x: Any, n_samples: int) -> _Caller:
    """The whole forward pass, or, where all random weights are those of the last module, the pass of that one alone.

    It is the last one if the model returns the very tensor that it returned, and what came in carries no graph, that
    is, does not depend on the random weights.
    """
    owners = {name.rpartition(".")[0] for name in engine.parameters.names}
    if n_samples == 1 or len(owners) > 1 or owners == {""}:
        return _Whole(engine, x)
    (prefix,) = owners
    calls: list[tuple[Any, ...]] = []

    def recorded(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append((given, named, output, [x._version for x in tensors(given)]))

    hook = engine.model.get_submodule(prefix).register_forward_hook(recorded, with_kwargs=True)
    try:
        with torch.enable_grad():
            returned = run(engine.model, x, engine.parameters, engine.forward_fn)
    finally:
        hook.remove()
    given, named, output, versions = calls[0] if len(calls) == 1 else ((), {}, None, [])
    alone = output is returned and len(given) == 1 and isinstance(given[0], Tensor) and not named
    if alone and not given[0].requires_grad and versions == [given[0]._version]:
        return _Last(engine, prefix, given[0], max(1, output.numel()))
    return _Whole(engine, x)


def network_outputs(engine: Engine, x: Any, weights: Tensor) -> Iterator[Tensor]:
    """The outputs at some weights, one forward pass for each; the model's own weights stay what they are.

    Of weights of the last module alone the rest of the network is run once.

    Args:
        engine: the model; inside `borrowed`.
        x: a batch of inputs, whatever the model takes.
        weights: those that the engine's Jacobians are in, `(S, P)`.

    Yields:
        S times `(N, C)` or `(N, T, C)`.
    """
    parameters = engine.parameters
    callers = [_caller(engine, piece, len(weights)) for piece in engine.pieces(x)]
    for some in weights.split(max(1, PIECE // parameters.numel)):
        # A draw's numbers side by side, as products with it like them.
        parts = parameters.split(engine.complete(some).contiguous())
        pairs = zip(parts.items(), parameters.tensors, strict=True)
        given = {name: part.to(p.dtype) for (name, part), p in pairs}
        yield from map(torch.cat, zip(*(caller(given) for caller in callers), strict=True))


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
