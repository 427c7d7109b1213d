"""Kronecker factors in both settings beside those of other libraries."""

import copy

import pytest
import torch
from fitting import fit
from networks.registry import Mean
from torch import nn

from lapkit.curvature import (
    GGNBlocks,
    GGNKronecker,
)

SETTINGS = ["expand", "reduce"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def kronecker(setting):
    return lambda parameters: GGNKronecker(parameters, setting)


@pytest.mark.peer("curvlinops")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["mlp", "sequence", "convolution"])
def test_curvlinops(kind, setting):
    """Their mean loss and theirs of several axes, converted; their separate biases have B of the weight."""
    from curvlinops import KFACLinearOperator

    model, x = {
        "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
        "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(1), nn.Linear(5, 3)), (6, 4)),
        "convolution": (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
            (2, 4, 4),
        ),
    }[kind]
    model, x, y = model(), torch.randn(7, *x), torch.arange(7) % 3
    (result,) = fit(model, [(x[:4], y[:4]), (x[4:], y[4:])], kronecker(setting))
    names = [n for n, _ in model.named_parameters() if "weight" in n]
    theirs = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        [p for n, p in model.named_parameters() if n in names],
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=setting,
        check_deterministic=False,
    )
    dense = torch.as_tensor(theirs @ torch.eye(theirs.shape[1]))
    ours = [torch.kron(*(f[0] for f in result.factors(n))) for n in names]
    close(dense, torch.block_diag(*ours))


@pytest.mark.peer("curvlinops")
def test_curvlinops_loss_of_each_position():
    """A loss of each position: expand, with three terms an example."""
    from curvlinops import KFACLinearOperator

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(5, 6, 4), torch.randint(3, (5, 6))
    (result,) = fit(model, [(x, y)], GGNKronecker)
    names = ["0.weight", "2.weight"]

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).flatten(0, 1)

    theirs = KFACLinearOperator(
        Flat(),
        nn.CrossEntropyLoss(reduction="sum"),
        [model[0].weight, model[2].weight],
        [(x, y.flatten())],
        fisher_type="type-2",
        check_deterministic=False,
        num_data=5,
        num_per_example_loss_terms=6,
    )
    dense = torch.as_tensor(theirs @ torch.eye(theirs.shape[1]))
    close(dense, torch.block_diag(*[torch.kron(*(f[0] for f in result.factors(n))) for n in names]))


@pytest.mark.peer("backpack")
def test_backpacks_convolution_is_neither_setting():
    """Theirs is `T A_expand (x) B_reduce`: T times the trace of neither. Ours is near the exact one."""
    from backpack import backpack, extend, extensions

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    x, y, count = torch.randn(16, 2, 8, 8), torch.arange(16) % 4, 36
    exact, expand, reduce = fit(model, [(x, y)], GGNBlocks, *map(kronecker, SETTINGS))
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(extensions.KFLR()):
        loss(extended(x.clone().requires_grad_()), y).backward()
    b, a = extended[0].weight.kflr
    close(b, reduce.factors("0.weight")[0][0])
    close(a, count * expand.factors("0.weight")[1][0])
    trace = float(exact.operator().blocks[0].trace())
    assert float(b.trace() * a.trace()) > 10 * trace
    assert 0.5 < float(expand.operator().blocks[0].trace()) / trace < 1.5
