"""Derivatives and vmap inside the model, loops, and batches that are folded into other axes."""

from __future__ import annotations

from typing import Any

import torch
from networks.registry import Model, add
from torch import Tensor, nn
from torch.nn import functional as F


@add
def forces() -> nn.Module:
    """Outputs are derivatives of another network's output in its inputs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.energy(x).tanh().sum(), x, create_graph=True)[0][:, :3]

    return Model(forward, energy=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))


@add
def directional_derivative() -> nn.Module:
    """In forward mode."""
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    return Model(lambda m, x: torch.func.jvp(m.body, (x,), (x.cos(),))[1], body=body)


@add
def vmapped_examples() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda z: m.two(m.one(z).tanh()))(x)

    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3))


@add
def vmapped_ensemble() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda w, b, v: (x @ w + b).tanh() @ v)(m.w, m.b, m.v).mean(0)

    shapes = {"w": (3, 4, 5), "b": (3, 5), "v": (3, 5, 3)}
    return Model(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


@add
def one_example_after_the_other() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.two(m.one(z).tanh()) for z in x])

    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3))


@add
def fixed_point() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        u, h = m.one(x), torch.zeros(len(x), 5)
        for _ in range(20):
            h = (u + 0.3 * m.again(h)).tanh()
        return m.two(h)

    return Model(forward, one=nn.Linear(4, 5), again=nn.Linear(5, 5), two=nn.Linear(5, 3))


@add
def straight_through() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        soft = m.one(x).softmax(1)
        return m.two(F.one_hot(soft.argmax(1), 5) + soft - soft.detach())

    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3))


@add
def part_of_a_weight() -> nn.Module:
    """Elastic networks use a corner of a larger matrix; the rest has no derivative."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(F.linear(x[:, 1:3], m.w[1:4, 1:3]).tanh())

    return Model(forward, w=nn.Parameter(torch.randn(5, 4)), two=nn.Linear(3, 3))


@add
def kronecker_weight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(F.linear(x, torch.kron(m.a, m.b)).tanh())

    return Model(forward, a=nn.Parameter(torch.randn(2, 2)), b=nn.Parameter(torch.randn(3, 2)), two=nn.Linear(6, 3))


@add
def convolution_with_weights_of_each_example() -> nn.Module:
    """The batch is folded into the channels, a group for each example."""

    def forward(m: Any, x: Tensor) -> Tensor:
        n = len(x)
        weight, bias = m.make(x.sin()).view(n * 3, 1, 2), m.shift.repeat(n)
        return F.conv1d(x.reshape(1, n, 4), weight, bias, groups=n).view(n, 3, 3).tanh().sum(2)

    return Model(forward, make=nn.Linear(4, 6), shift=nn.Parameter(torch.randn(3)))


@add
def channels_last() -> nn.Module:
    """Weights and images whose entries stand in another order in memory."""
    body = nn.Sequential(
        nn.Conv2d(2, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()
    ).to(memory_format=torch.channels_last)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.body(x.view(-1, 2, 1, 2).contiguous(memory_format=torch.channels_last)))

    return Model(forward, body=body, head=nn.Linear(8, 3))
