"""Where small networks are registered that take a batch `(N, 4)` and give `(N, 3)`; and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def layers(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *middle, nn.Linear(5, 3))
