"""Where small networks are registered that take a batch `(N, 4)` and give `(N, 3)`; and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VARIANTS: dict[str, Callable[[], nn.Module]] = {}


def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    VARIANTS[build.__name__.replace("_", " ")] = build
    return build


class Model(nn.Module):
    """A forward pass written as a function of the module and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gaussian(*shape: int) -> Callable[[int], Tensor]:
    """Inputs of this shape for so many examples."""
    return lambda n: torch.randn(n, *shape)


def layers(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *middle, nn.Linear(5, 3))


class Mean(nn.Module):
    """Over some of the axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)
