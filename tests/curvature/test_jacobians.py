"""The algebra of factored Jacobians: each method against the expanded form, which is built here with loops."""

import itertools

import pytest
import torch

from lapkit.curvature import DenseJacobian, NetworkJacobian, OuterProduct
from lapkit.curvature.capture.backprop import combined
from lapkit.curvature.jacobians import jacobian as jacobians_module
from lapkit.curvature.jacobians.outer_product import concatenated
from lapkit.curvature.jacobians.sum_jacobian import SumJacobian

INPUTS, OUTPUTS = 3, 2


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def outer_product(columns, examples, positions, groups, transposed, budget=2**28):
    a = torch.randn(examples, positions, groups, INPUTS)
    g = torch.randn(columns, examples, positions, groups, OUTPUTS)
    return OuterProduct(a, g, transposed, budget)


def expanded(jacobian):
    """J[k, n] = sum_t g (x) a, group after group, one outer product at a time."""
    columns, examples, positions, groups, _ = jacobian.g.shape
    values = torch.zeros(*jacobian.shape)
    for k, n in itertools.product(range(columns), range(examples)):
        blocks = []
        for group in range(groups):
            block = sum(torch.outer(jacobian.g[k, n, t, group], jacobian.a[n, t, group]) for t in range(positions))
            blocks.append((block.T if jacobian.transposed else block).flatten())
        values[k, n] = torch.cat(blocks)
    return values


# A further kind of Jacobian is one more row: a function that returns it with its expanded values.
KINDS = {
    f"outer product K{k} N{n} T{t} G{g}{' transposed' if transposed else ''}{' chunked' if budget == 1 else ''}": (
        lambda k=k, n=n, t=t, g=g, transposed=transposed, budget=budget: (
            j := outer_product(k, n, t, g, transposed, budget),
            expanded(j),
        )
    )
    for k, n, t, g, transposed, budget in itertools.product((1, 3), (1, 4), (1, 5), (1, 2), (False, True), (1, 2**28))
}
KINDS["dense"] = lambda: (j := DenseJacobian(torch.randn(3, 4, 6)), j.values.clone())
KINDS["dense with one column, one example"] = lambda: (j := DenseJacobian(torch.randn(1, 1, 6)), j.values.clone())


def network_jacobian():
    one, two, three = (
        outer_product(3, 4, 1, 1, False),
        DenseJacobian(torch.randn(3, 4, 2)),
        outer_product(3, 4, 2, 2, True),
    )
    return NetworkJacobian((one, two, three)), torch.cat([expanded(one), two.values, expanded(three)], dim=-1)


KINDS["network"] = network_jacobian


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


@pytest.fixture(params=["pairs", "expanded", "counted"])
def route(request, monkeypatch):
    """Both ways to the same number when positions share a weight, and the choice between them."""
    if request.param != "counted":
        monkeypatch.setattr(OuterProduct, "_pairs_are_cheaper", lambda *_: request.param == "pairs")


def test_shape_and_dense(kind):
    jacobian, values = kind
    assert jacobian.shape == values.shape
    close(jacobian.to_dense(), values)


def test_square_sum(kind, route):
    jacobian, values = kind
    close(jacobian.square_sum(), values.square().sum((0, 1)))


def test_weighted_gram(kind, route):
    jacobian, values = kind
    weights = torch.randn(values.shape[2])  # any sign: a difference of variances is as good as a variance
    expected = torch.stack([v @ torch.diag(weights) @ v.T for v in values.transpose(0, 1)])
    close(jacobian.weighted_gram(weights), expected)


def test_weighted_gram_is_differentiable(kind, route):
    jacobian, values = kind
    weights = torch.rand(values.shape[2], requires_grad=True)
    probe = torch.randn(values.shape[1], values.shape[0], values.shape[0])
    (gradient,) = torch.autograd.grad((jacobian.weighted_gram(weights) * probe).sum(), weights)
    close(gradient, torch.einsum("knp,lnp,nkl->p", values, values, probe))


def test_gram(kind):
    jacobian, values = kind
    close(jacobian.gram(), torch.einsum("knp,lmp->knlm", values, values))


