"""Every structure of matrix against dense algebra. A further structure is one more row of OPERATORS."""

import math

import pytest
import torch

from lapkit.curvature import (
    BlockDiagonal,
    Dense,
    DenseJacobian,
    Diagonal,
    Factored,
    Kronecker,
    KroneckerProduct,
    LowRank,
    NetworkJacobian,
    OuterProduct,
)
from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.operators import low_rank as low_rank_module


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-10)


def psd(*shape, rank=None):
    """Positive definite, or of a lower rank, `(*, n, n)`."""
    root = torch.randn(*shape, shape[-1] if rank is None else rank)
    return root @ root.mT + (0.1 * torch.eye(shape[-1]) if rank is None else 0)


def kron(left, right):
    """The blocks of all groups, (P, P)."""
    return torch.block_diag(*[torch.kron(l_, r) for l_, r in zip(left, right, strict=True)])


def diagonal():
    values = torch.rand(6) + 0.1
    return Diagonal(values), torch.diag(values), DenseJacobian(torch.randn(3, 4, 6))


def dense():
    matrix = psd(6)
    return Dense(matrix), matrix.clone(), DenseJacobian(torch.randn(3, 4, 6))


def kronecker(groups, build, transposed=False):
    left, right = psd(groups, 2), psd(groups, 3)
    outputs, inputs = (3, 2) if transposed else (2, 3)
    a, g = torch.randn(4, 2, groups, inputs), torch.randn(3, 4, 2, groups, outputs)
    return build(left, right), kron(left, right), OuterProduct(a, g, transposed)


def diagonal_times_kronecker(build):
    """Rows of a table, which keep their own basis."""
    left, right = torch.rand(1, 4) + 0.1, psd(1, 3)
    jacobian = EmbeddingJacobian(torch.randint(4, (5, 2)), torch.randn(3, 5, 2, 3), 4)
    return build(left, right), torch.kron(torch.diag(left[0]), right[0]), jacobian


def low_rank(columns, free=True):
    v, offset = torch.randn(6, columns), torch.rand(6) + 0.1 if free else torch.tensor(0.3)
    return LowRank(v, offset), v @ v.T + torch.diag(offset.expand(6)), DenseJacobian(torch.randn(3, 4, 6))


def low_rank_with_a_zero_column_and_a_repeated_one():
    """Equal eigenvalues, at which eigenvectors have no derivative."""
    v = torch.zeros(6, 4)
    v[0, 0] = v[1, 1] = v[2, 2] = 1.0
    return LowRank(v, 0.5), v @ v.T + 0.5 * torch.eye(6), DenseJacobian(torch.randn(3, 4, 6))


def factored(free=True):
    """Two batches of two parameters; a convolution-like use at two positions, and a bias."""

    def batch(columns, examples):
        a, g = torch.randn(examples, 2, 1, 2), torch.randn(columns, examples, 2, 1, 3)
        return OuterProduct(a, g), DenseJacobian(g.sum((2, 3)))

    batches = (batch(2, 3), batch(1, 2))
    rows = torch.cat([torch.cat([p.to_dense() for p in b], dim=2).flatten(0, 1) for b in batches])
    offset = torch.rand(9) + 0.1 if free else torch.tensor(0.3)
    test = NetworkJacobian((OuterProduct(torch.randn(4, 1, 1, 2), torch.randn(3, 4, 1, 1, 3)),))
    jacobian = NetworkJacobian((*test.parts, DenseJacobian(torch.randn(3, 4, 3))))
    return Factored(batches, offset), rows.T @ rows + torch.diag(offset.expand(9)), jacobian


def mixed():
    kinds = [diagonal(), kronecker(1, KroneckerProduct), dense(), kronecker(2, Kronecker.from_factors), low_rank(2)]
    operators, matrices, jacobians = zip(*kinds, strict=True)
    return BlockDiagonal(operators), torch.block_diag(*matrices), NetworkJacobian(jacobians)


