"""The derivatives of one module at one batch: products with its Jacobians and with its own second derivatives.

Everything comes from autograd on the module alone, so no module needs a rule. Columns are `(K, N, *shape)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from lapkit.curvature.capture.self_check import TOLERANCE
from lapkit.curvature.products.vectors import explained

Linear = Callable[[Tensor], Tensor]


@final
class Derivatives:
    """A module `z = m(x, w)` at a batch, and what it is sent back.

    Args:
        module: maps a batch to a batch, example by example.
        x: what went in, `(N, *in)`.
        delta: the loss gradient at its output, `(N, *out)`.
        together: columns under vmap, or one after the other.
    """

    def __init__(self, module: nn.Module, x: Any, delta: Tensor, *, together: bool = True) -> None:
        self.module, self.x, self.delta, self.together = module, x, delta, together
        self.values = {name: p.detach() for name, p in module.named_parameters()}
        self._pulls: dict[str, Linear] = {}

    def run(self, x: Any, changed: Mapping[str, Tensor]) -> Tensor:
        """The module's output; it sees a copy of its input, since it may work in place."""
        x = x.clone() if isinstance(x, Tensor) else x
        return functional_call(self.module, {**self.values, **changed}, (x,))

    @cached_property
    def _pull(self) -> Linear:
        return self._transposed(lambda x: self.run(x, {}), self.x)

    def _pull_of(self, weight: str) -> Linear:
        if weight not in self._pulls:
            self._pulls[weight] = self._transposed(lambda w: self.run(self.x, {weight: w}), self.values[weight])
        return self._pulls[weight]

    @staticmethod
    def _transposed(function: Linear, at: Tensor) -> Linear:
        pull = vjp(function, at)[1]

        def transposed(cotangent: Tensor) -> Tensor:
            with explained():
                return pull(cotangent)[0].detach()

        return transposed

    def pull(self, columns: Tensor) -> Tensor:
        """`J_x^T v`, `(K, N, *out) -> (K, N, *in)`."""
        return self.each(self._pull, columns)

    def push(self, columns: Tensor) -> Tensor:
        """`J_x u`, `(K, N, *in) -> (K, N, *out)`."""
        return self.each(self._push, columns)

    def _push(self, column: Tensor) -> Tensor:
        return _directional(lambda x: self.run(x, {}), self.x, column)

    def pull_weight(self, weight: str, columns: Tensor) -> Tensor:
        """`sum_n J_w^T v`, `(K, N, *out) -> (K, *weight)`."""
        return self.each(self._pull_of(weight), columns)

    def push_weight(self, weight: str, vectors: Tensor) -> Tensor:
        """`J_w t`, `(K, *weight) -> (K, N, *out)`."""
        return self.each(self._push_of(weight), vectors)

    def _push_of(self, weight: str) -> Linear:
        return lambda t: _directional(lambda w: self.run(self.x, {weight: w}), self.values[weight], t)

    @cached_property
    def bend(self) -> Linear:
        """`u -> sum_k (nabla^2_x z_k) delta_k u` for one column `(N, *in)`."""
        gradient = self._transposed_twice(lambda x: self.run(x, {}))
        with explained():
            return self._transposed(gradient, self.x)

    def bend_weight(self, weight: str) -> Linear:
        """`t -> sum_{n,k} (nabla^2_w z_k) delta_k t` for one vector in the weight's shape."""
        gradient = self._transposed_twice(lambda w: self.run(self.x, {weight: w}))
        with explained():
            return self._transposed(gradient, self.values[weight])

    def _transposed_twice(self, function: Linear) -> Linear:
        return lambda at: vjp(function, at)[1](self.delta)[0]

    def each(self, function: Linear, columns: Tensor) -> Tensor:
        """A linear function of one column applied to all of them."""
        if not self.together or len(columns) == 1:
            return torch.stack([function(column) for column in columns])
        with warnings.catch_warnings():
            # An operation without a batching rule is looped over inside: slower, and exact.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(function)(columns)

    def settle(self, function: Linear, columns: Tensor) -> Tensor:
        """A linear function of a few columns one by one; if they come out otherwise together, none will go together."""
        alone = torch.stack([function(column) for column in columns])
        if self.together:
            try:
                found = self.each(function, columns)
                self.together = bool((found - alone).abs().max() <= TOLERANCE[alone.dtype] * alone.abs().max())
            except (RuntimeError, NotImplementedError):  # custom kernels cannot be mapped over
                self.together = False
        return alone

    def check(self, name: str, *, to_input: bool, weights: Mapping[str, str]) -> bool:
        """Compare columns together with columns one by one, and `J` with `J^T`.

        Args:
            name: the module's, for messages.
            to_input: whether its derivative in its input is going to be used.
            weights: names of the weights whose derivatives are.

        Returns:
            Whether columns may go together.

        Raises:
            RuntimeError: if forward and backward derivatives contradict each other.
        """
        pairs: list[tuple[Linear, Linear, Tensor]] = [(self._pull, self._push, self.x)] if to_input else []
        pairs += [(self._pull_of(w), self._push_of(w), self.values[w]) for w in weights.values()]
        for pull, push, at in pairs:
            u, v = _random(2, at), _random(2, self.delta)
            left, right = (v * self.settle(push, u)).flatten(1), (self.settle(pull, v) * u).flatten(1)
            scale = torch.maximum(left.norm(dim=1), right.norm(dim=1)) * max(left.shape[1], right.shape[1]) ** 0.5
            if not ((left.sum(1) - right.sum(1)).abs() <= TOLERANCE[v.dtype] * scale).all():
                raise RuntimeError(
                    f"The forward and the backward derivative of module {name} contradict each other. If it has a "
                    "custom torch.autograd.Function, compare its jvp with its backward (torch.autograd.gradcheck)."
                )
        return self.together


def _directional(function: Linear, at: Tensor, direction: Tensor) -> Tensor:
    """`J u` in forward mode, or as the transpose of the transpose where an operation has none."""
    try:
        return jvp(function, (at,), (direction,))[1].detach()
    except NotImplementedError:
        output, pull = vjp(function, at)[:2]
        with explained():
            return vjp(lambda v: pull(v)[0], torch.zeros_like(output))[1](direction)[0].detach()


def _random(columns: int, like: Tensor) -> Tensor:
    """Reproducible normal columns, whatever the global state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(columns, *like.shape, generator=generator, dtype=torch.float64).to(like)
