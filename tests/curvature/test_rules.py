"""Every closed form: that it is taken, and that it equals the exact local path and plain autograd."""

from collections import Counter

import pytest
import torch
from rule_cases.catalogue import CASES
from torch import nn

from lapkit.curvature import DenseJacobian, Engine, Parameters, borrowed

N = 3

# Operations that the CPU has in float32 or bfloat16 only: tolerances against autograd and the local path.
COARSE = {"half_precision_inside": (3e-2, 3e-2), "experts_of_sorted_tokens": (1e-4, 1e-4)}


def of(name):
    build, taken = CASES[name]
    torch.manual_seed(0)
    model, inputs = build()
    return model.eval(), inputs(N), +taken


def both_ways(model, x):
    """The names of the nodes with closed forms, and the Jacobian with and without them."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        backprop = Engine(model, parameters)(x)
        taken = Counter(use.node.name() for use, rule in backprop.rules.items() if rule is not None)
        closed = backprop.jacobian()
        backprop.rules = dict.fromkeys(backprop.rules)
        return taken, closed, backprop.jacobian()


@pytest.mark.parametrize("name", CASES)
def test_closed_form(name, slow_jacobian):
    model, x, taken = of(name)
    found, closed, local = both_ways(model, x)
    assert found == taken
    close, closest = COARSE.get(name, (1e-8, 1e-12))
    torch.testing.assert_close(closed.to_dense(), local.to_dense(), rtol=closest, atol=closest)
    slow = slow_jacobian(model, x).movedim(1, 0)
    torch.testing.assert_close(closed.to_dense(), slow, rtol=close, atol=close)


@pytest.mark.parametrize("name", sorted({*CASES} - {*COARSE}))
@pytest.mark.parametrize("budget", [1, 2**28])
def test_algebra_of_what_the_rules_return(name, budget):
    """Each method of each parameter's Jacobian against the expanded form."""
    model, x, _ = of(name)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        _, jacobian = Engine(model, parameters, memory_budget=budget).jacobian(x)
    for part in jacobian.parts:
        dense = DenseJacobian(part.to_dense())
        columns, examples, size = part.shape
        weights, vectors, cotangent = torch.randn(size), torch.randn(size, 2), torch.randn(columns, examples)
        for method, *arguments in (
            ("square_sum",),
            ("square_norms",),
            ("squares",),
            ("weighted_gram", weights),
            ("gram",),
            ("project", vectors),
            ("pull_back", cotangent),
            ("block",),
        ):
            actual, expected = (getattr(j, method)(*arguments) for j in (part, dense))
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        (whole,) = part.split([size])
        torch.testing.assert_close(whole.to_dense(), dense.values)


def test_frequencies_are_refused():
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 3))
    parameters = Parameters.of(model)
    with borrowed(model, parameters), pytest.raises(ValueError, match="scale_grad_by_freq"):
        Engine(model, parameters)(torch.tensor([[0, 1], [1, 1], [2, 0]]))


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))
    other = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    other.load_state_dict(model.state_dict())
    x = torch.randint(5, (N, 2))
    found = []
    for m in (model, other):
        parameters = Parameters.of(m)
        with borrowed(m, parameters):
            found.append(Engine(m, parameters).jacobian(x)[1].to_dense())
    torch.testing.assert_close(*found)
