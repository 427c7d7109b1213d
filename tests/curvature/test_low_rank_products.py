"""Matrices of low rank from products alone, against eigenvectors of the dense matrix."""

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    Categorical,
    Dense,
    GGNDense,
    GGNProduct,
    HessianProduct,
    Parameters,
    compute,
    low_rank_from_products,
)


def matrix_with(values):
    basis = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    return basis * values @ basis.T


def nearest(matrix, rank):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T, values.flip(0)[:rank]


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


DECAYING = 0.6 ** torch.arange(60.0, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_lanczos_finds_the_nearest(rank):
    matrix = matrix_with(DECAYING)
    found = low_rank_from_products(Dense(matrix), rank, trace=matrix.trace())
    expected, values = nearest(matrix, rank)
    close(found.operator.to_dense(), expected)
    close(found.values, values)
    assert found.dropped == pytest.approx(float(1 - values.sum() / DECAYING.sum()))
    gram = found.operator.columns.T @ found.operator.columns
    close(gram, torch.diag(values))


def test_a_sketch_comes_close_and_closer():
    """From below, and exact if it holds the whole range."""
    matrix = matrix_with(DECAYING)
    expected, values = nearest(matrix, 5)
    errors = []
    for passes in (1, 2, 4):
        found = low_rank_from_products(
            Dense(matrix), 5, method="randomised", passes=passes, generator=torch.Generator().manual_seed(0)
        )
        errors.append(float((found.operator.to_dense() - expected).norm()))
        assert float(torch.linalg.eigvalsh(matrix - found.operator.to_dense()).min()) > -1e-12
        assert (found.values <= values + 1e-12).all()
    assert 0.1 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    low = matrix_with(torch.cat([DECAYING[:8], torch.zeros(52)]))
    close(low_rank_from_products(Dense(low), 8, method="randomised").operator.to_dense(), low)
    whole = low_rank_from_products(Dense(matrix), 60, method="randomised", passes=1, trace=matrix.trace())
    close(whole.operator.to_dense(), matrix)
    assert whole.dropped < 1e-10


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_curvature_of_a_data_set(method):
    """A loader of batches; the sketch takes as many passes over the data as it is told."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(10, 5), torch.arange(10) % 3
    data = [(x[:6], y[:6]), (x[6:], y[6:])]
    matrix = compute(model, Categorical(), data, {"H": GGNDense})["H"].operator().matrix
    product = GGNProduct(model, Categorical(), data, parameters=Parameters.of(model))
    expected, values = nearest(matrix, 4)
    found = low_rank_from_products(product, 4, method=method, passes=30, trace=matrix.trace())
    close(found.operator.to_dense(), expected, 1e-6)
    close(found.values, values, 1e-6)
    assert found.dropped == pytest.approx(float(1 - values.sum() / matrix.trace()), abs=1e-6)


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_the_same_generator_gives_the_same(method):
    matrix = Dense(matrix_with(DECAYING))
    one, two = (
        low_rank_from_products(matrix, 3, method=method, passes=1, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(one.operator.columns, two.operator.columns)


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_single_precision(method):
    matrix = matrix_with(DECAYING)
    found = low_rank_from_products(Dense(matrix.float()), 5, method=method, passes=4)
    assert found.operator.dtype == torch.float32
    close(found.operator.to_dense().double(), nearest(matrix, 5)[0], 1e-5)


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_zero_has_a_root(method):
    found = low_rank_from_products(Dense(torch.zeros(6, 6)), 2, method=method, trace=0.0)
    assert not found.operator.to_dense().any()
    assert found.dropped == 0


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_refusals(method):
    matrix = Dense(matrix_with(DECAYING))
    for rank in (0, 61):
        with pytest.raises(ValueError, match=f"rank of {rank} of a matrix with 60 rows"):
            low_rank_from_products(matrix, rank, method=method)
    with pytest.raises(ValueError, match=r"no negative eigenvalue.*GGNProduct"):
        low_rank_from_products(Dense(matrix_with(torch.linspace(-58, 1, 60))), 3, method=method)
    with pytest.raises(ValueError, match="Unknown method 'svd'"):
        low_rank_from_products(matrix, 3, method="svd")
    with pytest.raises(ValueError, match="passes=0"):
        low_rank_from_products(matrix, 3, method="randomised", passes=0)


def test_an_indefinite_hessian_is_refused_by_the_sketch():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randn(10, 5), torch.arange(10) % 3)]
    product = HessianProduct(model, Categorical(), data, parameters=Parameters.of(model))
    with pytest.raises(ValueError, match="no negative eigenvalue"):
        low_rank_from_products(product, 30, method="randomised")
