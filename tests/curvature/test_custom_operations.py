"""Operations of the user's own, and those that torch cannot map over columns: right in the end, and said once."""

import numpy as np
import pytest
import torch
from networks.registry import Model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapkit.curvature import Engine, Parameters, borrowed


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def dense(engine, x):
    """The engine's Jacobian, (N, C, P)."""
    return engine.jacobian(x)[1].to_dense().transpose(0, 1)


class Cube(torch.autograd.Function):
    """An operation without a rule for vmap, but made of operations that have one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].square() * g


class ForeignCube(Cube):
    """One whose backward is computed by another library, as a compiled kernel would be."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(3 * np.square(ctx.saved_tensors[0].numpy()) * g.numpy())


class ScaledBy(torch.autograd.Function):
    """A custom operation that takes the parameter itself."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def with_layers(function, **members):
    """A model with two linear layers and whatever else the function wants."""
    return Model(function, one=nn.Linear(3, 4), two=nn.Linear(4, 2), **members)


def checkpointed(m, x):
    return m.two(checkpoint(lambda z: m.one(z).tanh(), x, use_reentrant=False))


class Blind(torch.autograd.Function):
    """Passes nothing back, which autograd knows before it computes anything."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


CUSTOM = {
    "a parameter without a gradient": lambda: with_layers(
        lambda m, x: m.two(Blind.apply(m.one(x))) + m.three(x).sin(), three=nn.Linear(3, 2)
    ),
    "several operations without a gradient": lambda: with_layers(
        lambda m, x: m.two(Blind.apply(m.one(x).sin() * m.w)) + m.three(x),
        three=nn.Linear(3, 2),
        w=nn.Parameter(torch.ones(4)),
    ),
    "one of two uses without a gradient": lambda: with_layers(
        lambda m, x: m.two(m.one(x).sin() + Blind.apply(m.one(x.flip(1))))
    ),
    "custom function": lambda: with_layers(lambda m, x: m.two(Cube.apply(m.one(x)))),
    "custom function of a parameter": lambda: with_layers(
        lambda m, x: m.two(ScaledBy.apply(m.one(x), m.w)), w=nn.Parameter(torch.randn(4))
    ),
    "checkpointed": lambda: with_layers(checkpointed),
}

# Differentiated wrongly, or not at all, by torch.func.vmap: columns must go one by one, and a warning says so.
UNBATCHABLE = {
    "backward outside torch": lambda: with_layers(lambda m, x: m.two(ForeignCube.apply(m.one(x)))),
    "cdist to parameters": lambda: Model(
        lambda m, x: -torch.cdist(m.one(x), m.w), one=nn.Linear(3, 4), w=nn.Parameter(torch.randn(5, 4))
    ),
    "cdist to as many as features": lambda: Model(
        lambda m, x: -torch.cdist(m.one(x), m.w), one=nn.Linear(3, 3), w=nn.Parameter(torch.randn(3, 3))
    ),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_custom_operations(case, slow_jacobian):
    model, x = CUSTOM[case](), torch.randn(4, 3)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        close(dense(Engine(model, parameters), x), slow_jacobian(model, x))


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("case", UNBATCHABLE)
def test_operations_that_vmap_gets_wrong_end_right_and_warn_once(case, examples, slow_jacobian):
    model, x = UNBATCHABLE[case](), torch.randn(examples, 3)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        with pytest.warns(UserWarning, match="one by one"):
            close(dense(engine, x), slow_jacobian(model, x))
        x = torch.randn(examples, 3)
        close(dense(engine, x), slow_jacobian(model, x))  # remembered: any further warning is an error here


def test_a_vmap_that_is_wrong_for_later_columns_only_is_noticed(slow_jacobian, monkeypatch):
    vmap = torch.func.vmap

    def broken(function):
        return lambda columns: tuple(g.index_fill(0, torch.arange(1, len(g)), 0.0) for g in vmap(function)(columns))

    monkeypatch.setattr(torch.func, "vmap", broken)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    parameters = Parameters.of(model)
    with borrowed(model, parameters), pytest.warns(UserWarning, match="one by one"):
        close(dense(Engine(model, parameters), x), slow_jacobian(model, x))