# name: a function that returns the operator, the same matrix in full, and a Jacobian that fits
OPERATORS = {
    "diagonal": diagonal,
    "dense": dense,
    "kronecker": lambda: kronecker(1, Kronecker.from_factors),
    "kronecker of transposed weights": lambda: kronecker(1, Kronecker.from_factors, transposed=True),
    "kronecker in two groups": lambda: kronecker(2, Kronecker.from_factors),
    "kronecker product": lambda: kronecker(1, KroneckerProduct),
    "kronecker product in two groups": lambda: kronecker(2, KroneckerProduct),
    "kronecker of a table": lambda: diagonal_times_kronecker(Kronecker.from_factors),
    "kronecker product of a table": lambda: diagonal_times_kronecker(KroneckerProduct),
    "low rank": lambda: low_rank(2),
    "low rank and one number": lambda: low_rank(3, free=False),
    "more columns than weights": lambda: low_rank(9),
    "equal eigenvalues": low_rank_with_a_zero_column_and_a_repeated_one,
    "factored": factored,
    "factored and one number": lambda: factored(free=False),
    "one block": lambda: (lambda o, m, j: (BlockDiagonal((o,)), m, NetworkJacobian((j,))))(*dense()),
    "blocks of all kinds": mixed,
}
FREE_SHIFTS_ARE_EXACT = (
    "diagonal",
    "dense",
    "one block",
    "low rank",
    "low rank and one number",
    "more columns than weights",
    "equal eigenvalues",
    "factored",
    "factored and one number",
)


@pytest.fixture(params=OPERATORS)
def case(request):
    """An operator, its matrix and a Jacobian; the operator must be the same matrix afterwards."""
    operator, matrix, jacobian = OPERATORS[request.param]()
    yield operator, matrix, jacobian
    close(operator.to_dense(), matrix)


def test_size_and_matrix(case):
    operator, matrix, _ = case
    assert operator.size == len(matrix)
    assert (operator.dtype, operator.device) == (matrix.dtype, matrix.device)
    close(operator.to_dense(), matrix)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_products_with_vectors(case, shape):
    operator, matrix, _ = case
    v = torch.randn(len(matrix), *shape)
    close(operator.matmul(v), matrix @ v)
    close(operator.solve(v), torch.linalg.solve(matrix, v))
    close(operator.inverse_root_transpose(operator.inverse_root(v)), torch.linalg.solve(matrix, v))


def test_diagonals_trace_and_determinant(case):
    operator, matrix, _ = case
    close(operator.diagonal(), matrix.diagonal())
    close(operator.trace(), matrix.trace())
    close(operator.inverse_diagonal(), torch.linalg.inv(matrix).diagonal())
    close(operator.logdet(), torch.linalg.slogdet(matrix).logabsdet)


def test_quadratic(case):
    operator, matrix, _ = case
    v = torch.randn(len(matrix))
    close(operator.quadratic(v), v @ matrix @ v)


def test_inverse_root(case):
    operator, matrix, _ = case
    eye = torch.eye(len(matrix))
    root, transpose = operator.inverse_root(eye), operator.inverse_root_transpose(eye)
    close(transpose, root.T)
    close(root.T @ root @ matrix, eye)


@pytest.mark.parametrize("factor", [2.5, torch.tensor(0.3)])
def test_scale(case, factor):
    operator, matrix, _ = case
    scaled = operator.scale(factor)
    close(scaled.to_dense(), factor * matrix)
    close(scaled.logdet(), torch.linalg.slogdet(factor * matrix).logabsdet)


@pytest.mark.parametrize("shape", [None, (), (1,), (1, 1)])
def test_shift_by_a_number(case, shape):
    operator, matrix, _ = case
    shift = 0.7 if shape is None else torch.full(shape, 0.7)
    expected = matrix + 0.7 * torch.eye(len(matrix))
    shifted = operator.shift(shift)
    close(shifted.to_dense(), expected)
    close(shifted.logdet(), torch.linalg.slogdet(expected).logabsdet)
    close(operator.shifted_logdet(shift), torch.linalg.slogdet(expected).logabsdet)
    close(shifted.solve(torch.eye(len(matrix))), torch.linalg.inv(expected))


