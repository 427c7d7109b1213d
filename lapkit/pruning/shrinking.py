"""Physically smaller layers: neurons that nothing leads to or out of are cut out of a sequential network."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapkit.curvature.parameters import unwrapped
from lapkit.pruning.chains import BATCH_NORMS, ELEMENTWISE, INERT, Layer, Link, chain_of
from lapkit.pruning.schedules import copied, make_permanent

CONSTANT = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, *INERT),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)  # what leaves a constant as it is


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A smaller network that computes the same.

    Args:
        model: the network, in eval mode if the one given was.
        removed: how many neurons or filters each layer has lost, by name.
        weights: how many the network had and has.
    """

    model: nn.Module
    removed: dict[str, int]
    weights: tuple[int, int]

    def __str__(self) -> str:
        layers = ", ".join(f"{name}: {count}" for name, count in self.removed.items() if count) or "none"
        return f"{self.weights[1]} of {self.weights[0]} weights; neurons removed: {layers}"


def shrink(model: nn.Module, x: Tensor | None = None, *, tolerance: float = 1e-4) -> Shrunk:
    """Cut the dead neurons and filters out of a sequential network; its outputs stay what they are.

    A neuron is dead if no weight leads out of it, or none into it: then it has the same value for every input, which
    goes into the next layer's bias.

    Args:
        model: `nn.Sequential` of linear layers, convolutions, batch norms, elementwise activations, pooling, dropout
            and `nn.Flatten()`, nested if need be; masks of `torch.nn.utils.prune` may be on. It stays as it is.
        x: a batch of inputs, on which the outputs of both networks in eval mode are compared.
        tolerance: of that comparison, relative to the largest output.

    Returns:
        The smaller network. A layer keeps one neuron at least.

    Raises:
        ValueError: if the network is no chain of known layers.
        RuntimeError: if the outputs differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[2].weight[:, 1].zero_()
        >>> shrink(net, torch.ones(1, 2)).model
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=1, bias=True)
        )
    """
    small = make_permanent(copied(unwrapped(model)))
    before = sum(p.numel() for p in small.parameters())
    removed = {link.name: _cut(link) for link in chain_of(small)}
    if x is not None:
        _compare(unwrapped(model), small, x, tolerance)
    return Shrunk(small, removed, (before, sum(p.numel() for p in small.parameters())))


@torch.no_grad()
def _cut(link: Link) -> int:
    """Remove the dead outputs of one layer; how many."""
    silent = (link.outgoing(link.next.weight).flatten(1) == 0).all(1)
    constant = (link.layer.weight.flatten(1) == 0).all(1) & ~silent
    if constant.any():
        values = _constants(link)
        constant &= (values == 0) | (values.isfinite() & (not _pads(link.next)))
        _into_bias(link, torch.where(constant, values, 0.0))
    keep = ~(silent | constant)
    if not keep.any():
        keep[0] = True
        link.outgoing(link.next.weight)[0] = 0
    _select(link, keep.nonzero()[:, 0])
    return int((~keep).sum())


def _constants(link: Link) -> Tensor:
    """The value that each output has where no weight leads to it, as the next layer sees it; NaN if it has several."""
    bias = link.layer.bias
    value = link.layer.weight.new_zeros(link.outputs) if bias is None else bias.detach().clone()
    for _, module in link.between:
        if isinstance(module, BATCH_NORMS):
            value = _normalised(module, value)
        elif isinstance(module, ELEMENTWISE):
            value = copy.deepcopy(module).eval()(value.clone())
        elif not isinstance(module, CONSTANT):
            value = torch.where(value == 0, value, torch.nan)
    return value


def _normalised(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, value: Tensor) -> Tensor:
    """A batch norm in eval mode; without running statistics a constant becomes the shift."""
    if norm.running_mean is None or norm.running_var is None:
        value = value * 0  # NaN, several values, stays NaN
    else:
        value = (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    value = value if norm.weight is None else value * norm.weight
    return value if norm.bias is None else value + norm.bias


def _pads(layer: Layer) -> bool:
    """Whether the next layer sees zeros at the borders, where a constant is none."""
    return not isinstance(layer, nn.Linear) and (
        layer.padding == "same" if isinstance(layer.padding, str) else any(layer.padding)
    )


def _into_bias(link: Link, values: Tensor) -> None:
    """Add what constant inputs contribute to the next layer's bias."""
    if not values.any():
        return
    shift = link.outgoing(link.next.weight).flatten(2).sum(2).T @ values
    if link.next.bias is None:
        link.next.bias = nn.Parameter(shift)
    else:
        link.next.bias += shift


def _select(link: Link, keep: Tensor) -> None:
    """Keep some outputs of a layer, and what reads them."""
    layer, following = link.layer, link.next
    _set(following, "weight", link.outgoing(following.weight)[keep].movedim(0, 1).flatten(1, 2))
    for name in ("weight", "bias"):
        _keep(layer, name, keep)
    for _, norm in link.batch_norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            _keep(norm, name, keep)
        norm.num_features = len(keep)
    for module in (layer, following):
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        else:
            module.out_channels, module.in_channels = module.weight.shape[:2]


def _keep(module: nn.Module, name: str, keep: Tensor) -> None:
    """Some entries of a parameter or buffer, if it is there."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        _set(module, name, old[keep])
    elif isinstance(old, Tensor):
        setattr(module, name, old[keep].clone())


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Another parameter in place of one."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))


@torch.no_grad()
def _compare(model: nn.Module, small: nn.Module, x: Tensor, tolerance: float) -> None:
    """Run both.

    Raises:
        RuntimeError: if the outputs differ.
    """
    old, new = (copied(m).eval()(x) for m in (model, small))
    difference = float((old - new).abs().max() / old.abs().max().clamp_min(torch.finfo(old.dtype).tiny))
    if not difference <= tolerance:
        raise RuntimeError(
            f"The smaller network's outputs differ by {difference:.1e} of the largest. Keep the masks instead, and "
            "report the network."
        )
