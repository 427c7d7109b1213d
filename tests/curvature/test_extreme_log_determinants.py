"""Log determinants where curvature and prior, or priors, are orders of magnitude apart: against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lapkit.curvature import BlockDiagonal, Dense, Kronecker, KroneckerProduct, LowRank
from lapkit.curvature.operators import woodbury
from lapkit.curvature.operators.graded import (
    cleared,
    log_det_one_plus,
    log_det_one_plus_over,
    pivoted_cholesky,
    without_rounding,
)
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of

SIZES = (4, 1, 6, 3)
PRIORS = {
    "near": [1.0, 0.3, 2.0, 1.0],
    "1e14 apart": [1e-6, 1e8, 1.0, 1e-2],
    "1e24 apart": [1e-12, 1e12, 1.0, 1e-5],
    "a tiny one": [1e-16, 1.0, 1.0, 1.0],
    "a tiny one of few weights": [1.0, 1e-18, 1.0, 1.0],
    "tiny ones": [1e-20] * 4,
}


def exact(V, delta):
    """`log det(I + V^T diag(delta)^{-1} V)` by elimination, without any rounding."""
    rows = [[Fraction(float(v)) for v in row] for row in V]
    inverse = [1 / Fraction(float(d)) for d in delta]
    size = V.shape[1]
    M = [
        [sum((w * r[i] * r[j] for w, r in zip(inverse, rows, strict=True)), Fraction(int(i == j))) for j in range(size)]
        for i in range(size)
    ]
    total = 0.0
    for k in range(size):
        total += math.log(M[k][k].numerator) - math.log(M[k][k].denominator)
        for i in range(k + 1, size):
            factor = M[i][k] / M[k][k]
            M[i] = [a - factor * b for a, b in zip(M[i], M[k], strict=True)]
    return total


def columns(rank, dead=True):
    """Of few binary digits, so that `V V^T` is exact; one weight without curvature, and two that are alike."""
    V = torch.randint(-8, 9, (sum(SIZES), rank)).double() / 4
    if dead:
        V[2], V[7] = 0, V[6]
    return V


def spread(delta):
    return torch.tensor(delta).repeat_interleave(torch.tensor(SIZES))


OPERATORS = {
    "lowrank": lambda V: LowRank(V, sizes=SIZES),
    "lowrank without groups": lambda V: LowRank(V),
    "dense": lambda V: Dense(V @ V.T),
}


@pytest.mark.parametrize("rank", [3, 6, 9])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("form", OPERATORS)
def test_priors_far_apart(form, name, rank):
    V, delta = columns(rank), PRIORS[name]
    found = OPERATORS[form](V).logdet_ratio(torch.tensor(delta), SIZES)
    assert float(found) == pytest.approx(exact(V, spread(delta)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("form", OPERATORS)
def test_slopes_for_priors_far_apart(form, name):
    """Of exact fractions on both sides, which are right to the square of the step."""
    V, logs = columns(5), torch.tensor(PRIORS[name]).log().requires_grad_()
    (slope,) = torch.autograd.grad(OPERATORS[form](V).logdet_ratio(logs.exp(), SIZES), logs)
    for index in range(4):
        step = torch.zeros(4)
        step[index] = 1e-4
        up, down = (exact(V, spread((logs.detach() + sign * step).exp().tolist())) for sign in (1, -1))
        assert float(slope[index]) == pytest.approx((up - down) / 2e-4, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("delta", [1.0, 1e-6, 1e-12, 1e-18])
@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize("form", OPERATORS)
def test_one_number_far_below_a_singular_curvature(form, rank, delta):
    V = columns(rank)
    operator = OPERATORS[form](V)
    wanted = exact(V, spread([delta] * 4))
    for _ in range(2):  # the dense matrix has two ways
        assert float(operator.logdet_ratio(delta)) == pytest.approx(wanted, rel=1e-9, abs=1e-8)


def test_single_weights_far_apart():
    V, delta = columns(6), torch.logspace(-15, 15, sum(SIZES))[torch.randperm(sum(SIZES))]
    for make in OPERATORS.values():
        assert float(make(V).logdet_ratio(delta)) == pytest.approx(exact(V, delta), rel=1e-9)


def test_rows_in_any_order():
    V, weights = columns(5, dead=False), torch.logspace(-20, 20, sum(SIZES))
    wanted = exact(V, weights.reciprocal())
    for order in (torch.arange(14), torch.arange(14).flip(0), torch.randperm(14)):
        assert float(log_det_one_plus(weights[order], V[order])) == pytest.approx(wanted, rel=1e-12)


def test_columns_that_have_too_few_digits_are_refused():
    """Whether columns are alike cannot be seen where rounding exceeds the prior; where they are not, it need not be."""
    V = columns(4, dead=False)
    assert float(LowRank(V).logdet_ratio(1e-40)) == pytest.approx(exact(V, torch.full((14,), 1e-40)), rel=1e-9)
    alike = torch.randn(14, 3) @ torch.randn(3, 6)
    for operator in (LowRank(alike), LowRank(alike, sizes=SIZES)):
        with pytest.raises(ValueError, match="larger prior precision"):
            operator.logdet_ratio(torch.tensor([1e-34, 1e-33, 1e-34, 1e-34]), SIZES)


def test_a_prior_that_has_no_reciprocal_is_refused():
    with pytest.raises(ValueError, match="Use a larger one"):
        Dense(positive()).logdet_ratio(torch.tensor([1.0, 1e-320, 1.0, 1.0]), SIZES)


def test_without_room_for_the_columns_it_is_refused(monkeypatch):
    operator = LowRank(columns(4), sizes=SIZES)
    monkeypatch.setattr(woodbury, "default_budget", lambda device: 100)
    assert torch.isfinite(operator.logdet_ratio(1e-6))
    with pytest.raises(ValueError, match="larger prior precision"):
        operator.logdet_ratio(1e-14)


# -- matrices that were summed in single precision


def summed(V):
    """In float32, as batches are."""
    total = torch.zeros(len(V), len(V), dtype=torch.float32)
    for some in V.float().split(3, dim=1):
        total += some @ some.T
    return total


def generic(rank, size=14):
    """With all digits of single precision, so that sums of squares are rounded."""
    return torch.randn(size, rank).float().double()


@pytest.mark.parametrize("delta", [1.0, 1e-2, 1e-5, 1e-10, 1e-20])
@pytest.mark.parametrize("rank", [4, 9])
def test_rounding_of_a_singular_matrix_does_not_count(rank, delta):
    """Each eigenvalue that is nothing but rounding, some 1e-6, would add up to ten nats."""
    V = generic(rank)
    wanted = exact(V, torch.full((14,), delta))
    one = Dense(summed(V))
    for operator in (one, one, one.to(torch.float64), BlockDiagonal((Dense(summed(V)),))):
        assert float(operator.logdet_ratio(delta)) == pytest.approx(wanted, rel=1e-5, abs=1e-3)
    two = torch.full((14,), delta)
    two[:5] = 1.0
    assert float(one.logdet_ratio(two)) == pytest.approx(exact(V, two), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("delta", [1.0, 1e-5, 1e-10, 1e-20])
@pytest.mark.parametrize("build", [KroneckerProduct, Kronecker.from_factors])
def test_rounding_of_singular_factors_does_not_count(build, delta):
    B, A = generic(2, size=4), generic(3, size=5)
    operator = build(summed(B)[None], summed(A)[None])
    wanted = exact(torch.kron(B, A), torch.full((20,), delta))
    assert float(operator.logdet_ratio(delta)) == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def test_weights_of_very_different_curvature_are_not_taken_for_rounding():
    """Inputs in other units: what is small beside the largest entry is large beside its own."""
    units = torch.tensor([1e5, 1.0, 1e-4, 30.0])
    V = (units[:, None] * torch.randn(4, 12)).float().double()
    wanted = torch.linalg.slogdet(V @ V.T + 1e-6 * torch.eye(4)).logabsdet - 4 * math.log(1e-6)
    single = summed(V)
    for _ in range(2):
        assert float(Dense(single).logdet_ratio(1e-6)) == pytest.approx(float(wanted), rel=1e-5)
    kron = Kronecker.from_factors(single[None], torch.ones(1, 1, 1, dtype=torch.float32))
    assert float(kron.logdet_ratio(1e-6)) == pytest.approx(float(wanted), rel=1e-5)
    assert pivoted_cholesky(single, 1e-5).shape[1] == 4


def test_small_eigenvalues_are_not_taken_for_rounding():
    """Some hundred times what single precision rounds is little, and known."""
    V = generic(30)
    V[13] = V[12] + 1e-2 * V[13]
    wanted = float(torch.linalg.slogdet(V @ V.T).logabsdet) - 14 * math.log(1e-12)
    operator = Dense(summed(V))
    for _ in range(2):
        assert float(operator.logdet_ratio(1e-12)) == pytest.approx(wanted, abs=0.1)
    factor = KroneckerProduct(summed(V)[None], torch.ones(1, 1, 1, dtype=torch.float32))
    assert float(factor.logdet_ratio(1e-12)) == pytest.approx(wanted, abs=0.1)


def test_many_small_eigenvalues_are_kept_by_their_sum():
    """Each is below rounding, all together are not."""
    values = torch.tensor([-1e-9, 2e-9, 3e-9, 5.0])
    assert cleared(values, torch.full((4,), 1e-8)).tolist() == [0, 0, 0, 5]
    kept = cleared(values, torch.full((4,), 2.1e-9).index_fill(0, torch.tensor([2]), 3.1e-9) * 0.9)
    torch.testing.assert_close(kept, torch.tensor([0, 2e-9, 3e-9, 5.0]), rtol=1e-12, atol=0)
    sum_counts = cleared(torch.full((100,), 0.5e-8), torch.full((100,), 1e-8))
    torch.testing.assert_close(sum_counts, torch.full((100,), 0.5e-8), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_one_lost_eigenvalue_beside_small_ones_that_are_known(seed):
    """A mixture of three columns in six, or seven in eight, of which rounding makes more."""
    torch.manual_seed(seed)
    u, small = torch.randn(8, 7).float(), 1e-7 * torch.eye(24)
    matrix = torch.block_diag(u @ u.T, small.float())
    values = torch.cat([torch.linalg.svdvals(u.double()).square(), torch.full((24,), 1e-7)])
    for delta in (1e-6, 1e-7):
        wanted = float(torch.log1p(values / delta).sum())
        shift = torch.tensor(delta, dtype=torch.float32)
        kron = KroneckerProduct(torch.ones(1, 1, 1, dtype=torch.float32), matrix[None])
        assert float(kron.logdet_ratio(shift)) == pytest.approx(wanted, abs=0.01)
        dense = Dense(matrix)
        found = [dense.logdet_ratio(s) for s in (shift, shift.clone().requires_grad_(), shift.expand(32).clone())]
        assert [float(value.detach()) for value in found] == pytest.approx([wanted] * 3, abs=0.01)


# -- the first determinant, and all others


def positive():
    V = columns(20)
    return V @ V.T


def test_the_first_determinant_needs_no_eigenvalues(monkeypatch):
    matrix, calls, eigvalsh = positive(), [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: calls.append(1) or eigvalsh(m))
    operator, found, priors = Dense(matrix), [], (0.7, 0.7, 3.0, 5.0, 0.7)
    for delta in priors:
        found.append((float(operator.logdet_ratio(delta)), len(calls)))
    assert [n for _, n in found] == [0, 0, 1, 1, 1]
    wanted = [torch.logdet(matrix + d * torch.eye(14)) - 14 * math.log(d) for d in priors]
    assert [v for v, _ in found] == pytest.approx([float(w) for w in wanted], rel=1e-10)
    assert found[0][0] == found[1][0] == found[4][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_slope(dtype):
    matrix = positive()
    delta = torch.tensor(0.7, requires_grad=True)
    slope = torch.autograd.grad(Dense(matrix.to(dtype)).logdet_ratio(delta), delta)[0]
    wanted = float(torch.linalg.inv(matrix + 0.7 * torch.eye(14)).trace()) - 14 / 0.7
    assert float(slope) == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 1e-6)  # delta is single


@pytest.mark.parametrize("rank", [5, 20])
def test_two_derivatives_in_all_shifts(rank):
    """Against autograd through the determinant itself."""
    V, delta = torch.randn(14, rank, dtype=torch.float64), torch.rand(14, dtype=torch.float64) + 0.5
    matrix = V @ V.T

    def wanted(d):
        return torch.logdet(matrix + d.diag()) - d.log().sum()

    for operator in (Dense(matrix), LowRank(V, sizes=[14])):
        for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
            torch.testing.assert_close(derivative(operator.logdet_ratio, delta), derivative(wanted, delta))


def test_at_extremes_a_second_derivative_is_refused():
    """Rather than left out, as autograd does with a function that says it has none."""
    for operator in (Dense(positive()), LowRank(columns(4), sizes=SIZES)):
        delta = torch.full((14,), 1e-14, requires_grad=True)
        assert torch.isfinite(torch.autograd.grad(operator.logdet_ratio(delta), delta)[0]).all()
        with pytest.raises(RuntimeError, match="no second one"):
            torch.autograd.grad(operator.logdet_ratio(delta), delta, create_graph=True)


@pytest.mark.parametrize("rank", [0, 1, 6, 7, 11, 14])
def test_a_matrix_without_its_rounding(rank):
    """In one piece of memory where the rank is high; both ways keep the eigenvalues, in the lower triangle."""
    V = torch.randn(14, rank, dtype=torch.float64) * torch.logspace(-2, 2, 14, dtype=torch.float64)[:, None]
    matrix, values = V @ V.T, torch.linalg.svdvals(V).square()
    found = without_rounding(matrix, 1e-12)
    lower = torch.from_numpy(found).tril()
    wanted = torch.nn.functional.pad(values.flip(0), (len(found) - rank, 0))
    scale = float(values.sum()) or 1.0
    torch.testing.assert_close(torch.linalg.eigvalsh(lower), wanted, rtol=0, atol=1e-10 * scale)
    assert int(np.count_nonzero(found.diagonal())) == rank
    ratio = float(torch.log1p(values / 3.0).sum())
    assert log_det_one_plus_over(found, 3.0) == pytest.approx(ratio, rel=1e-10)


@pytest.mark.parametrize(
    "sizes", [[1e9, 1e9, 1.0, 1e-3, 1.0], [1e8, 1.0, 1e-4, 1.0, 1.0], [1e-12, 1.0, 1e12, 1.0, 1e3]]
)
@pytest.mark.parametrize("rank", [3, 5])
def test_small_eigenvalues_beside_large_ones_count_with_one_shift(sizes, rank):
    """Features in units far apart: an eigenvalue by bisection or QR is right to the last digit of the largest."""
    V = torch.randn(5, rank, dtype=torch.float64) * torch.tensor(sizes, dtype=torch.float64)[:, None]
    for delta in (1.0, 1e-3, 1e-9):
        wanted = exact(V, torch.full((5,), delta))
        asked = Dense(V @ V.T)
        found = [asked.logdet_ratio(delta), log_det_ratio_of(Dense(V @ V.T).spectrum, torch.tensor(delta).double())]
        assert [float(f) for f in found] == pytest.approx([wanted, wanted], abs=1e-6)


def test_a_determinant_that_is_kept_is_not_handed_out():
    operator = Dense(torch.eye(3, dtype=torch.float64))
    for _ in range(3):
        found = operator.logdet_ratio(1.0)
        assert float(found) == pytest.approx(3 * math.log(2))
        found += 10


def test_a_matrix_of_nan_has_no_determinant():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Dense(torch.full((2, 2), bad)).logdet_ratio(1.0)


def test_no_factor_of_what_is_not_positive():
    assert log_det_one_plus_over(-np.ones((1, 1)), 0.5) is None


def test_columns_of_a_matrix():
    V = columns(6)
    found = pivoted_cholesky(V @ V.T, 1e-12)
    assert found.shape == (14, 6)
    torch.testing.assert_close(found @ found.T, V @ V.T)
    assert pivoted_cholesky(torch.zeros(3, 3), 1e-12).shape == (3, 0)