def constant_within_blocks(operator):
    sizes = operator.sizes if isinstance(operator, BlockDiagonal) else [operator.size]
    return torch.cat([torch.full((size,), 0.5 + i) for i, size in enumerate(sizes)])


def test_shift_by_a_number_for_each_block(case):
    operator, matrix, _ = case
    delta = constant_within_blocks(operator)
    close(operator.shift(delta).to_dense(), matrix + torch.diag(delta))
    expected = torch.linalg.slogdet(matrix + torch.diag(delta)).logabsdet
    close(operator.shift(delta).logdet(), expected)
    close(operator.shifted_logdet(delta), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_free_shift(name):
    """Kronecker blocks keep the diagonal of diag(delta) in their eigenbasis, which errs in a known direction."""
    operator, matrix, _ = OPERATORS[name]()
    delta = torch.rand(len(matrix)) + 0.2
    shifted = operator.shift(delta)
    exact = matrix + torch.diag(delta)
    close(shifted.trace(), exact.trace())
    close(operator.shifted_logdet(delta), shifted.logdet())
    close(shifted.logdet(), torch.linalg.slogdet(shifted.to_dense()).logabsdet)
    assert shifted.logdet() >= torch.linalg.slogdet(exact).logabsdet - 1e-12
    if name in FREE_SHIFTS_ARE_EXACT:
        close(shifted.to_dense(), exact)
    else:
        assert (shifted.to_dense() - exact).norm() > 1e-3


@pytest.mark.parametrize("build", [Kronecker.from_factors, KroneckerProduct])
@pytest.mark.parametrize("groups", [1, 2])
def test_free_shift_of_a_kronecker_product_is_the_diagonal_in_its_eigenbasis(build, groups):
    left, right, delta = psd(groups, 2), psd(groups, 3), torch.rand(groups * 6)
    basis = kron(torch.linalg.eigh(left).eigenvectors, torch.linalg.eigh(right).eigenvectors)
    kept = torch.diag((basis.T @ torch.diag(delta) @ basis).diagonal())
    close(build(left, right).shift(delta).to_dense(), kron(left, right) + basis @ kept @ basis.T)


def test_free_shift_acts_on_each_block_of_its_own():
    operator, matrix, _ = mixed()
    delta = torch.rand(len(matrix))
    parts = zip(operator.blocks, delta.split(operator.sizes), strict=True)
    close(operator.shift(delta).to_dense(), torch.block_diag(*[block.shift(d).to_dense() for block, d in parts]))
    exact = BlockDiagonal((Diagonal(torch.ones(2)), Dense(psd(3))))
    delta = torch.rand(5)
    close(exact.shift(delta).to_dense(), exact.to_dense() + torch.diag(delta))


def test_inverse_quadratic(case):
    operator, matrix, jacobian = case
    rows = jacobian.to_dense().transpose(0, 1)
    close(operator.inverse_quadratic(jacobian), rows @ torch.linalg.inv(matrix) @ rows.mT)
    shifted = torch.linalg.inv(matrix + 2 * torch.eye(len(matrix)))
    close(operator.shift(2.0).inverse_quadratic(jacobian), rows @ shifted @ rows.mT)


@pytest.mark.parametrize("function", ["shift", "shifted_logdet"])
@pytest.mark.parametrize("kind", ["number", "blocks", "free"])
def test_gradient_of_the_log_determinant(case, function, kind):
    """Against central differences of the same function; for exact shifts also against autograd of the dense one."""
    operator, matrix, _ = case
    if kind == "number":
        delta = torch.tensor(0.4)
    else:
        delta = constant_within_blocks(operator) if kind == "blocks" else torch.rand(len(matrix)) + 0.3
    evaluate = (lambda d: operator.shift(d).logdet()) if function == "shift" else operator.shifted_logdet
    leaf = delta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(evaluate(leaf), leaf)
    step = 1e-5
    if kind == "number":
        numeric = (evaluate(delta + step) - evaluate(delta - step)) / (2 * step)
        exact = torch.linalg.inv(matrix + delta * torch.eye(len(matrix))).trace()
        close(gradient, exact)
    else:
        directions = step * torch.eye(len(matrix))
        numeric = torch.stack([(evaluate(delta + d) - evaluate(delta - d)) / (2 * step) for d in directions])
        if kind == "blocks":  # along which every structure is exact, so that its own derivative is
            close(gradient.sum(), torch.linalg.inv(matrix + torch.diag(delta)).trace())
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)  # differences lose half of the digits


