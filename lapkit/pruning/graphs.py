"""Channels of any graph, with residual connections and concatenations: scores for the library torch-pruning."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lapkit.laplace import Laplace
from lapkit.pruning.criteria import Criterion, criterion_named
from lapkit.pruning.kinds import places_of
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.units import Units


@final
class LaplaceImportance:
    """Scores of channels by curvature, to be given to a pruner of torch-pruning, which knows what hangs together.

    A channel is all weights that go with it through the whole graph; its score is that of these weights as one group,
    such as `w_Q^T ([P^{-1}]_QQ)^{-1} w_Q / 2`.

    Args:
        la: fitted on all weights of the network that is pruned, in its present shape; fit anew after each step.
        criterion: see `prune`.

    It needs the extra "graphs".

    Raises:
        RuntimeError: before `fit`.
        ValueError: if the criterion is unknown.

    Reference:
        Fang et al., DepGraph: towards any structural pruning, 2023.
    """

    def __init__(self, la: Laplace, criterion: str | Criterion = "obs") -> None:
        self.quadratic, self.criterion = Quadratic.of(la), criterion_named(criterion)
        self._names = {id(p): n for n, p in zip(self.quadratic.whole.names, self.quadratic.whole.tensors, strict=True)}

    def __call__(self, group: Any) -> Tensor:
        """The scores of a group's channels.

        Args:
            group: a `torch_pruning.dependency.Group`, over all channels.

        Returns:
            One score for each channel, the smallest to go first.

        Raises:
            ValueError: if a weight of the group is not among those that were fitted.
        """
        import torch_pruning  # optional

        columns = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
        channels: dict[int, list[Tensor]] = {}
        for item in group:
            axis = int(item.dep.pruning_fn in columns)
            for places in self._of_layer(item.dep.layer, axis):
                for root, index in zip(item.root_idxs, item.idxs, strict=True):
                    channels.setdefault(root, []).append(places[index].flatten())
        units = Units.of([torch.cat(channels[i]) for i in sorted(channels)], [0] * len(channels), ["group"])
        return self.criterion.score(self.quadratic, units)

    def _of_layer(self, layer: nn.Module, axis: int) -> list[Tensor]:
        """The places of a layer's weights with its channels first: of all its parameters, or of its columns.

        Raises:
            ValueError: if one was not fitted.
        """
        found = []
        transposed = bool(getattr(layer, "transposed", False))
        for name, parameter in layer.named_parameters():
            if axis == 1 and parameter.ndim == 1:
                continue  # a bias has no columns
            if id(parameter) not in self._names:
                raise ValueError(
                    f"{name!r} of a {type(layer).__name__} is not among the fitted weights: it was frozen, left "
                    "out, or replaced by a pruning step since. Fit all weights, and anew after each step."
                )
            places = places_of(self.quadratic.whole, self._names[id(parameter)])
            found.append(places if parameter.ndim == 1 else places.movedim(axis ^ transposed, 0))
        return found
