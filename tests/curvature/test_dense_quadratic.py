"""`J A^{-1} J^T` of a full matrix by either route, and the inverse of its Cholesky factor, against dense algebra."""

import pytest
import torch

from lapkit.curvature import Dense, OuterProduct
from lapkit.curvature.jacobians.conversion import converted
from lapkit.curvature.jacobians.jacobian import DenseJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.operators import dense, triangular
from lapkit.curvature.operators.triangular import inverse_of_lower


@pytest.mark.parametrize("size", [1, 2, 5, 64, 257])
@pytest.mark.parametrize("leaf", [1, 3, 256])
def test_the_inverse_of_a_triangular_matrix(size, leaf, monkeypatch):
    monkeypatch.setattr(triangular, "LEAF", leaf)
    lower = torch.randn(size, size).tril(-1) / size**0.5 + torch.diag(1 + torch.rand(size))
    kept = lower.clone()
    for given in (lower, lower.T.contiguous().T, lower + torch.randn(size, size).triu(1)):  # above it is not read
        found = inverse_of_lower(given)
        torch.testing.assert_close(found @ lower, torch.eye(size))
        assert torch.equal(found, found.tril())
    assert torch.equal(lower, kept)


def jacobian(columns, examples, positions=1):
    """Of a weight `(4, 3)` stored either way and a bias of 4, with general cotangents."""
    g, a = torch.randn(columns, examples, positions, 1, 4), torch.randn(examples, positions, 1, 3)
    transposed = OuterProduct(torch.randn(examples, 2, 1, 5), torch.randn(columns, examples, 2, 1, 2), transposed=True)
    return NetworkJacobian((OuterProduct(a, g), DenseJacobian(g.sum((2, 3))), transposed))


def precision(size):
    root = torch.randn(size, size)
    return root @ root.T + torch.eye(size)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("examples", [1, 2, 9])
@pytest.mark.parametrize("near", [1, 10**9])
@pytest.mark.parametrize("few", [0, 10**9])
def test_both_routes_are_dense_algebra(positions, examples, near, few, monkeypatch):
    monkeypatch.setattr(dense, "NEAR", near)
    monkeypatch.setattr(dense, "FEW", few)
    J = jacobian(3, examples, positions)
    matrix = precision(J.shape[2])
    operator = Dense(matrix)
    rows = J.to_dense()
    expected = torch.einsum("knp,pq,lnq->nkl", rows, matrix.inverse(), rows)
    torch.testing.assert_close(operator.inverse_quadratic(J), expected)
    assert ("inverse_cholesky" in vars(operator)) == (few > 0)


@pytest.mark.parametrize("few", [0, 4, 10**9])
def test_the_derivative_in_the_matrix(few, monkeypatch):
    monkeypatch.setattr(dense, "FEW", few)
    J, matrix = jacobian(3, 5), precision(26)
    rows = J.to_dense()
    shift = torch.tensor(0.7, requires_grad=True)
    (found,) = torch.autograd.grad(Dense(matrix).shift(shift).inverse_quadratic(J).sum(), shift)
    inverse = (matrix + 0.7 * torch.eye(26)).inverse()
    torch.testing.assert_close(found, -torch.einsum("knp,pq,lnq->nkl", rows, inverse @ inverse, rows).sum())


def test_few_rows_are_solved_for_until_the_inverse_is_there():
    operator = Dense(precision(26))
    one, many = jacobian(1, 1), jacobian(3, 9)
    alone = operator.inverse_quadratic(one)
    assert "inverse_cholesky" not in vars(operator)
    operator.inverse_quadratic(many)
    assert "inverse_cholesky" in vars(operator)
    torch.testing.assert_close(operator.inverse_quadratic(one), alone)


def test_a_variance_stays_positive_where_few_digits_are_left():
    """In float32 `J A^{-1} J^T` from the inverse itself would be rounding here, of either sign."""
    J = jacobian(3, 20)
    rows = J.to_dense().flatten(0, 1)
    matrix = 1e5 * rows.T @ rows + 1e-1 * torch.eye(26)
    single = NetworkJacobian(tuple(converted(part, torch.float32) for part in J.parts))
    found = Dense(matrix.float()).inverse_quadratic(single)
    expected = torch.einsum("knp,pq,lnq->nkl", J.to_dense(), matrix.inverse(), J.to_dense())
    assert (found.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
