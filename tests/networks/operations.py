"""Recomputation, changes in place, and operations of one's own."""

from __future__ import annotations

from typing import Any

import torch
from networks.registry import Model, add, layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


@add
def checkpointed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(lambda z: m.one(z).tanh(), x, use_reentrant=False)
        return m.two(checkpoint(lambda z: m.middle(z).sigmoid(), h, use_reentrant=False))

    return Model(forward, one=nn.Linear(4, 5), middle=nn.Linear(5, 5), two=nn.Linear(5, 3))


@add
def checkpointed_in_segments() -> nn.Module:
    body = layers(nn.Linear(5, 5), nn.Tanh())
    return Model(lambda m, x: checkpoint_sequential(m.body, 2, x, use_reentrant=False), body=body)


@add
def checkpointed_convolutions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(m.conv, x.view(-1, 1, 2, 2), use_reentrant=False)
        return m.head(h.flatten(1))

    conv = nn.Sequential(nn.Conv2d(1, 2, 2, padding=1), nn.GroupNorm(1, 2), nn.GELU())
    return Model(forward, conv=conv, head=nn.Linear(18, 3))


@add
def in_place_activations() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 5),
        nn.SiLU(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(5, 5),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Linear(5, 3),
        nn.ELU(inplace=True),
    )


@add
def in_place_sums() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x)
        h += m.shift
        h.mul_(m.scale)
        h[:, 1:3] *= 0.5
        return m.two(h.tanh_()).add_(m.two.bias)

    members = {"shift": nn.Parameter(torch.randn(5)), "scale": nn.Parameter(torch.randn(5))}
    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3), **members)


@add
def filled_buffer() -> nn.Module:
    """Outputs are written one after the other into a tensor that was there before."""

    def forward(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 3)
        for c, head in enumerate(m.heads):
            out[:, c] = head(m.one(x).tanh())[:, 0]
        return out

    return Model(forward, one=nn.Linear(4, 5), heads=nn.ModuleList([nn.Linear(5, 1) for _ in range(3)]))


class Once(torch.autograd.Function):
    """A function whose backward pass says that it cannot be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class SplitAffine(torch.autograd.Function):
    """Two outputs, of which the second may not be used, and two parameters among the operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w.T + b, x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w + 2 * x * h, g.T @ x, g.sum(0)


@add
def custom_once_differentiable() -> nn.Module:
    return Model(lambda m, x: m.two(Once.apply(m.one(x))), one=nn.Linear(4, 5), two=nn.Linear(5, 3))


@add
def custom_with_several_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, square = SplitAffine.apply(m.one(x).tanh(), m.w, m.b)
        return m.two(torch.cat([one.tanh(), square], 1))

    members = {"w": nn.Parameter(torch.randn(2, 5)), "b": nn.Parameter(torch.randn(2))}
    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(7, 3), **members)


@add
def custom_with_an_unused_output() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(SplitAffine.apply(m.one(x).tanh(), m.w, m.b)[0].tanh())

    members = {"w": nn.Parameter(torch.randn(2, 5)), "b": nn.Parameter(torch.randn(2))}
    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(2, 3), **members)


@add
def complex_numbers() -> nn.Module:
    """A long convolution by Fourier transform, filter learned in time."""

    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(m.one(x), n=8) * torch.fft.rfft(m.filter, n=8)
        return m.two(torch.fft.irfft(spectrum, n=8)[:, :5].tanh())

    return Model(forward, one=nn.Linear(4, 5), filter=nn.Parameter(torch.randn(5)), two=nn.Linear(5, 3))


@add
def complex_weights() -> nn.Module:
    """A Fourier layer: real pairs of numbers viewed as complex weights."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(torch.fft.irfft(torch.fft.rfft(m.one(x)) * torch.view_as_complex(m.weight), n=5).tanh())

    return Model(forward, one=nn.Linear(4, 5), weight=nn.Parameter(torch.randn(3, 2)), two=nn.Linear(5, 3))


@add
def mixture_of_experts_of_every_kind() -> nn.Module:
    """Dense gates, and the best expert alone; the choice has no derivative, its weight has."""

    def forward(m: Any, x: Tensor) -> Tensor:
        gate = m.gate(x).softmax(-1)
        best, index = gate.max(-1)
        h = torch.einsum("noi,ni->no", m.experts[index], x) * best[:, None]
        return m.head(h.tanh()) + torch.einsum("ne,eoi,ni->no", gate, m.experts[:, :3], x)

    experts = nn.Parameter(torch.randn(3, 5, 4))
    return Model(forward, gate=nn.Linear(4, 3), experts=experts, head=nn.Linear(5, 3))