def test_gradients_of_all_else_with_respect_to_a_shift(case):
    """Tuning a prior by a validation loss differentiates variances and quadratic forms, too."""
    operator, matrix, jacobian = case
    rows, v = jacobian.to_dense().transpose(0, 1), torch.randn(len(matrix))
    leaf, other = (torch.tensor(0.4, requires_grad=True) for _ in range(2))
    shifted, full = operator.shift(leaf), matrix + other * torch.eye(len(matrix))
    inverse = torch.linalg.inv(full)
    pairs = [
        (shifted.inverse_quadratic(jacobian).square().sum(), (rows @ inverse @ rows.mT).square().sum()),
        (shifted.inverse_diagonal().square().sum(), inverse.diagonal().square().sum()),
        (shifted.quadratic(v), v @ full @ v),
        (shifted.solve(v).square().sum(), (inverse @ v).square().sum()),
        (operator.scale(leaf).trace(), (other * matrix).trace()),
    ]
    for actual, expected in pairs:
        (one,) = torch.autograd.grad(actual, leaf, retain_graph=True)
        (two,) = torch.autograd.grad(expected, other, retain_graph=True)
        close(one, two, rtol=1e-8)


def test_nothing_changes_the_operator(case):
    """The fixture compares the matrix afterwards; here also what was computed before stays as it was."""
    operator, matrix, jacobian = case
    shifted, scaled = operator.shift(1.0), operator.scale(2.0)
    before = shifted.to_dense(), scaled.to_dense(), operator.logdet()
    operator.shift(torch.rand(len(matrix))).scale(3.0).inverse_quadratic(jacobian)
    shifted.shift(5.0).solve(torch.randn(len(matrix)))
    close(shifted.to_dense(), before[0])
    close(scaled.to_dense(), before[1])
    close(operator.logdet(), before[2])
    with pytest.raises(AttributeError):
        operator.anything = 1


def test_shape_errors_name_what_was_expected(case):
    operator, matrix, _ = case
    size = len(matrix)
    for wrong in (torch.zeros(size + 1), torch.zeros(size - 1, 2), torch.zeros(size, 2, 2), torch.tensor(1.0)):
        for method in (operator.matmul, operator.solve, operator.inverse_root, operator.inverse_root_transpose):
            with pytest.raises(ValueError, match=rf"\({size},\).*\({size}, R\).*got"):
                method(wrong)
    for wrong in (torch.zeros(size + 1), torch.zeros(size, 1), torch.zeros(2)):
        for method in (operator.shift, operator.shifted_logdet):
            with pytest.raises(ValueError, match=f"one entry or {size}"):
                method(wrong)


def test_conversion(case):
    operator, matrix, _ = case
    single = operator.to(torch.float32)
    assert single.dtype == single.shift(1.0).to_dense().dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), matrix, rtol=1e-5, atol=1e-5)
    assert operator.to(torch.float64).dtype == torch.float64
    assert operator.to(dtype=torch.float32, device="cpu").dtype == torch.float32
    same = operator.to(device="cpu")
    assert (same.dtype, same.device) == (operator.dtype, operator.device)
    close(same.shift(0.5).logdet(), operator.shift(0.5).logdet())
    assert operator.to(device="meta").device.type == "meta"


