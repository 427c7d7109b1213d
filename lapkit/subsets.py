"""Which weights are random: all, the last layer, named ones, or single ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import Parameters, Subnetwork, borrowed, last_layer
from lapkit.curvature.accumulate import EMPTY
from lapkit.curvature.capture.forward import forward
from lapkit.curvature.inputs import to_device, unpack
from lapkit.curvature.parameters import unwrapped
from lapkit.subnetworks import SubnetworkMask, Task

NAMES = ("all", "last_layer", "subnetwork")
SHOWN = 3  # names of a selection that are printed
Weights = Parameters | Subnetwork


@dataclass(frozen=True, eq=False)
class Subset:
    """A choice of weights as users give it.

    Args:
        wanted: one of `NAMES`, or names of parameters or modules.
        subnetwork: of "subnetwork": a mask, or indices of weights.
        last_layer_name: of "last_layer": the module, found by running the model by default.

    Raises:
        TypeError: if the subnetwork is neither a mask nor indices.
        ValueError: if the name is unknown, or settings do not go together.
    """

    wanted: str | tuple[str, ...]
    subnetwork: SubnetworkMask | Tensor | None = None
    last_layer_name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.wanted, str) and self.wanted not in NAMES:
            raise ValueError(
                f"Unknown subset_of_weights {self.wanted!r}. Choose 'all', 'last_layer', 'subnetwork', or a list of "
                "names of parameters or modules."
            )
        if (self.wanted == "subnetwork") != (self.subnetwork is not None):
            raise ValueError(
                f"subset_of_weights={self.wanted!r} with subnetwork={self.subnetwork!r}: "
                "subset_of_weights='subnetwork' and subnetwork= (a mask, such as "
                "lapkit.subnetworks.LargestMagnitude(100), or indices) belong together."
            )
        if self.last_layer_name is not None and self.wanted != "last_layer":
            raise ValueError(
                f"last_layer_name={self.last_layer_name!r} belongs to subset_of_weights='last_layer', got "
                f"{self.wanted!r}."
            )

    def __str__(self) -> str:
        several = not isinstance(self.wanted, str) and len(self.wanted) > SHOWN
        return f"{len(self.wanted)} names" if several else repr(self.wanted)

    def known(self, model: nn.Module) -> Weights | None:
        """The weights, where they are known without data.

        Raises:
            TypeError: if indices of single weights are no integers, or a string.
            ValueError: if nothing can be trained, or a name or index picks nothing.
        """
        trainable = Parameters.of(model)
        if self.wanted == "all":
            return trainable
        if self.wanted == "last_layer":
            return None if self.last_layer_name is None else Parameters.of(model, [self.last_layer_name])
        if self.wanted != "subnetwork":
            return Parameters.of(model, self.wanted)
        if isinstance(self.subnetwork, SubnetworkMask):
            return None
        if isinstance(self.subnetwork, str):
            raise TypeError(
                f"subnetwork={self.subnetwork!r}: expected places of weights or a mask, such as "
                "lapkit.subnetworks.LargestMagnitude(100)."
            )
        return Subnetwork.of(trainable, torch.as_tensor(self.subnetwork))

    def found(self, task: Task, *, again: bool = False) -> tuple[Weights, Iterable[Any]]:
        """The weights, and the data from their beginning.

        Args:
            task: network and data; the last layer is found by running the network on the first batch.
            again: whether the data will be run through more than once.

        Returns:
            The weights, and the data to be run through next.

        Raises:
            TypeError: if the data do not suit the mask of a subnetwork.
            ValueError: if there is no data, or the weights are refused.
        """
        weights = self.known(task.model)
        if weights is not None:
            return weights, task.data
        if isinstance(self.subnetwork, SubnetworkMask):
            return Subnetwork.of(Parameters.of(task.model), self.subnetwork.choose(task)), task.data
        batches = iter(task.data)
        first = list(islice(batches, 1))
        weights = _last_layer(task, first)
        return weights, task.data if again and batches is not task.data else chain(first, batches)


def _last_layer(task: Task, first: list[Any]) -> Parameters:
    """The layer nearest to the outputs.

    Raises:
        ValueError: if there is no batch.
    """
    if not first:
        raise ValueError(EMPTY)
    trainable = Parameters.of(task.model)
    x = to_device(unpack(first[0], 0)[0], trainable.device)
    with borrowed(task.model, trainable):
        output = forward(task.model, x, trainable, forward_fn=task.forward_fn, output_axis=task.output_axis)
        return last_layer(output, trainable)


def places_among(subnetwork: Subnetwork, model: nn.Module) -> Tensor:
    """A subnetwork as a Boolean mask over the flat vector of the weights that require gradients."""
    chosen = dict(zip(subnetwork.whole.names, subnetwork.places, strict=True))
    masks = []
    for name, p in unwrapped(model).named_parameters():
        if p.requires_grad:
            mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            masks.append(mask.index_fill(0, chosen[name], True) if name in chosen else mask)
    return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)
