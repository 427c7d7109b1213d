"""Single weights out of a network's tensors: the others stay what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.principal import principal
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import Result


@final
@dataclass(frozen=True, eq=False)
class Subnetwork:
    """Some weights of some tensors, in the order of the tensors and of the places in them.

    Args:
        whole: the tensors that hold them.
        places: of each tensor the flat places of its weights, ascending.

    Raises:
        ValueError: if tensors and places do not pair up, or a tensor has no such place.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(3, 2)  # six weights, two biases
        >>> Subnetwork.of(Parameters.of(net), torch.tensor([1, 4, 7])).weights.sizes
        (2, 1)
    """

    whole: Parameters
    places: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.places) != len(self.whole.tensors):
            raise ValueError(f"{len(self.places)} sets of places for {len(self.whole.tensors)} tensors.")
        for name, size, place in zip(self.whole.names, self.whole.sizes, self.places, strict=True):
            if not len(place) or int(place[0]) < 0 or int(place[-1]) >= size or bool((place.diff() <= 0).any()):
                raise ValueError(f"The places in {name!r} must ascend from 0 or more to less than {size}, got {place}.")

    @classmethod
    def of(cls, parameters: Parameters, indices: Tensor) -> Subnetwork:
        """The weights at these places of the flat vector of all.

        Args:
            parameters: all weights.
            indices: distinct integers, in any order, or a Boolean mask `(P,)`.

        Returns:
            The subnetwork; tensors without a chosen weight are left out.

        Raises:
            TypeError: if the indices are neither integers nor Booleans.
            ValueError: if there is none, one is given twice or is not there, or a mask has another length.
        """
        chosen = _mask(parameters.numel, torch.as_tensor(indices)).to(parameters.device)
        found = [part.nonzero()[:, 0] for part in chosen.split(parameters.sizes)]
        whole = parameters.subset(len(place) > 0 for place in found)
        return cls(whole, tuple(place for place in found if len(place)))

    @cached_property
    def weights(self) -> Parameters:
        """The chosen weights as they are now, of each tensor a vector; a tensor that is chosen whole keeps its shape.

        These are copies, which know sizes, type and place; the network's own tensors are `whole`.
        """
        pairs = zip(self.whole.tensors, self.places, strict=True)
        copies = (p.detach().clone() if len(i) == p.numel() else p.detach().flatten()[i] for p, i in pairs)
        return Parameters(self.whole.names, tuple(copies))

    @cached_property
    def indices(self) -> Tensor:
        """Where the chosen weights stand in the flat vector of `whole`."""
        starts = torch.tensor([0, *self.whole.sizes[:-1]]).cumsum(0).tolist()
        return torch.cat([place + start for place, start in zip(self.places, starts, strict=True)])

    def embed(self, vectors: Tensor, beside: Tensor | float = 0.0) -> Tensor:
        """Numbers of the chosen weights, `(*, S)`, among those of `whole`, `(*, P)`.

        Args:
            vectors: of the chosen weights.
            beside: what the others get, a number or `(P,)`.
        """
        others = torch.as_tensor(beside, dtype=vectors.dtype, device=vectors.device)
        everything = others.expand(*vectors.shape[:-1], self.whole.numel).clone()
        everything[..., self.indices] = vectors
        return everything

    def restrict(self, name: str, jacobian: LayerJacobian) -> LayerJacobian:
        """The columns of one tensor's Jacobian that belong to chosen weights."""
        places = self._by_name[name]
        return jacobian if len(places) == jacobian.shape[2] else jacobian.at(places)

    def principal(self, blocks: BlockDiagonal) -> BlockDiagonal:
        """Of a matrix with a block for each tensor, the rows and columns of the chosen weights; see `principal`."""
        return BlockDiagonal(tuple(principal(b, i) for b, i in zip(blocks.blocks, self.places, strict=True)))

    @cached_property
    def _by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.whole.names, self.places, strict=True))


