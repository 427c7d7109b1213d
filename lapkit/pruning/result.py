"""What pruning has decided: which weights go, what the others become, and what that costs by the quadratic model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lapkit.curvature import Parameters
from lapkit.curvature.parameters import unwrapped
from lapkit.pruning.masks import Scores, apply_masks, place
from lapkit.pruning.quadratic import Quadratic


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult:
    """A pruned network, as numbers; no network is touched until `apply`.

    Args:
        quadratic: what it was decided by.
        change: of its weights, `(S,)`.
        gone: which of all weights of its tensors are zero now by this or an earlier pruning, Boolean, flat.
        scores: of the units by which they were ranked, at first.
        units: how many there were, and how many have gone.
    """

    quadratic: Quadratic
    change: Tensor
    gone: Tensor
    scores: Tensor
    units: tuple[int, int]

    @property
    def parameters(self) -> Parameters:
        """The tensors that hold the weights."""
        return self.quadratic.whole

    @property
    def predicted_increase(self) -> float:
        """What the negative log posterior rises by, in nats, if it is quadratic and was at its minimum."""
        return float(self.quadratic.increase(self.change))

    @property
    def sparsity(self) -> float:
        """The fraction of units that have gone."""
        return self.units[1] / self.units[0]

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The new weights by parameter name, those that have gone exactly zero, in the network's type."""
        flat = self.parameters.vector().to(torch.float64)
        flat[self.quadratic.places] = self.quadratic.weights + self.change
        flat[self.gone] = 0
        return {n: v.to(self.parameters.dtype) for n, v in self.parameters.split(flat).items()}

    @cached_property
    def masks_by_name(self) -> Mapping[str, Tensor]:
        """Ones and zeros by parameter name, of the tensors that have lost a weight."""
        masks = self.parameters.split((~self.gone).to(self.parameters.dtype))
        return {name: mask for name, mask in masks.items() if not mask.all()}

    @property
    def masks(self) -> Scores:
        """Masks by `(module, parameter name)` of the network that was fitted, as `torch.nn.utils.prune` takes them."""
        return self._masks(self.quadratic.model)

    def _masks(self, model: nn.Module) -> Scores:
        return {place(unwrapped(model), name): mask for name, mask in self.masks_by_name.items()}

    def apply(self, model: nn.Module | None = None, *, permanent: bool = False) -> nn.Module:
        """Put the new weights and the masks into a network, in place.

        Args:
            model: the network that was fitted, by default, or a copy of it.
            permanent: write the zeros into the weights; otherwise `weight` is `weight_orig` times `weight_mask`, so
                that further training keeps the zeros.

        Returns:
            The network.

        Raises:
            ValueError: if the network has other parameters.
        """
        model = self.quadratic.model if model is None else model
        own = self._tensors(model)
        with torch.no_grad():
            for name, weight in self.weights.items():
                own[name].copy_(weight)
        return apply_masks(model, self._masks(model), permanent=permanent)

    def _tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors of a network by name.

        Raises:
            ValueError: if those that hold the weights are not among them.
        """
        own = dict(unwrapped(model).named_parameters())
        wrong = [n for n, w in self.weights.items() if n not in own or own[n].shape != w.shape]
        if wrong:
            raise ValueError(
                f"The network has no parameters {wrong} of these shapes: it is no copy of the fitted one, or it has "
                "masks, which lapkit.pruning.make_permanent(model) takes off."
            )
        return own

    def pruned(self) -> nn.Module:
        """A copy of the network with the new weights, the zeros written into them.

        Raises:
            ValueError: if the network carries masks by now.
        """
        self._tensors(self.quadratic.model)  # a network with masks cannot be copied
        return self.apply(copy.deepcopy(self.quadratic.model), permanent=True)

    def state_dict(self) -> dict[str, Tensor]:
        """A plain state dict of the pruned network: the names and shapes of the network that was fitted.

        Raises:
            ValueError: if the network carries masks by now.
        """
        return dict(unwrapped(self.pruned()).state_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.units[1]} of {self.units[0]} units gone)"

    def __str__(self) -> str:
        lines = [
            f"{self.units[1]} of {self.units[0]} units gone, {int(self.gone.sum())} of {len(self.gone)} weights; "
            f"predicted: +{self.predicted_increase:.4g} nats",
            "",
            f"{'parameter':<28}{'weights':>9}{'gone':>9}{'sparsity':>10}",
        ]
        for name, gone in self.parameters.split(self.gone).items():
            lines.append(f"{name:<28}{gone.numel():>9}{int(gone.sum()):>9}{float(gone.float().mean()):>10.1%}")
        return "\n".join(lines)
