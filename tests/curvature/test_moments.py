"""Second moments by halves and in place: Kronecker factors and diagonals as sums over batches, however they lie."""

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    Categorical,
    EmpiricalFisher,
    GGNDiagonal,
    GGNKronecker,
    MonteCarloGGN,
    Parameters,
    accumulate,
)
from lapkit.curvature.jacobians.moments import add_second_moment, mirrored, second_moment
from lapkit.curvature.jacobians.outer_product import OuterProduct


@pytest.mark.parametrize("size", [1, 255, 256, 257, 300, 511])
@pytest.mark.parametrize("more", [-1, 0, 40])
def test_symmetric_products(size, more):
    """From 256 columns on only the upper triangle is multiplied, if there are as many rows."""
    rows = torch.randn(max(size + more, 1), size)
    actual = second_moment(rows[:, None])[0]
    torch.testing.assert_close(actual, rows.T @ rows, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("stripes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 255, 259])
def test_sums_of_symmetric_products_in_any_number_of_stripes(stripes, size):
    """Few rows or many, in two steps; what is left of the stripes comes from the mirror alone."""
    rows, total = torch.randn(300, size), torch.zeros(size, size)
    for part in (rows[:7], rows[7:]):
        add_second_moment(total, part, stripes)
    if size > 255 and stripes > 1:
        assert not total[-1, 0]
    torch.testing.assert_close(mirrored(total, stripes), rows.T @ rows, rtol=1e-11, atol=1e-10)


def wide(weighted):
    """A wide layer, examples with their weights, and the factors of its block written out."""
    model, x, y = nn.Linear(260, 257), torch.randn(300, 260), torch.randint(257, (300,))
    w = torch.rand(300) if weighted else torch.ones(300)
    g = model(x).detach().softmax(-1) - nn.functional.one_hot(y, 257)
    return model, (x, y, w), (x.T * w) @ x / w.sum(), (g.T * w) @ g


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [300, 64])
def test_kronecker_factors_of_a_wide_layer(size, weighted):
    """Both factors are of more than 256 rows, from one batch or several; the bias shares the products of the weight."""
    model, data, A, B = wide(weighted)
    parameters = Parameters.of(model)
    kronecker = GGNKronecker(parameters)
    batches = [parts if weighted else parts[:2] for parts in zip(*(t.split(size) for t in data), strict=True)]
    accumulate(model, parameters, Categorical(), EmpiricalFisher(), batches, [kronecker])
    for result in (kronecker.result(), kronecker.result()):  # reading a sum does not change it
        outputs, inputs = result.factors("weight")
        torch.testing.assert_close(inputs[0], A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outputs[0], B, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(result.factors("bias")[0][0], B, rtol=1e-8, atol=1e-10)


def test_batches_with_and_without_weights_add_up():
    """The first are multiplied into the sum, the others are added to it."""
    model, (x, y, _), A, B = wide(weighted=False)
    parameters = Parameters.of(model)
    kronecker = GGNKronecker(parameters)
    batches = [(x[:100], y[:100]), (x[100:200], y[100:200], torch.ones(100)), (x[200:], y[200:])]
    accumulate(model, parameters, Categorical(), EmpiricalFisher(), batches, [kronecker])
    outputs, inputs = kronecker.result().factors("weight")
    torch.testing.assert_close(inputs[0], A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs[0], B, rtol=1e-8, atol=1e-10)


def test_a_result_stays_when_more_is_added():
    model, (x, y, _), _, _ = wide(weighted=False)
    parameters = Parameters.of(model)
    for quantity in (GGNKronecker(parameters), GGNDiagonal(parameters)):
        accumulate(model, parameters, Categorical(), MonteCarloGGN(), [(x[:9], y[:9])], [quantity])
        before = quantity.result()
        kept = {key: t.clone() for key, t in before.tensors.items()}
        accumulate(model, parameters, Categorical(), MonteCarloGGN(), [(x[9:20], y[9:20])], [quantity])
        assert all(torch.equal(before.tensors[key], t) for key, t in kept.items())


def outer_product(positions, transposed, *, positions_last, groups=2):
    """A Jacobian whose cotangents stand in memory as those of a linear layer, or of a convolution."""
    a = torch.randn(4, positions, groups, 3)
    g = torch.randn(2, 4, positions, groups, 5)
    if positions_last:
        g = g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return OuterProduct(a, g, transposed)


@pytest.mark.parametrize("positions_last", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("positions", [1, 4, 7])
def test_any_order_of_memory(positions, transposed, positions_last):
    jacobian = outer_product(positions, transposed, positions_last=positions_last)
    dense = jacobian.to_dense()
    torch.testing.assert_close(jacobian.square_sum(), dense.square().sum((0, 1)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jacobian.squares(), dense.square().sum(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jacobian.square_norms(), dense.square().sum(-1), rtol=1e-11, atol=1e-11)
    rows = jacobian.g.flatten(0, 2)
    expected = torch.einsum("rgo,rgp->gop", rows, rows)
    torch.testing.assert_close(jacobian.output_moment(), expected, rtol=1e-11, atol=1e-11)
    total = torch.ones(jacobian.shape[2])
    jacobian.add_square_sum(total)
    torch.testing.assert_close(total, 1 + dense.square().sum((0, 1)), rtol=1e-11, atol=1e-11)
