"""Kinds of units: single weights, rows of a layer, neurons and filters with what leads out of them, attention heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lapkit.curvature import Parameters
from lapkit.curvature.parameters import unwrapped
from lapkit.pruning.chains import LAYERS, chain_of, incoming_and_outgoing
from lapkit.pruning.heads import head_weights
from lapkit.pruning.masks import is_prunable, place
from lapkit.pruning.units import Units

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_units(parameters: Parameters, chosen: Iterable[int]) -> Units:
    """Every weight of some tensors by itself.

    Args:
        parameters: tensors in flat order.
        chosen: numbers of the tensors, each of which is a layer.

    Returns:
        One unit for each weight.
    """
    chosen, starts = list(chosen), _starts(parameters)
    device = parameters.device
    members = [torch.arange(parameters.sizes[t], device=device) + starts[t] for t in chosen]
    layers = torch.arange(len(chosen), device=device)
    layers = layers.repeat_interleave(torch.tensor([len(m) for m in members], device=device))
    names = tuple(parameters.names[t] for t in chosen)
    return Units(torch.cat(members), torch.ones_like(layers), layers, names)


def row_units(model: nn.Module, parameters: Parameters, chosen: Iterable[int]) -> Units:
    """What leads to one output of a layer: a row of a weight matrix or a filter, with its bias.

    Args:
        model: the network.
        parameters: tensors in flat order.
        chosen: numbers of the weight tensors.

    Returns:
        One unit for each output of each layer.
    """
    groups: list[Tensor] = []
    layers: list[int] = []
    chosen = list(chosen)
    for number, tensor in enumerate(chosen):
        name = parameters.names[tensor]
        module, attribute = place(model, name)
        own = places_of(parameters, name)
        rows = list(own.movedim(int(isinstance(module, TRANSPOSED)), 0).flatten(1))
        bias = name[: -len(attribute)] + attribute.replace("weight", "bias")
        if bias in parameters.names and places_of(parameters, bias).shape == (len(rows),):
            rows = [torch.cat([row, b[None]]) for row, b in zip(rows, places_of(parameters, bias), strict=True)]
        groups += rows
        layers += [number] * len(rows)
    return Units.of(groups, layers, [parameters.names[t] for t in chosen])


def neuron_units(
    model: nn.Module, parameters: Parameters, chosen: Iterable[int], kinds: tuple[type, ...] = LAYERS
) -> Units:
    """All weights into and out of one hidden neuron, or filter, of a chain: what can be removed physically.

    These are the row of its layer with the bias, what a batch norm does to it, and its column in the next layer.

    Args:
        model: `nn.Sequential`, nested if need be.
        parameters: tensors in flat order.
        chosen: numbers of the weight tensors whose outputs are the neurons; the last layer's are never removed.
        kinds: classes of the layers whose outputs are removed.

    Returns:
        One unit for each neuron.

    Raises:
        ValueError: if the network is no chain of known layers, or none of these may lose a neuron.
    """
    allowed = {parameters.names[t] for t in chosen}
    groups: list[Tensor] = []
    layers: list[int] = []
    names: list[str] = []
    for link in chain_of(model):
        name = f"{link.name}.weight"
        if name not in allowed or not isinstance(link.layer, kinds):
            continue
        found = incoming_and_outgoing(link, lambda n: places_of(parameters, n) if n in parameters.names else None)
        groups += found
        layers += [len(names)] * len(found)
        names.append(name)
    if not groups:
        raise ValueError(
            f"None of {', '.join(kind.__name__ for kind in kinds)} is before the last layer of this network, among the "
            "weights that may be pruned. Prune 'weight', 'row' or 'neuron' instead, or ignore= less."
        )
    return Units.of(groups, layers, names)


def head_units(model: nn.Module, parameters: Parameters, chosen: Iterable[int]) -> Units:
    """One head of an attention layer: its rows of the queries, keys and values, and its columns of the output.

    Args:
        model: with `nn.MultiheadAttention` modules, or modules with the projections of the transformers library.
        parameters: tensors in flat order.
        chosen: numbers of tensors of which at least one belongs to the layer.

    Returns:
        One unit for each head.

    Raises:
        ValueError: if there is no attention layer.
    """
    allowed = {parameters.names[t] for t in chosen}
    groups: list[Tensor] = []
    layers: list[int] = []
    names: list[str] = []
    for name, module in model.named_modules():
        pieces = head_weights(name, module)
        if not any(piece.name in allowed for piece in pieces):
            continue
        known = [p for p in pieces if p.name in parameters.names]
        heads = [
            torch.cat([p.of_head(places_of(parameters, p.name), h).flatten() for p in known])
            for h in range(pieces[0].heads)
        ]
        groups += heads
        layers += [len(names)] * len(heads)
        names.append(name)
    if not groups:
        raise ValueError(
            "No attention layer was found among the weights that may be pruned. Known are nn.MultiheadAttention and "
            "modules with projections q_proj, k_proj, v_proj, o_proj or query, key, value; give others as Units."
        )
    return Units.of(groups, layers, names)


def _singles(model: nn.Module, parameters: Parameters, chosen: Iterable[int]) -> Units:
    return weight_units(parameters, chosen)


UNITS: dict[str, Callable[[nn.Module, Parameters, Iterable[int]], Units]] = {
    "weight": _singles,
    "row": row_units,
    "neuron": neuron_units,
    "filter": partial(neuron_units, kinds=(nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    "head": head_units,
}


def candidates(model: nn.Module, parameters: Parameters, ignore: Iterable[str] = ()) -> list[int]:
    """The numbers of the tensors that may be pruned: weight matrices and filters, but those that are to be left alone.

    Args:
        model: the network.
        parameters: tensors in flat order.
        ignore: names of parameters or modules.

    Returns:
        Numbers, ascending.

    Raises:
        ValueError: if a name is that of no parameter, or nothing is left.
    """
    model, ignored = unwrapped(model), [ignore] if isinstance(ignore, str) else list(ignore)
    names = [name for name, _ in model.named_parameters()]
    unknown = [i for i in ignored if not any(_inside(name, i) for name in names)]
    if unknown:
        raise ValueError(f"{unknown} to be ignored name no parameter or module; there are {names}.")
    masked = [name for name in parameters.names if name.endswith("_orig")]
    if masked:
        raise ValueError(
            f"{masked} carry masks of torch.nn.utils.prune already. Make them permanent first, "
            "torch.nn.utils.prune.remove(module, 'weight'), and fit again."
        )
    pairs = zip(parameters.names, parameters.tensors, strict=True)
    chosen = [
        number
        for number, (name, tensor) in enumerate(pairs)
        if is_prunable(model, name, tensor.shape) and not any(_inside(name, i) for i in ignored)
    ]
    if not chosen:
        raise ValueError(f"Nothing may be pruned: of {list(parameters.names)} no weight matrix is left.")
    return chosen


def _inside(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def places_of(parameters: Parameters, name: str) -> Tensor:
    """The flat places of one tensor's weights, in its shape."""
    number = parameters.names.index(name)
    tensor, start = parameters.tensors[number], _starts(parameters)[number]
    return torch.arange(start, start + tensor.numel(), device=parameters.device).reshape(tensor.shape)


def _starts(parameters: Parameters) -> list[int]:
    """Where each tensor begins in the flat vector."""
    return torch.tensor([0, *parameters.sizes[:-1]]).cumsum(0).tolist()