@pytest.mark.parametrize(("build", "name"), [(dense, "eigenvalues"), (lambda: kronecker(2, KroneckerProduct), "eigen")])
def test_conversions_share_what_was_expensive(build, name, monkeypatch):
    """Single precision, double again, and both at a new shift: one eigendecomposition of each matrix."""
    operator, _, _ = build()
    calls = []
    for function in ("eigvalsh", "eigh"):
        original = getattr(torch.linalg, function)
        monkeypatch.setattr(torch.linalg, function, lambda m, original=original: calls.append(m) or original(m))
    for other in (operator, operator.to(torch.float32), operator.to(torch.float32).to(torch.float64)):
        getattr(other, name)
        other.shifted_logdet(1.0)
    assert len(calls) == (1 if name == "eigenvalues" else 2)
    close(operator.to(torch.float32).to(torch.float64).shifted_logdet(1.0), operator.shifted_logdet(1.0), rtol=1e-5)


def test_sums_of_one_structure():
    for build in (diagonal, dense, lambda: low_rank(2), lambda: low_rank(5, free=False)):
        (one, first, _), (two, second, _) = build(), build()
        total = one + two
        assert type(total) is type(one)
        close(total.to_dense(), first + second)
        close(total.logdet(), torch.linalg.slogdet(first + second).logabsdet)
        both = BlockDiagonal((one, two)) + BlockDiagonal((two, one))
        close(both.to_dense(), torch.block_diag(first + second, first + second))
    assert (low_rank(5)[0] + low_rank(5)[0]).rank == 6


def test_kronecker_products_add_up_in_one_basis_only():
    left, right, values = psd(2, 2), psd(2, 3), torch.rand(2, 2, 3)
    one = Kronecker.from_factors(left, right)
    two = Kronecker(one.left, one.right, values)
    close((one + two).to_dense(), one.to_dense() + two.to_dense())
    product = KroneckerProduct(left, right)
    table = Kronecker(None, one.right, values)
    close((table + table).to_dense(), 2 * table.to_dense())
    for a, b in ((product, product), (one, kronecker(2, Kronecker.from_factors)[0]), (one, table), (table, one)):
        with pytest.raises(TypeError, match=r"two Kronecker products is none.*a\.result\(\) \+ b\.result\(\)"):
            a + b
    with pytest.raises(TypeError, match="two Kronecker products is none"):
        BlockDiagonal((product,)) + BlockDiagonal((product,))


def test_sums_of_other_structures_or_sizes_are_refused():
    operator = diagonal()[0]
    for other in (dense()[0], low_rank(2)[0], kronecker(1, Kronecker.from_factors)[0], BlockDiagonal((operator,))):
        for one, two in ((operator, other), (other, operator)):
            with pytest.raises(TypeError, match="Diagonal"):
                one + two
    with pytest.raises(ValueError, match="over 6 and 2 weights"):
        operator + Diagonal(torch.ones(2))
    small = Diagonal(torch.ones(2))
    with pytest.raises(ValueError, match=r"\[6, 2\] and of \[2, 6\]"):
        BlockDiagonal((operator, small)) + BlockDiagonal((small, operator))
    with pytest.raises(TypeError, match="unsupported operand"):
        operator + 1.0


