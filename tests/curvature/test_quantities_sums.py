"""Structures of the GGN as sums: in which precision, in whose memory, and what is refused."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
)
from lapkit.curvature.jacobians import jacobian as jacobians_module

STRUCTURES = {"diagonal": GGNDiagonal, "blocks": GGNBlocks, "dense": GGNDense, "kronecker": GGNKronecker}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def fit(model, batches, likelihood, structures=STRUCTURES, **options):
    """Quantities by name after one pass."""
    parameters = Parameters.of(model)
    quantities = {name: STRUCTURES[name](parameters) for name in structures}
    accumulate(model, parameters, likelihood, GGN(), batches, list(quantities.values()), **options)
    return SimpleNamespace(parameters=parameters, **quantities)


def test_large_parameters_without_factors_keep_their_diagonal(monkeypatch):
    monkeypatch.setattr(jacobians_module, "DENSE_LIMIT", 6)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    found = fit(model, [(x[:2], y[:2]), (x[2:], y[2:])], Categorical())
    diagonal = found.diagonal.result().operator().values[28:35]
    close(found.kronecker.result().operator().blocks[1].to_dense(), torch.diag(diagonal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_low_precision_models_are_summed_in_single_precision(structure, dtype):
    """Against the same rounded weights and inputs in float64.

    float32: some 1e-7 an operation. bfloat16: 4e-3 an operation in activations and cotangents; the errors of the
    three layers add up to a few times that, and count twice in a product. Its sums would lose far more: 500 equal
    terms stop growing at 256.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(500, 4).to(dtype), torch.arange(500) % 3
    operator = getattr(
        fit(model, [(x[i : i + 20], y[i : i + 20]) for i in range(0, 500, 20)], Categorical()), structure
    )
    actual = operator.result().operator().to_dense()
    exact = (
        getattr(fit(copy.deepcopy(model).double(), [(x.double(), y)], Categorical()), structure)
        .result()
        .operator()
        .to_dense()
    )
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual).all()
    assert torch.linalg.eigvalsh(actual.double()).min() > -1e-5 * exact.norm()
    assert (actual - exact).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_summed_in_double_precision(dtype):
    model = nn.Linear(4, 3).to(dtype)
    x, y = torch.randn(1000, 4).to(dtype), torch.arange(1000) % 3
    parameters = Parameters.of(model)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    totals = accumulate(model, parameters, Categorical(), GGN(), batches, [GGNDiagonal(parameters)])
    expected = F.cross_entropy(model(x).detach().double(), y, reduction="sum")
    assert totals.loss.dtype == torch.float32
    assert totals.count == 1000
    assert float(totals.loss) == pytest.approx(float(expected), rel=1e-6)


def test_small_losses_are_not_lost_beside_a_large_one():
    """In single precision 1e8 + 1 is 1e8."""
    model = nn.Linear(1, 2, bias=False).float()
    nn.init.constant_(model.weight[:1], 1e8)
    nn.init.zeros_(model.weight[1:])
    x = torch.zeros(401, 1).float()
    x[0] = 1.0
    parameters = Parameters.of(model)
    batches = [(row[None], torch.tensor([1])) for row in x]
    totals = accumulate(model, parameters, Categorical(), GGN(), batches, [GGNDiagonal(parameters)])
    assert float(totals.loss) == pytest.approx(1e8 + 400 * math.log(2), rel=1e-7)


def test_two_fits_do_not_share_memory():
    """What a quantity returned stays as it is when more data come."""
    model, (x, y) = nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    found = fit(model, [(x, y)], Categorical())
    quantities = [getattr(found, name) for name in STRUCTURES]
    results = [quantity.result().operator() for quantity in quantities]
    before = [result.to_dense() for result in results]
    accumulate(model, found.parameters, Categorical(), GGN(), [(x, y)], quantities)
    for result, dense, quantity in zip(results, before, quantities, strict=True):
        close(result.to_dense(), dense)
        close(quantity.result().operator().diagonal().sum(), 2 * dense.diagonal().sum())


def test_a_matrix_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"1000100 weights would take .* GiB.*'kron' or 'diag'"):
        GGNDense(Parameters.of(nn.Linear(10_000, 100, device="meta", dtype=torch.float64).to_empty(device="cpu")))


def test_kronecker_refuses_batches_that_use_a_weight_in_different_ways():
    """A broadcast sum of unlike factors would be a number without meaning."""

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            weight = self.weight if x[0, 0] > 0 else 1.0 * self.weight
            return F.linear(x, weight)

    model, y = Fickle(), torch.tensor([0, 1, 2])
    x = torch.randn(3, 4)
    plus, minus = x.clone(), x.clone()
    plus[0, 0], minus[0, 0] = 1.0, -1.0
    fit(model, [(plus, y), (minus, y)], Categorical(), ["diagonal", "blocks", "dense"])
    with pytest.raises(ValueError, match="'weight' is used in another way"):
        fit(model, [(plus, y), (minus, y)], Categorical(), ["kronecker"])
