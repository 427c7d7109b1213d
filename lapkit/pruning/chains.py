"""Sequential networks as a chain of layers: what leads into a neuron, and what leads out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lapkit.curvature.parameters import unwrapped

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardtanh),
    *(nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
)
INERT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
BY_CHANNEL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Upsample),
)


@dataclass(frozen=True, eq=False)
class Link:
    """A layer of the chain and the next one, which reads its outputs.

    Args:
        name: of the layer.
        layer: with one row of weights for each output.
        between: modules in between by name, each of which treats the outputs one by one.
        next_name: of the next layer.
        next: with one column of weights, or several in a row, for each output.
    """

    name: str
    layer: Layer
    between: tuple[tuple[str, nn.Module], ...]
    next_name: str
    next: Layer

    @property
    def outputs(self) -> int:
        """How many the layer has."""
        return self.layer.weight.shape[0]

    def outgoing(self, values: Tensor) -> Tensor:
        """What the next layer's weights, or something in their shape, hold for each output, `(outputs, *)`."""
        return values.unflatten(1, (self.outputs, -1)).movedim(1, 0)

    @property
    def batch_norms(self) -> list[tuple[str, BatchNorm]]:
        """Those in between."""
        return [(name, module) for name, module in self.between if isinstance(module, BATCH_NORMS)]


def chain_of(model: nn.Module) -> list[Link]:
    """The hidden layers of a sequential network, each with the layer that follows.

    Args:
        model: `nn.Sequential` of linear layers, convolutions, batch norms, elementwise activations, pooling, dropout
            and `nn.Flatten()`, nested if need be; before its first layer `nn.Unflatten`, too.

    Returns:
        One link for each layer but the last.

    Raises:
        ValueError: if a module is not of these kinds, a convolution has groups, sizes do not fit, or a weight is used
            twice.
    """
    found = _opened("", unwrapped(model))
    _check_used_once(found)
    at = [i for i, (_, module) in enumerate(found) if isinstance(module, LAYERS)]
    links = []
    for here, there in pairwise(at):
        (name, layer), (next_name, following) = found[here], found[there]
        assert isinstance(layer, LAYERS)
        assert isinstance(following, LAYERS)
        link = Link(name, layer, tuple(found[here + 1 : there]), next_name, following)
        _check(link)
        links.append(link)
    if not links:
        raise ValueError("There is no hidden layer: the chain has fewer than two linear layers or convolutions.")
    return links


def _opened(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Nested `nn.Sequential` as one list.

    Raises:
        ValueError: if a module is not of a known kind.
    """
    if type(module).forward is nn.Sequential.forward:
        # one activation may stand in several places, of which named_children() gives the first alone
        children = [(n, c) for n, c in module.named_modules(remove_duplicate=False) if n and "." not in n]
        return [f for n, child in children for f in _opened(f"{name}.{n}" if name else n, child)]
    if type(module) in (*LAYERS, *BATCH_NORMS, *ELEMENTWISE, *INERT, *BY_CHANNEL, nn.Flatten, nn.Unflatten):
        return [(name, module)]
    raise ValueError(
        f"{name or 'The model'} ({type(module).__name__}) is no part of a chain of linear layers, convolutions, batch "
        "norms, elementwise activations, pooling, dropout and nn.Flatten() in nn.Sequential. Prune rows instead "
        "(unit='row'), or give the groups as Units."
    )


def _check_used_once(found: list[tuple[str, nn.Module]]) -> None:
    """Refuse a layer, or a weight, in two places: what leads out of a neuron in one leads into it in the other.

    Raises:
        ValueError: if there is one.
    """
    seen: dict[int, str] = {}
    for name, module in found:
        if isinstance(module, (*LAYERS, *BATCH_NORMS)):
            for part in (module, *module.parameters()):
                if seen.setdefault(id(part), name) != name:
                    raise ValueError(
                        f"{name} has the weights of {seen[id(part)]}: a neuron of the one is none of the other. Prune "
                        "rows instead (unit='row'), or give the groups as Units."
                    )


def _check(link: Link) -> None:
    """Refuse what does not treat the outputs of a layer one by one.

    Raises:
        ValueError: if there are groups, flattening is partial, or sizes do not fit.
    """
    for owner, layer in ((link.name, link.layer), (link.next_name, link.next)):
        if not isinstance(layer, nn.Linear) and layer.groups != 1:
            raise ValueError(f"{owner} is a convolution with {layer.groups} groups; neurons are removed of one group.")
    flattened = False
    for name, module in link.between:
        flattened |= isinstance(module, nn.Flatten)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            raise ValueError(f"{name} flattens axes {module.start_dim} to {module.end_dim}; only 1 to -1 is known.")
        if isinstance(module, nn.Unflatten):
            raise ValueError(f"{name} (Unflatten) regroups the outputs of {link.name}; only inputs may be regrouped.")
        if isinstance(link.layer, nn.Linear) and isinstance(module, BY_CHANNEL):
            raise ValueError(f"{name} ({type(module).__name__}) mixes the outputs of the linear layer {link.name}.")
        if isinstance(module, BATCH_NORMS) and module.num_features != link.outputs:
            raise ValueError(f"{name} normalises {module.num_features} channels, {link.name} has {link.outputs}.")
    from_conv, to_conv = (not isinstance(layer, nn.Linear) for layer in (link.layer, link.next))
    size = link.next.weight.shape[1]
    if to_conv > from_conv or from_conv - to_conv != flattened * from_conv or size % link.outputs:
        raise ValueError(
            f"{link.next_name} does not read the outputs of {link.name} one by one: convolutions go before "
            f"nn.Flatten() and linear layers after it, and {link.outputs} outputs divide {size} inputs."
        )
    if not from_conv and size != link.outputs:
        raise ValueError(f"{link.next_name} has {size} inputs, {link.name} has {link.outputs} outputs.")


def incoming_and_outgoing(link: Link, places: Callable[[str], Tensor | None]) -> list[Tensor]:
    """All weights of each output: its row and bias, the scale and shift of batch norms, and its columns.

    Args:
        link: a layer and the next.
        places: of a parameter, in its shape; None for those that are not there.

    Returns:
        One vector for each output.
    """
    rows = [
        f"{owner}.{kind}" for owner in (link.name, *(n for n, _ in link.batch_norms)) for kind in ("weight", "bias")
    ]
    found = [p.flatten(1) if p.ndim > 1 else p[:, None] for p in map(places, rows) if p is not None]
    columns = places(f"{link.next_name}.weight")
    if columns is not None:
        found.append(link.outgoing(columns).flatten(1))
    return list(torch.cat(found, 1))
