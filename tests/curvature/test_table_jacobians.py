"""Jacobians of tables that are looked up, and of tables tied to a product."""

import pytest
import torch

from lapkit.curvature import EmbeddingJacobian, OuterProduct, TiedJacobian


def embedding_jacobian(columns=2, examples=3, positions=5, rows=4, width=2, padding=False):
    index = torch.randint(-1 if padding else 0, rows, (examples, positions))
    return EmbeddingJacobian(index, torch.randn(columns, examples, positions, width), rows)


def one_hot(table):
    """The same as a product with unit vectors."""
    unit = torch.cat([torch.eye(table.rows), torch.zeros(1, table.rows)])  # -1 is the last
    return OuterProduct(unit[table.index].unsqueeze(2), table.g.unsqueeze(3), transposed=True)


def tied_jacobian():
    table = embedding_jacobian(padding=True)
    return TiedJacobian(table, OuterProduct(torch.randn(3, 2, 1, 2), torch.randn(2, 3, 2, 1, 4)))


@pytest.mark.parametrize("padding", [False, True])
def test_an_embedding_is_a_product_with_unit_vectors(padding):
    table = embedding_jacobian(padding=padding)
    product = one_hot(table)
    torch.testing.assert_close(table.to_dense(), product.to_dense())
    kept = (table.index >= 0)[..., None]
    torch.testing.assert_close(table.output_moment(), one_hot_moment(table.g * kept))
    counts, number = table.input_moment()
    expected, _ = product.input_moment()
    torch.testing.assert_close(torch.diag_embed(counts), expected)
    assert number == int(kept.sum())


def one_hot_moment(g):
    return torch.einsum("kntd,knte->de", g, g)[None]


@pytest.mark.parametrize("make", [embedding_jacobian, tied_jacobian])
def test_columns_of_a_table_are_rotated(make):
    jacobian = make()
    basis = torch.randn(1, 2, 2)
    rotated = jacobian.rotate(None, basis)
    assert type(rotated) is type(jacobian)
    expected = jacobian.to_dense() @ torch.kron(torch.eye(4), basis[0])
    torch.testing.assert_close(rotated.to_dense(), expected)


def test_no_vocabulary_squared():
    """A table of a million entries, tied to the head: nothing of V x V or (K, N, V D) is made."""
    rows, width = 2**17, 8
    index = torch.randint(rows, (2, 3))
    table = EmbeddingJacobian(index, torch.randn(1, 2, 3, width), rows)
    tied = TiedJacobian(table, OuterProduct(torch.randn(2, 1, 1, width), torch.randn(1, 2, 1, 1, rows)))
    for jacobian in (table, tied):
        product = jacobian.rotate(None, torch.eye(width)[None])
        assert product.weighted_gram(torch.ones(rows * width)).shape == (2, 1, 1)
        assert jacobian.square_sum().shape == (rows * width,)
        assert jacobian.gram().shape == (1, 2, 1, 2)
        assert jacobian.output_moment().numel() <= rows + width**2
        assert jacobian.input_moment()[0].shape == (1, rows)


def test_tied_block_keeps_the_trace_of_both_uses():
    """With one position for each use and none in common, row sums and the trace are those of the exact block."""
    table = EmbeddingJacobian(torch.tensor([[0], [1], [3]]), torch.randn(2, 3, 1, 2), 4)
    product = OuterProduct(torch.randn(3, 1, 1, 2), torch.randn(2, 3, 1, 1, 4))
    product.g[:, torch.arange(3), 0, 0, table.index[:, 0]] = 0  # no row in common
    tied = TiedJacobian(table, product)
    packed = tied.output_moment()[0]
    exact = tied.block().view(4, 2, 4, 2)
    torch.testing.assert_close(packed[:4].view(2, 2), torch.einsum("vdve->de", exact))
    torch.testing.assert_close(packed[4:], torch.einsum("vdvd->v", exact))
