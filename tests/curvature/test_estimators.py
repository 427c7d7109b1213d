"""Stochastic estimates against what they estimate: in expectation, in variance, and where they are exact."""

import pytest
import reference_problem as ref
import torch

from lapkit.curvature import (
    Categorical,
    Dense,
    Diagonal,
    GGNProduct,
    diagpp_diagonal,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    squared_norm,
)
from lapkit.curvature.products.estimators import gaussian, rademacher

SIZE = 20
SCALARS = {
    hutchinson_trace: lambda A: A.trace(),
    hutchpp_trace: lambda A: A.trace(),
    squared_norm: lambda A: A.square().sum(),
}
DIAGONALS = (hutchinson_diagonal, diagpp_diagonal)
DEFLATED = (hutchpp_trace, diagpp_diagonal)


def symmetric(decay=0.3):
    """Eigenvalues of both signs, `(k + 1)^-decay` in size."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE))[0]
    values = (torch.arange(SIZE) + 1.0) ** -decay * torch.where(torch.arange(SIZE) % 3 == 1, -1, 1)
    return basis * values @ basis.T


def generator(seed):
    return torch.Generator().manual_seed(seed)


def many(estimator, matrix, count=400, **options):
    """The values and standard errors of independent estimates, stacked."""
    estimates = [estimator(Dense(matrix), **options, generator=generator(s)) for s in range(count)]
    return torch.stack([e.value for e in estimates]), torch.stack([e.standard_error for e in estimates])


@pytest.mark.parametrize("draw", [rademacher, gaussian])
@pytest.mark.parametrize("estimator", [*SCALARS, *DIAGONALS])
def test_unbiased_with_the_error_it_says(estimator, draw):
    """The ratio for normal probes is unbiased in the limit only, so it gets many of them."""
    matrix = symmetric()
    budget = 60 if estimator in DIAGONALS and draw is gaussian else 12
    values, errors = many(estimator, matrix, draw=draw, **{"products" if estimator in DEFLATED else "probes": budget})
    expected = SCALARS[estimator](matrix) if estimator in SCALARS else matrix.diagonal()
    spread = values.std(0)
    assert ((values.mean(0) - expected).abs() < 5 * spread / len(values) ** 0.5 + 1e-12).all()
    # Standard errors are right on the mean of squares; 400 of them tell that to some per cent.
    torch.testing.assert_close(errors.square().mean(0), spread.square(), rtol=0.45, atol=1e-20)


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_variance_of_the_trace(draw):
    matrix = symmetric()
    values, _ = many(hutchinson_trace, matrix, 2000, draw=draw, probes=2)
    variance = 2 * matrix.square().sum() - (2 * matrix.diagonal().square().sum() if draw is rademacher else 0)
    assert float(2 * values.var()) == pytest.approx(float(variance), rel=0.15)


def test_variance_of_the_diagonal():
    matrix = symmetric()
    values, _ = many(hutchinson_diagonal, matrix, 2000, probes=2)
    variance = matrix.square().sum(1) - matrix.diagonal().square()
    torch.testing.assert_close(2 * values.var(0), variance, rtol=0.2, atol=0)


def test_signs_are_exact_for_diagonal_matrices():
    matrix = Diagonal(torch.randn(SIZE))
    trace, diagonal, norm = (f(matrix, 2) for f in (hutchinson_trace, hutchinson_diagonal, squared_norm))
    torch.testing.assert_close(trace.value, matrix.values.sum())
    torch.testing.assert_close(diagonal.value, matrix.values)
    torch.testing.assert_close(norm.value, matrix.values.square().sum())
    assert all((e.standard_error < 1e-7).all() for e in (trace, diagonal, norm))


@pytest.mark.parametrize("rank", [1, 5, 6])
def test_exact_up_to_a_third_of_the_products(rank):
    root = torch.randn(SIZE, rank)
    matrix = Dense(root @ root.T)
    for estimate, expected in (
        (hutchpp_trace(matrix, 18), matrix.matrix.trace()),
        (diagpp_diagonal(matrix, 18), matrix.matrix.diagonal()),
    ):
        torch.testing.assert_close(estimate.value, expected)
        assert (estimate.standard_error < 1e-7).all()
        assert estimate.products == 18


def test_not_exact_above():
    matrix = Dense(symmetric())
    assert hutchpp_trace(matrix, 18).standard_error > 1e-3


@pytest.mark.parametrize("estimator", DEFLATED)
def test_more_products_than_weights(estimator):
    estimate = estimator(Dense(symmetric()), 100)
    assert (estimate.standard_error < 1e-7).all()


def test_less_variance_for_decaying_spectra():
    """The point of Hutch++: an error of 1/m instead of 1/sqrt(m)."""
    matrix = symmetric(decay=2.0)
    plain, _ = many(hutchinson_trace, matrix, 100, probes=18)
    deflated, _ = many(hutchpp_trace, matrix, 100, products=18)
    assert deflated.std() < 0.1 * plain.std()


@pytest.mark.parametrize("estimator", [*SCALARS, *DIAGONALS])
def test_only_the_generator_matters(estimator):
    matrix = Dense(symmetric())
    one, same, other = (estimator(matrix, 12, generator=generator(s)).value for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    estimator(matrix, 12, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_add_up():
    """With a fixed list of probes, chunks of it give the same."""
    matrix = Dense(symmetric())
    fixed = torch.randn(SIZE, 12)

    def next_ones(count_of_all):
        rest = [count_of_all]

        def draw(matrix, count, generator):
            start = 12 - rest[0]
            rest[0] -= count
            return fixed[:, start : start + count]

        return draw

    for estimator in (hutchinson_trace, hutchinson_diagonal, squared_norm):
        whole = estimator(matrix, 12, draw=next_ones(12))
        parts = estimator(matrix, 12, draw=next_ones(12), chunk=5)
        torch.testing.assert_close(parts.value, whole.value)
        torch.testing.assert_close(parts.standard_error, whole.standard_error)


def test_error_of_the_diagonal():
    """For signs, that of a plain mean."""
    matrix = Dense(symmetric())
    z = rademacher(matrix, 5, generator(0))
    estimate = hutchinson_diagonal(matrix, 5, generator=generator(0))
    samples = z * (matrix.matrix @ z)
    torch.testing.assert_close(estimate.value, samples.mean(1))
    torch.testing.assert_close(estimate.standard_error, samples.std(1) / 5**0.5)


@pytest.mark.parametrize("estimator", [*SCALARS, *DIAGONALS])
@pytest.mark.parametrize("count", [6, 13, 100])
def test_as_many_products_as_asked_for(estimator, count):
    counted = []

    class Counted:
        size, dtype, device = SIZE, torch.float64, torch.device("cpu")

        def matmul(self, vectors):
            counted.append(vectors.shape[1])
            return 2 * vectors

    assert estimator(Counted(), count).products == sum(counted) == count


def test_too_few_probes():
    matrix = Dense(symmetric())
    for estimator in (hutchinson_trace, hutchinson_diagonal, squared_norm):
        with pytest.raises(ValueError, match="two probes"):
            estimator(matrix, 1)
        with pytest.raises(ValueError, match="two probes"):
            estimator(matrix, 4, chunk=0)
    for estimator in DEFLATED:
        with pytest.raises(ValueError, match="six"):
            estimator(matrix, 5)


def test_single_precision_stays():
    matrix = Dense(symmetric().float())
    for estimator in (*SCALARS, *DIAGONALS):
        estimate = estimator(matrix, 12)
        assert estimate.value.dtype == estimate.standard_error.dtype == torch.float32


def test_matrix_free_products():
    product = GGNProduct(ref.model(), Categorical(), [(ref.inputs(), ref.labels())])
    trace, diagonal = hutchpp_trace(product, 36), diagpp_diagonal(product, 36)  # rank 12
    assert float(trace.value) / ref.EXAMPLES == pytest.approx(ref.GGN_MEAN_TRACE, rel=1e-10)
    parts = (diagonal.value / ref.EXAMPLES).split(product.chosen.sizes)
    assert [float(p.sum()) for p in parts] == pytest.approx(ref.GGN_MEAN_TRACES, rel=1e-8)