@pytest.mark.parametrize("groups", [1, 2])
def test_damped_inverse(groups):
    """Seeds (B.21), (B.22), written out; pi does not depend on which factor is scaled."""
    left, right, damping = psd(groups, 2), psd(groups, 3), 0.3
    found = KroneckerProduct(left, right).damped_inverse(damping)
    expected = []
    for b, a in zip(left, right, strict=True):
        pi = ((a.trace() / 3) / (b.trace() / 2)).sqrt()
        a_inverse = torch.linalg.inv(a + pi * damping**0.5 * torch.eye(3))
        expected.append(torch.kron(torch.linalg.inv(b + damping**0.5 / pi * torch.eye(2)), a_inverse))
    close(found.to_dense(), torch.block_diag(*expected))
    close(KroneckerProduct(4 * left, right / 4).damped_inverse(torch.tensor(damping)).to_dense(), found.to_dense())
    diagonal = torch.rand(groups, 2)
    full, short = (KroneckerProduct(left, right) for left in (torch.diag_embed(diagonal), diagonal))
    close(short.damped_inverse(damping).to_dense(), full.damped_inverse(damping).to_dense())


def test_damped_inverse_is_exact_where_it_can_be():
    numbers, matrix, zero = 2 * torch.ones(3, 1, 1), psd(3, 4), torch.zeros(3, 2, 2)
    for left, right in ((numbers, matrix), (matrix, numbers), (zero, matrix), (matrix, zero)):
        exact = torch.linalg.inv(kron(left, right) + 0.3 * torch.eye(3 * left.shape[1] * right.shape[1]))
        close(KroneckerProduct(left, right).damped_inverse(0.3).to_dense(), exact)
    table = KroneckerProduct(torch.rand(2, 4), torch.ones(2, 1, 1))
    close(table.damped_inverse(0.3).to_dense(), torch.linalg.inv(table.to_dense() + 0.3 * torch.eye(8)))
    for damping in (0.0, -1.0, float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match="one positive number"):
            KroneckerProduct(numbers, matrix).damped_inverse(damping)


def test_compression_is_exact_or_the_nearest():
    v, offset = torch.randn(8, 3) @ torch.randn(3, 12), torch.rand(8)
    operator = LowRank(v, offset)
    for rank, kept in ((None, 8), (3, 3), (7, 7)):
        small = operator.compressed(rank)
        assert small.rank == kept
        close(small.to_dense(), operator.to_dense())
        lengths = small.gram.diagonal()
        close(small.gram, torch.diag(lengths))
        assert (lengths.diff() < 1e-9).all()
    for wide in (v, v.T[:8].contiguous()):  # by the Gram matrix of either side
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        nearest = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].T
        close(LowRank(wide).compressed(2).to_dense(), nearest)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        operator.compressed(0)


def test_eigenvalues_of_low_rank():
    operator = LowRank(torch.randn(6, 2))
    close(operator.eigenvalues, torch.linalg.eigvalsh(operator.to_dense())[-2:])


def test_low_rank_without_a_diagonal_has_no_inverse():
    bare = LowRank(torch.randn(6, 2))
    close(bare.to_dense(), bare.columns @ bare.columns.T)
    vector = torch.randn(6)
    for refused in (bare.logdet, bare.inverse_diagonal, lambda: bare.solve(vector), lambda: bare.shifted_logdet(0.0)):
        with pytest.raises(ValueError, match="without a positive diagonal"):
            refused()
    for columns, offset in ((torch.randn(6), 0.0), (torch.randn(6, 2), torch.ones(2))):
        with pytest.raises(ValueError, match=r"columns \(P, R\) and an offset"):
            LowRank(columns, offset)


def test_low_rank_in_pieces(monkeypatch):
    monkeypatch.setattr(low_rank_module, "PIECE", 5)
    operator, matrix, _ = low_rank(2)
    close(operator.inverse_diagonal(), torch.linalg.inv(matrix).diagonal())
    close(operator.logdet(), torch.linalg.slogdet(matrix).logabsdet)
    close(operator.gram, operator.columns.T @ operator.columns)


