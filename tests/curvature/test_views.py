"""Curvature in the hands of `linear_operator` and `scipy`: their solvers find what dense algebra finds."""

import numpy as np
import pytest
import reference_problem as ref
import scipy.sparse.linalg
import torch

from lapkit.curvature import (
    BlockDiagonal,
    Categorical,
    Dense,
    Diagonal,
    GGNProduct,
    HessianProduct,
    Kronecker,
    KroneckerProduct,
    linear_operator_view,
    scipy_view,
)
from lapkit.curvature.operators.low_rank import LowRank

DATA = [(ref.inputs()[:4], ref.labels()[:4]), (ref.inputs()[4:], ref.labels()[4:])]


def psd(*shape):
    root = torch.randn(*shape, shape[-1])
    return root @ root.mT


def product(kind=GGNProduct):
    return kind(ref.model(), Categorical(), DATA)


def blocks():
    kinds = ("diagonal", "dense", "kronecker product", "kronecker product in groups", "kronecker", "low rank")
    return BlockDiagonal(tuple(MATRICES[kind]() for kind in kinds))


MATRICES = {
    "diagonal": lambda: Diagonal(torch.rand(6)),
    "dense": lambda: Dense(psd(6)),
    "kronecker product": lambda: KroneckerProduct(psd(1, 2), psd(1, 3)),
    "kronecker product in groups": lambda: KroneckerProduct(psd(2, 2), psd(2, 3)),
    "diagonal times a matrix": lambda: KroneckerProduct(torch.rand(1, 2), psd(1, 3)),
    "diagonals times matrices": lambda: KroneckerProduct(torch.rand(2, 2), psd(2, 3)),
    "kronecker": lambda: Kronecker.from_factors(psd(2, 2), psd(2, 3)),
    "low rank": lambda: LowRank(torch.randn(6, 2)),
    "blocks": blocks,
    "blocks of blocks": lambda: BlockDiagonal((blocks(), Dense(psd(4)))),
    "ggn": product,
}
# `linear_operator` has its own forms of these
NATIVE = {
    "diagonal": "DiagLinearOperator",
    "dense": "DenseLinearOperator",
    "kronecker product": "KroneckerProductLinearOperator",
}


@pytest.fixture(params=MATRICES)
def case(request):
    """A matrix, its view and the matrix in full."""
    matrix = MATRICES[request.param]()
    return matrix, linear_operator_view(matrix), matrix.to_dense()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_products_and_entries(case):
    _, view, dense = case
    vectors = torch.randn(len(dense), 3)
    assert view.shape == dense.shape
    assert (view.dtype, view.device) == (dense.dtype, dense.device)
    close(view @ vectors, dense @ vectors)
    close(view @ vectors[:, 0], dense @ vectors[:, 0])
    batch = torch.randn(2, len(dense), 3)
    close(view @ batch, dense @ batch)
    close(view.to_dense(), dense)
    close(view.diagonal(dim1=-2, dim2=-1), dense.diagonal())
    close(view.mT @ vectors, dense.T @ vectors)
    close((view * 2.0) @ vectors, 2 * dense @ vectors)


@pytest.mark.parametrize("constant", [True, False])
def test_solves_and_determinants(case, constant):
    _, view, dense = case
    delta = torch.tensor(0.7) if constant else torch.rand(len(dense)) + 0.5
    full = dense + delta * torch.eye(len(dense))
    shifted = view.add_diagonal(delta)
    vectors = torch.randn(len(dense), 3)
    close(shifted.to_dense(), full)
    close(shifted.solve(vectors), torch.linalg.solve(full, vectors))
    close(shifted.solve(vectors[:, 0]), torch.linalg.solve(full, vectors[:, 0]))
    close(shifted.logdet(), torch.logdet(full))
    quadratic, logdet = shifted.inv_quad_logdet(vectors, logdet=True)
    close(quadratic, (vectors * torch.linalg.solve(full, vectors)).sum())
    close(logdet, torch.logdet(full))
    twice = shifted.add_diagonal(torch.tensor(0.3))
    close(twice.solve(vectors), torch.linalg.solve(full + 0.3 * torch.eye(len(dense)), vectors))


def test_sampling(case):
    _, view, dense = case
    full = dense + 0.7 * torch.eye(len(dense))
    samples = view.add_diagonal(torch.tensor(0.7)).zero_mean_mvn_samples(4000)
    assert samples.shape == (4000, len(dense))
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(full), samples.T, upper=False)
    assert float((whitened @ whitened.T / 4000 - torch.eye(len(dense))).abs().max()) < 0.15


