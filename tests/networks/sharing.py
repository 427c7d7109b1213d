"""Networks of which parts are frozen, and networks in which a parameter meets the data several times."""

from __future__ import annotations

from typing import Any

import torch
from networks.registry import Model, add, layers
from torch import Tensor, nn


@add
def frozen_body() -> nn.Module:
    model = layers(nn.Linear(5, 5))
    model[:3].requires_grad_(False)
    return model


@add
def frozen_head() -> nn.Module:
    model = layers(nn.Linear(5, 5))
    model[-1].requires_grad_(False)
    return model


@add
def biases_only() -> nn.Module:
    model = layers(nn.Linear(5, 5), nn.LayerNorm(5))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


@add
def norms_only() -> nn.Module:
    model = layers(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.BatchNorm1d(5))
    for module in model:
        module.requires_grad_(isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)))
    return model


@add
def one_weight_in_the_middle() -> nn.Module:
    model = layers(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).requires_grad_(False)
    model[2].weight.requires_grad_(True)
    return model


@add
def one_block_run_three_times() -> nn.Module:
    block = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())
    return layers(block, block, block)


@add
def block_with_attention_run_three_times() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.enter(x.unflatten(1, (2, 2)))
        for _ in range(3):
            h = m.block(h)
        return m.head(h.mean(1))

    block = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    return Model(forward, enter=nn.Linear(2, 4), block=block, head=nn.Linear(4, 3))


@add
def siamese() -> nn.Module:
    """The same body on two halves of the input."""
    body = nn.Sequential(nn.Linear(2, 5), nn.Tanh())
    return Model(lambda m, x: m.head(m.body(x[:, :2]) * m.body(x[:, 2:])), body=body, head=nn.Linear(5, 3))


@add
def siamese_in_one_batch() -> nn.Module:
    """The same, both halves stacked along the batch axis."""

    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = m.body(torch.cat([x[:, :2], x[:, 2:]])).chunk(2)
        return m.head(one * two)

    return Model(forward, body=nn.Sequential(nn.Linear(2, 5), nn.Tanh()), head=nn.Linear(5, 3))


@add
def weight_used_plain_and_transposed() -> nn.Module:
    return Model(lambda m, x: m.head((x @ m.w).tanh() @ m.w.T), w=nn.Parameter(torch.randn(4, 5)), head=nn.Linear(4, 3))


@add
def weight_that_is_also_a_regulariser() -> nn.Module:
    """Used on the data and, without it, as a number that scales the outputs."""
    return Model(
        lambda m, x: m.two(m.one(x).tanh()) * m.one.weight.square().sum(), one=nn.Linear(4, 5), two=nn.Linear(5, 3)
    )


@add
def parameter_without_data() -> nn.Module:
    """The outputs' shift goes through a layer that no example enters."""
    return Model(lambda m, x: m.one(x) + m.shift(torch.ones(2)), one=nn.Linear(4, 3), shift=nn.Linear(2, 3, bias=False))
