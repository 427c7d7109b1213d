"""Networks in which the weight that multiplies is computed from the one that is trained."""

from __future__ import annotations

from typing import Any

import torch
from networks.registry import Model, add, layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


@add
def weight_norm() -> nn.Module:
    return layers(parametrizations.weight_norm(nn.Linear(5, 5), dim=0))


@add
def weight_norm_over_all_axes() -> nn.Module:
    return layers(parametrizations.weight_norm(nn.Linear(5, 5), dim=None))


@add
def weight_normed_convolution() -> nn.Module:
    conv = parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    return nn.Sequential(nn.Unflatten(1, (2, 2)), conv, nn.Tanh(), nn.Flatten(), nn.Linear(3, 3))


@add
def spectral_norm() -> nn.Module:
    """In eval mode the singular vectors are buffers and stand still."""
    return layers(parametrizations.spectral_norm(nn.Linear(5, 5)))


@add
def orthogonal_by_cayley() -> nn.Module:
    return layers(parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"))


@add
def orthogonal_by_householder() -> nn.Module:
    return layers(parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="householder"))


@add
def pruned() -> nn.Module:
    model = layers(nn.Linear(5, 5))
    prune.random_unstructured(model[2], "weight", 0.4)
    return model


@add
def standardised_weight() -> nn.Module:
    """Weights with mean zero and norm one, as weight standardisation has them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.one.weight - m.one.weight.mean(1, keepdim=True)
        return m.two(F.linear(x, w / w.norm(dim=1, keepdim=True), m.one.bias).tanh())

    return Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3))


@add
def symmetric_weight() -> nn.Module:
    return Model(lambda m, x: m.two((x @ (m.w + m.w.T)).tanh()), w=nn.Parameter(torch.randn(4, 4)), two=nn.Linear(4, 3))


@add
def hypernetwork() -> nn.Module:
    """The weight that multiplies comes out of another network."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.linear(x, m.make(m.code).view(5, 4)).tanh())

    return Model(forward, make=nn.Linear(2, 20), code=nn.Parameter(torch.randn(2)), head=nn.Linear(5, 3))


@add
def example_wise_hypernetwork() -> nn.Module:
    """Each example makes a weight of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.einsum("noi,ni->no", m.make(x).unflatten(1, (5, 4)), x).tanh())

    return Model(forward, make=nn.Linear(4, 20), head=nn.Linear(5, 3))


@add
def merged_adapter() -> nn.Module:
    """`W + B A`, multiplied once; W is frozen."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(F.linear(x, m.one.weight + 2.0 * m.b @ m.a, m.one.bias).tanh())

    model = Model(
        forward,
        one=nn.Linear(4, 5),
        two=nn.Linear(5, 3),
        a=nn.Parameter(torch.randn(2, 4)),
        b=nn.Parameter(torch.randn(5, 2)),
    )
    model.one.requires_grad_(False)
    return model