def _mask(size: int, indices: Tensor) -> Tensor:
    """Which weights are chosen, `(P,)`.

    Raises:
        TypeError: if the indices are neither integers nor Booleans.
        ValueError: if there is none, one is given twice or is not there, or a mask has another length.
    """
    if indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"A subnetwork is chosen by integers or a Boolean mask, got {indices.dtype}.")
    if indices.dtype == torch.bool:
        if indices.shape != (size,):
            raise ValueError(f"Expected a mask over {size} trainable weights, got shape {tuple(indices.shape)}.")
        mask = indices
    else:
        indices = indices.long()
        if indices.ndim != 1 or len(indices.unique()) != len(indices):
            raise ValueError(f"Expected a vector of distinct indices, got shape {tuple(indices.shape)}.")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(
                f"Indices of weights are 0 to {size - 1}, got {int(indices.min())} to {int(indices.max())}: they "
                "count the weights that require gradients, in the model's order."
            )
        mask = torch.zeros(size, dtype=torch.bool, device=indices.device)
        mask[indices] = True
    if not mask.any():
        raise ValueError("The subnetwork is empty: choose at least one weight.")
    return mask


@final
class OfSubnetwork(Quantity):
    """A quantity of a subnetwork alone: every Jacobian is cut down to the chosen weights before it is summed.

    Args:
        subnetwork: the weights.
        make: makes the quantity of these weights.
    """

    def __init__(self, subnetwork: Subnetwork, make: Callable[[Parameters], Quantity]) -> None:
        self.inner = make(subnetwork.weights)
        super().__init__(subnetwork.weights, columns=self.inner.columns)
        self.subnetwork = subnetwork
        self.inner.about["subnetwork"] = _digest(subnetwork.places)

    def begin(self, columns: Columns, likelihood: Likelihood) -> None:
        """See `Quantity.begin`."""
        self.inner.begin(columns, likelihood)

    def abandon(self) -> None:
        """See `Quantity.abandon`."""
        self.inner.abandon()

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        self.inner.begin_batch(examples, weights)

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.inner.update(name, self.subnetwork.restrict(name, jacobian), first=first)

    def end_columns(self) -> None:
        """See `Quantity.end_columns`."""
        self.inner.end_columns()

    def end_batch(self) -> None:
        """See `Quantity.end_batch`."""
        self.inner.end_batch()

    def result(self) -> Result:
        """See `Quantity.result`."""
        return self.inner.result()


def _digest(places: Sequence[Tensor]) -> str:
    """Equal for equal places, so that sums over other weights do not add up."""
    return hashlib.sha1(b"|".join(i.cpu().numpy().tobytes() for i in places)).hexdigest()


@final
class SubnetworkEngine(Engine):
    """An engine whose Jacobians are those in the chosen weights; `parameters` are the tensors that hold them.

    Args:
        model: see `Engine`.
        subnetwork: the weights to differentiate with respect to.
        options: see `Engine`.
    """

    def __init__(self, model: nn.Module, subnetwork: Subnetwork, **options: Any) -> None:
        super().__init__(model, subnetwork.whole, **options)
        self.subnetwork = subnetwork

    def __call__(self, x: Any) -> Backprop:
        """See `Engine.__call__`."""
        backprop = super().__call__(x)
        backprop.restrict = self.subnetwork.restrict
        return backprop

    @cached_property
    def of_tensors(self) -> Engine:
        """See `Engine.of_tensors`."""
        return Engine(
            self.model,
            self.parameters,
            memory_budget=self.budget,
            forward_fn=self.forward_fn,
            output_axis=self.output_axis,
        )

    def restricted(self, jacobian: NetworkJacobian) -> NetworkJacobian:
        """See `Engine.restricted`."""
        pairs = zip(self.parameters.names, jacobian.parts, strict=True)
        return NetworkJacobian(tuple(self.subnetwork.restrict(n, part) for n, part in pairs))  # type: ignore[arg-type]

    def complete(self, weights: Tensor) -> Tensor:
        """See `Engine.complete`; the others have their present values."""
        return self.subnetwork.embed(weights, summable(self.parameters.vector()).to(weights.dtype))