@pytest.mark.parametrize("way", ["_gram_of_pairs", "_gram_of_rows"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("budget", [1, 2000, 20000, 2**28])
def test_both_ways_to_the_gram_matrix(way, positions, groups, transposed, budget):
    jacobian = outer_product(3, 7, positions, groups, transposed, budget)
    values = expanded(jacobian)
    close(getattr(jacobian, way)(), torch.einsum("knp,lmp->knlm", values, values))


@pytest.mark.parametrize(("positions", "width", "way"), [(2, 40, "_gram_of_pairs"), (20, 2, "_gram_of_rows")])
def test_the_gram_matrix_takes_the_way_with_fewer_multiplications(positions, width, way, monkeypatch):
    """Few positions of wide layers by pairs, many positions of narrow ones from the expanded Jacobian."""
    taken = []
    for name in ("_gram_of_pairs", "_gram_of_rows"):
        method = getattr(OuterProduct, name)
        monkeypatch.setattr(
            OuterProduct, name, lambda j, o, name=name, method=method: taken.append(name) or method(j, o)
        )
    jacobian = OuterProduct(torch.randn(4, positions, 2, width), torch.randn(3, 4, positions, 2, width))
    values = expanded(jacobian)
    close(jacobian.gram(), torch.einsum("knp,lmp->knlm", values, values))
    assert taken == [way]


@pytest.mark.parametrize("vectors", [1, 3])
def test_project(kind, vectors):
    jacobian, values = kind
    directions = torch.randn(values.shape[2], vectors)
    close(jacobian.project(directions), torch.einsum("knp,pr->knr", values, directions))


def test_pull_back(kind):
    jacobian, values = kind
    cotangent = torch.randn(values.shape[:2])
    close(jacobian.pull_back(cotangent), torch.einsum("kn,knp->p", cotangent, values))


@pytest.mark.parametrize("cheaper", [True, False, None])
@pytest.mark.parametrize("vectors", [1, 3])
def test_many_vectors_by_both_ways(kind, vectors, cheaper, monkeypatch):
    """Through the factors, through the expanded Jacobian, and by what is counted."""
    if cheaper is not None:
        monkeypatch.setattr(OuterProduct, "_factors_are_cheaper", lambda *_: cheaper)
    jacobian, values = kind
    directions, cotangents = torch.randn(values.shape[2], vectors), torch.randn(*values.shape[:2], vectors)
    close(jacobian.project(directions), torch.einsum("knp,pr->knr", values, directions))
    close(jacobian.pull_back_all(cotangents), torch.einsum("knr,knp->pr", cotangents, values))


def test_many_vectors_take_the_way_with_fewer_multiplications():
    """The factors at one position, the expanded Jacobian for many positions of few columns."""
    assert OuterProduct(torch.randn(2, 1, 1, 30), torch.randn(3, 2, 1, 1, 20))._factors_are_cheaper(5)
    assert not OuterProduct(torch.randn(2, 50, 1, 10), torch.randn(2, 2, 50, 1, 20))._factors_are_cheaper(40)


def test_block(kind):
    jacobian, values = kind
    close(jacobian.block(), sum(torch.outer(row, row) for row in values.flatten(0, 1)))


def test_split_into_itself(kind):
    jacobian, values = kind
    (whole,) = jacobian.split([values.shape[2]])
    close(whole.to_dense(), values)


def test_split_a_network():
    jacobian, values = network_jacobian()
    assert jacobian.sizes == [6, 2, 12]
    for sizes in ([6, 2, 12], [8, 12], [6, 14]):
        parts = list(jacobian.split(sizes))
        for part, expected in zip(parts, values.split(sizes, dim=-1), strict=True):
            close(part.to_dense(), expected)
    for wrong in ([7, 13], [6, 2], [6, 2, 13], [20, 1]):
        with pytest.raises(ValueError, match="parts of"):
            list(jacobian.split(wrong))
    dense = DenseJacobian(values)
    for part, expected in zip(dense.split([5, 15]), values.split([5, 15], dim=-1), strict=True):
        close(part.to_dense(), expected)
    with pytest.raises(ValueError, match="cannot be cut"):
        list(jacobian.parts[0].split([3, 3]))


def test_parts_must_belong_together():
    with pytest.raises(ValueError, match="share columns and examples"):
        NetworkJacobian((DenseJacobian(torch.randn(3, 4, 2)), DenseJacobian(torch.randn(3, 5, 2))))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 5])
