"""What networks say of data: one pass over batches, for all that is going to be compared on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import Engine, Parameters, borrowed
from lapkit.curvature.inputs import TARGET_KEYS, as_tensors, numbered, to_device, unpack
from lapkit.facade.functions import Functions
from lapkit.posteriors import FunctionDistribution


@dataclass(frozen=True)
class Seen:
    """What the networks say of all examples; an output at one position of an example is a row.

    Args:
        f: of the linearised network, `(M, C)`; of a mixture, of each of its networks.
        members: outputs of the ensemble's networks, `(M, C)` each.
        targets: checked, `(M, *)`; none where they were not asked for.
        inputs: where examples are rows and inputs are tensors.
    """

    f: tuple[FunctionDistribution, ...]
    members: tuple[Tensor, ...]
    targets: Tensor
    inputs: Tensor | None


def seen(
    fits: Sequence[Functions], data: Iterable[Any], ensemble: Sequence[nn.Module] = (), *, with_targets: bool = True
) -> Seen:
    """One pass over the data.

    Args:
        fits: fitted, of one number of outputs; targets are checked by the first.
        data: batches, with targets or without.
        ensemble: networks that are run on the same inputs.
        with_targets: whether targets are asked for.

    Returns:
        Everything, in the order of the data.

    Raises:
        TypeError: if the ensemble is a single network.
        ValueError: if there are none, or examples have weights.
    """
    if isinstance(ensemble, nn.Module):  # an nn.Sequential would be read as a list of its layers
        raise TypeError(f"The ensemble is one {type(ensemble).__name__}; expected a list of networks.")
    la, targets, inputs = fits[0], [], []
    functions: list[list[FunctionDistribution]] = [[] for _ in fits]
    members: list[list[Tensor]] = [[] for _ in ensemble]
    for number, batch in numbered(data):
        x, y, weights = unpack(batch, number) if with_targets else (_inputs(batch, number), None, None)
        if weights is not None:
            raise ValueError("The batches have weights of the examples; expected none: all count alike here.")
        here = [fit.function_distribution(x) for fit in fits]
        for kept, f in zip(functions, here, strict=True):
            kept.append(_rows(f))
        mean = functions[0][-1].mean
        for found, member in zip(members, ensemble, strict=True):
            found.append(_outputs(la, member, x).reshape(mean.shape).to(mean))
        if y is not None:
            checked = la.likelihood.check(here[0].mean, y.to(mean.device), la.output_axis)
            targets.append(checked.reshape(len(mean), -1))
        inputs.append(x)
    if not inputs:
        raise ValueError("There is no batch in the data. A generator can be run through once only: give a loader.")
    shown = torch.cat(inputs) if all(isinstance(x, Tensor) for x in inputs) else None
    return Seen(
        tuple(_joined(parts) for parts in functions),
        tuple(torch.cat(found) for found in members),
        torch.cat(targets) if targets else torch.empty(0),
        shown if shown is not None and len(shown) == sum(len(f.mean) for f in functions[0]) else None,
    )


def _rows(f: FunctionDistribution) -> FunctionDistribution:
    """An output at one position of an example is a row."""
    outputs = f.mean.shape[-1]
    return FunctionDistribution(f.mean.reshape(-1, outputs), f.covariance.reshape(-1, outputs, outputs))


def _joined(parts: Sequence[FunctionDistribution]) -> FunctionDistribution:
    return FunctionDistribution(torch.cat([f.mean for f in parts]), torch.cat([f.covariance for f in parts]))


def _inputs(batch: Any, number: int) -> Any:
    """The inputs of a batch that may or may not have targets."""
    if isinstance(batch, Mapping):
        return as_tensors({key: value for key, value in batch.items() if key not in TARGET_KEYS})
    if isinstance(batch, (tuple, list)):
        return as_tensors(batch[0]) if len(batch) == 1 else unpack(batch, number)[0]
    return as_tensors(batch)


def _outputs(la: Functions, model: nn.Module, x: Any) -> Tensor:
    """What another network gives for the same inputs, in the same form."""
    engine = Engine(model, Parameters.of(model), forward_fn=la.forward_fn, output_axis=la.output_axis)
    with borrowed(model, engine.parameters):
        return engine.outputs(to_device(x, engine.parameters.device)).detach()
