"""Sums of clipped gradients, as differentially private training needs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import LossGradient
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.first_order import GradientTotal
from lapkit.curvature.quantities.quantity import Quantity, add_to


class ClippedTotal(GradientTotal):
    """`sum/NAME`, the sum of clipped gradients, and `clipped/GROUP`, how many examples were longer than the bound."""


@final
class ClippedGradients(Quantity):
    """`sum_n min(1, c / |g_n|) g_n`, without expanding the gradients.

    Norms come first, from the factored Jacobians of a batch, which are then contracted with the clipping factors.

    Adding or removing one example changes the sum by at most `sensitivity` in norm. For (epsilon, delta) differential
    privacy add normal noise of standard deviation `noise_multiplier * sensitivity` to each entry of the sum, once,
    before dividing by the batch size (Abadi et al., algorithm 1). Noise is left to the caller.

    Args:
        parameters: the weights.
        bound: the largest norm c, one number for all groups or one for each by name.
        each: which weights share a norm: "model" (all of them), "layer" (those of one module) or "parameter".

    Raises:
        ValueError: if a bound is not positive, a group has none, or `each` is something else.

    Reference:
        Abadi et al., Deep learning with differential privacy, 2016; McMahan et al., Learning differentially private
        recurrent language models, 2018 (a bound for each layer).
    """

    columns = LossGradient()
    groupings: ClassVar[tuple[str, ...]] = ("model", "layer", "parameter")

    def __init__(self, parameters: Parameters, bound: float | Mapping[str, float], each: str = "model") -> None:
        super().__init__(parameters)
        if each not in self.groupings:
            raise ValueError(f"Unknown grouping {each!r}. Choose one of {', '.join(map(repr, self.groupings))}.")
        key = {"model": lambda name: "", "layer": lambda name: name.rpartition(".")[0], "parameter": lambda name: name}
        self.groups: dict[str, list[str]] = {}
        for name in parameters.names:
            self.groups.setdefault(key[each](name), []).append(name)
        self.bounds = dict(bound) if isinstance(bound, Mapping) else dict.fromkeys(self.groups, float(bound))
        if set(self.bounds) != set(self.groups):
            raise ValueError(f"Bounds are given for {sorted(self.bounds)}, the groups are {sorted(self.groups)}.")
        if not all(0 < c < math.inf for c in self.bounds.values()):
            raise ValueError(f"Bounds on gradients' norms must be positive and finite, got {self.bounds}.")
        self.about = {"bounds": repr(sorted(self.bounds.items()))}
        self.sums: dict[str, Tensor] = {}
        self._kept: dict[str, LayerJacobian] = {}

    @property
    def sensitivity(self) -> float:
        """`sqrt(sum of squared bounds)`: how far one example can move the sum."""
        return math.sqrt(sum(c**2 for c in self.bounds.values()))

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self._kept[name] = jacobian

    def end_batch(self) -> None:
        """Clip, now that every norm can be known."""
        for group, names in self.groups.items():
            found = [name for name in names if name in self._kept]
            if found:
                self._clip(group, found)
        self._kept = {}

    def _clip(self, group: str, names: list[str]) -> None:
        norms = torch.stack([self._kept[n].square_norms() for n in names]).sum(0).sqrt()  # (1, N)
        factors = (self.bounds[group] / norms).clamp_max(1.0)  # a gradient of zero stays as it is
        add_to(self.sums, f"clipped/{group}", (factors < 1).sum())
        for name in names:
            add_to(self.sums, f"sum/{name}", self._kept[name].pull_back(factors))

    def result(self) -> ClippedTotal:
        """See `Quantity.result`."""
        like = summable(self.parameters.tensors[0].detach())
        tensors = {k: t.clone() for k, t in self.sums.items()}
        for name, shape in self.shapes.items():
            total = tensors.get(f"sum/{name}", like.new_zeros(shape))
            tensors[f"sum/{name}"] = total.reshape(shape)
        for group in self.groups:
            tensors.setdefault(f"clipped/{group}", torch.zeros((), dtype=torch.int64, device=like.device))
        return ClippedTotal(self.shapes, tensors, self.count, self.about)