@pytest.mark.parametrize("name", NATIVE)
def test_structures_that_the_library_has(name):
    assert type(linear_operator_view(MATRICES[name]())).__name__ == NATIVE[name]


@pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning")
def test_conjugate_gradients_without_a_matrix():
    """As for many weights: no Cholesky factor, and no diagonal, which would take P products."""
    import linear_operator

    matrix = Dense(psd(59) / 59)
    full = matrix.to_dense() + 2.0 * torch.eye(59)
    widths = []

    class Counted:
        size, dtype, device = matrix.size, matrix.dtype, matrix.device

        def matmul(self, vectors):
            widths.append(vectors[0].numel())
            return matrix.matmul(vectors)

    shifted = linear_operator_view(Counted()).add_diagonal(torch.tensor(1.5)).add_diagonal(torch.tensor(0.5))
    vectors = torch.randn(59, 2)
    settings = linear_operator.settings
    fast = settings.fast_computations(True, True, True)  # which botorch turns off where it is imported
    with fast, settings.max_cholesky_size(1), settings.cg_tolerance(1e-8), settings.min_preconditioning_size(1):
        torch.testing.assert_close(shifted.solve(vectors), torch.linalg.solve(full, vectors), rtol=1e-5, atol=1e-5)
        assert max(widths) <= 2
        with settings.num_trace_samples(100):
            _, logdet = shifted.inv_quad_logdet(vectors, logdet=True)
    assert float(logdet) == pytest.approx(float(torch.logdet(full)), rel=0.05)


def test_gpytorch_distribution():
    gpytorch = pytest.importorskip("gpytorch")
    matrix = product()
    covariance = linear_operator_view(matrix).add_diagonal(torch.tensor(1.0))
    normal = gpytorch.distributions.MultivariateNormal(torch.zeros(matrix.size), covariance)
    plain = torch.distributions.MultivariateNormal(torch.zeros(matrix.size), covariance.to_dense())
    x = torch.randn(matrix.size)
    close(normal.log_prob(x), plain.log_prob(x))


def test_derivative_of_the_determinant():
    """In the shift, through the structures that have closed forms."""
    for name in ("kronecker", "low rank", "kronecker product", "blocks"):
        matrix = MATRICES[name]()
        delta = torch.tensor(0.7, requires_grad=True)
        (found,) = torch.autograd.grad(linear_operator_view(matrix).add_diagonal(delta).logdet(), delta)
        close(found, torch.linalg.inv(matrix.to_dense() + 0.7 * torch.eye(matrix.size)).trace())


def test_scipy_products(case):
    matrix, _, dense = case
    view, vectors = scipy_view(matrix), np.random.default_rng(0).standard_normal((len(dense), 3))
    assert (view.shape, view.dtype) == (dense.shape, np.float64)
    expected = dense.numpy() @ vectors
    for found in (view @ vectors, view.T @ vectors, view.H @ vectors, view.rmatmat(vectors)):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    column = np.asfortranarray(vectors)[::-1][::-1, :1]
    column.flags.writeable = False
    np.testing.assert_allclose(view @ column, expected[:, :1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(view @ vectors[:, 0], expected[:, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose((2 * view + view) @ vectors, 3 * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["cg", "minres", "gmres"])
def test_scipy_solvers(solver):
    matrix = product(HessianProduct if solver == "minres" else GGNProduct)
    dense = matrix.to_dense().numpy() + 0.5 * np.eye(matrix.size)
    operator = scipy_view(matrix) + 0.5 * scipy.sparse.linalg.aslinearoperator(np.eye(matrix.size))
    right = np.cos(np.arange(matrix.size))
    solution, failed = getattr(scipy.sparse.linalg, solver)(operator, right, rtol=1e-12)
    assert failed == 0
    np.testing.assert_allclose(solution, np.linalg.solve(dense, right), rtol=1e-7, atol=1e-7)


def test_scipy_eigenvalues():
    matrix = MATRICES["blocks"]()
    found = scipy.sparse.linalg.eigsh(scipy_view(matrix), 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix.to_dense().numpy())[-2:], rtol=1e-9)


def test_scipy_keeps_the_type_of_the_model():
    view = scipy_view(Diagonal(torch.tensor([0.1, 0.2], dtype=torch.float32)))
    found = view @ np.ones(2)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [0.1, 0.2], rtol=1e-7)