def test_rotate(positions, groups, transposed):
    jacobian = outer_product(3, 4, positions, groups, transposed)
    rows, columns = (INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS)
    left, right = torch.randn(groups, rows, rows), torch.randn(groups, columns, columns)
    basis = torch.block_diag(*[torch.kron(l_, r) for l_, r in zip(left, right, strict=True)])
    rotated = jacobian.rotate(left, right)
    assert isinstance(rotated, OuterProduct) is (positions == 1)  # else the product of the factors is less to rotate
    close(rotated.to_dense(), expanded(jacobian) @ basis)
    close(DenseJacobian(expanded(jacobian)).rotate(left, right).to_dense(), expanded(jacobian) @ basis)


@pytest.mark.parametrize("transposed", [False, True])
def test_rotate_into_the_basis_of_an_exact_block(transposed):
    """Which a weight has when the fit could not factor it."""
    jacobian = outer_product(3, 4, 2, 1, transposed)
    basis = torch.randn(1, 6, 6)
    close(jacobian.rotate(basis, torch.ones(1, 1, 1)).to_dense(), expanded(jacobian) @ basis[0])


def test_rotate_a_dense_jacobian_by_its_diagonal():
    values = torch.randn(3, 4, 6)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1])
    rotated = DenseJacobian(values).rotate(signs[:, None, None], torch.ones(6, 1, 1))
    close(rotated.to_dense(), values * signs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 5])
def test_moments(positions, groups):
    jacobian = outer_product(3, 4, positions, groups, transposed=False)
    rows_g = [jacobian.g[k, n, t] for k in range(3) for n in range(4) for t in range(positions)]
    rows_a = [jacobian.a[n, t] for n in range(4) for t in range(positions)]
    close(jacobian.output_moment(), sum(torch.einsum("go,gp->gop", r, r) for r in rows_g))
    moment, count = jacobian.input_moment()
    close(moment, sum(torch.einsum("gi,gj->gij", r, r) for r in rows_a))
    assert count == 4 * positions


def test_moments_of_a_dense_jacobian_are_its_block_or_diagonal(monkeypatch):
    jacobian = DenseJacobian(torch.randn(3, 4, 6))
    for limit, shape in ((6, (1, 6, 6)), (5, (6, 1, 1))):
        monkeypatch.setattr(jacobians_module, "DENSE_LIMIT", limit)
        b, (a, count) = jacobian.output_moment(), jacobian.input_moment()
        assert (b.shape, a.shape, count) == (shape, (shape[0], 1, 1), 4)
        close(a / count, torch.ones(shape[0], 1, 1))
        exact = jacobian.block()
        close(torch.block_diag(*b), exact if limit == 6 else torch.diag(exact.diagonal()))


def test_a_moment_is_shared_only_where_it_is_the_same():
    for positions, groups in itertools.product((1, 2), (1, 2)):
        jacobian = outer_product(3, 4, positions, groups, transposed=False)
        cotangent = jacobian.sole_cotangent()
        assert (cotangent is not None) == (positions == groups == 1)
        if cotangent is not None:
            close(torch.einsum("kno,knp->op", cotangent, cotangent)[None], jacobian.output_moment())


@pytest.mark.parametrize("second", [(1, False), (4, False), (1, True)], ids=["same", "other positions", "transposed"])
def test_several_uses_are_summed_before_anything_is_squared(second):
    positions, transposed = second
    one, two = outer_product(3, 4, 1, 1, transposed=False), outer_product(3, 4, positions, 1, transposed)
    both = combined([one, two])
    assert isinstance(both, SumJacobian if transposed else OuterProduct)
    values = expanded(one) + expanded(two)
    close(both.to_dense(), values)
    close(both.square_sum(), values.square().sum((0, 1)))
    three = combined([one, DenseJacobian(expanded(two)), two])
    close(three.to_dense(), values + expanded(two))


def test_concatenated_uses_count_their_positions():
    one, two = outer_product(3, 4, 1, 2, transposed=False), outer_product(3, 4, 5, 2, transposed=False)
    both = concatenated([one, two])
    close(both.output_moment(), one.output_moment() + two.output_moment())
    close(both.input_moment()[0], one.input_moment()[0] + two.input_moment()[0])
    assert both.input_moment()[1] == 4 * 6