def test_low_rank_in_single_precision_beside_a_small_offset():
    """Variances along V are 1e-8 of those across it; differences in single precision would be noise.

    What remains is the rounding of V itself, 6e-8, magnified by the square root of the condition, 1e4.
    """
    v = torch.linalg.qr(torch.randn(40, 3)).Q * 1e3
    single = LowRank(v.float(), 1e-2)
    exact = torch.linalg.inv(v.float().double() @ v.float().double().T + 1e-2 * torch.eye(40))
    rows = (torch.randn(1, 5, 3) @ v.T).float()
    expected = (rows[0].double() @ exact * rows[0].double()).sum(1)
    found = single.inverse_quadratic(DenseJacobian(rows))[:, 0, 0].double()
    assert ((found - expected).abs() < 2e-2 * expected).all()
    torch.testing.assert_close(single.inverse_diagonal().double(), exact.diagonal(), rtol=1e-5, atol=0)
    assert float(single.logdet()) == pytest.approx(float(-torch.linalg.slogdet(exact).logabsdet), rel=1e-6)


@pytest.mark.parametrize("build", [Kronecker.from_factors, KroneckerProduct])
def test_singular_factors_and_a_small_shift(build):
    """Few examples leave most eigenvalues zero; round-off must not make them negative."""
    left, right = psd(1, 5, rank=1), psd(1, 6, rank=2)
    shifted = build(left, right).shift(1e-9)
    expected = torch.linalg.eigvalsh(kron(left, right)).clamp_min(0)
    close(shifted.logdet(), (expected[-2:] + 1e-9).log().sum() + 28 * torch.tensor(1e-9).log(), rtol=1e-5)
    single = build(10 * left.float(), 10 * right.float()).shift(1e-6)
    assert torch.isfinite(single.logdet())
    assert (single.inverse_diagonal() > 0).all()


@pytest.mark.parametrize("build", [Kronecker.from_factors, KroneckerProduct])
def test_eigenvalues_of_single_precision_factors_are_found_in_double(build):
    """Ones have the eigenvalues 50, 0, 0, ...; in single precision the zeros would be some 1e-6."""
    shifted = build(torch.ones(1, 50, 50).float(), torch.ones(1, 1, 1).float()).shift(1e-8)
    assert float(shifted.logdet()) == pytest.approx(math.log(50) + 49 * math.log(1e-8), rel=1e-5)


def test_dense_that_is_not_positive_definite_is_refused():
    matrix = torch.diag(torch.tensor([1.0, 0.0, -1.0]))
    with pytest.raises(ValueError, match=r"not positive definite.*larger prior precision"):
        Dense(matrix).logdet()


def test_no_blocks():
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal(())


def test_kronecker_takes_one_parameter():
    operator, _, jacobian = kronecker(1, Kronecker.from_factors)
    with pytest.raises(TypeError, match="one parameter, got NetworkJacobian"):
        operator.inverse_quadratic(NetworkJacobian((jacobian,)))


def test_draws_have_the_inverse_as_covariance(case):
    operator, matrix, _ = case
    noise = torch.randn(len(matrix), 20_000, generator=torch.Generator().manual_seed(0))
    draws = operator.inverse_root_transpose(noise)
    inverse = torch.linalg.inv(matrix)
    # An entry of a sample covariance has the variance (c_ii c_jj + c_ij^2) / n.
    spread = ((torch.outer(inverse.diagonal(), inverse.diagonal()) + inverse.square()) / noise.shape[1]).sqrt()
    assert ((draws @ draws.T / noise.shape[1] - inverse).abs() <= 5 * spread).all()


def test_shifts_of_very_different_size_keep_the_digits_of_a_log_determinant():
    """A singular matrix with shifts from 1e-6 to 1e8: the sum has no Cholesky factor in double precision."""
    columns = torch.randn(30, 12)
    delta = torch.logspace(-6, 8, 30)[torch.randperm(30)].requires_grad_()
    found = Dense(columns @ columns.T).logdet_ratio(delta)
    exact = torch.logdet(torch.eye(12) + columns.T @ (columns / delta[:, None]))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)
    (gradient,), (expected,) = torch.autograd.grad(found, delta), torch.autograd.grad(exact, delta)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=0)
