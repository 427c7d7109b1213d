"""The golden numbers of problem REF that belong to ViViT, and the invariants of the seeds on random networks."""

import pytest
import reference_problem as ref
import torch
from random_problems import SEEDS, RandomProblem, close

from lapkit.curvature import (
    Categorical,
    CustomColumns,
    Gaussian,
    GGNDense,
    GGNProduct,
    HessianProduct,
    MonteCarloGGN,
    eigenspace_overlap,
    largest_eigenpairs,
    magnitude_error,
    vivit,
)

BATCH = (ref.inputs(), ref.labels())


def golden(value, digits=10):
    """Numbers are printed with so many digits, or to so many after the decimal point."""
    return pytest.approx(value, rel=10.0 ** (1 - digits), abs=10.0**-digits)


def reference(**options):
    return vivit(ref.model(), Categorical(), BATCH, **options)


def test_reference_eigenvalues():
    spectrum = reference().spectrum
    assert spectrum.rank == ref.GGN_RANK == 12
    assert spectrum.eigenvalues[:5].tolist() == golden(list(ref.GGN_MEAN_TOP_EIGENVALUES))
    assert float(spectrum.gram_trace) == golden(ref.GGN_MEAN_TRACE, 12)
    assert float(spectrum.trace().value) == golden(ref.GGN_MEAN_TRACE, 12)
    blocks = reference(groups="parameters")
    assert [float(s.gram_trace) for s in blocks.values()] == golden(list(ref.GGN_MEAN_TRACES))


def test_reference_directions():
    known = reference().spectrum.directions(3)
    assert known.gradient.abs().tolist() == golden([0.2210969608, 0.3336290824, 0.0941191722])
    expected = [2.5177132134, 4.3595422638, 2.2223712006, 2.2153959391, 4.1684055908, 2.2124101081]
    assert known.curvatures[:, 0].tolist() == golden(expected)
    assert known.curvature_snr().tolist() == golden([8.2506985226, 13.3632128521, 2.9393900156])
    assert known.gradient_snr().tolist() == golden([0.0099788332, 0.1455414673, 0.0429199677])


def test_reference_steps():
    """The complement of the exact GGN of the same examples is nothing."""
    spectrum = reference().spectrum
    step, g = spectrum.newton_step(0.1), spectrum.gradient()
    assert float(step.norm()) == golden(1.745865605238, 12)
    assert float(g.norm()) == golden(ref.MEAN_GRADIENT_NORM, 12)
    close(spectrum.newton_step(0.1, complement=0.1), step, 1e-11)
    close(-spectrum.inverse_product(g, 0.1), step, 1e-11)
    close(reference().newton_step(0.1), step)


def test_reference_overlaps():
    """Leading three of the GGN and of the Hessian; GGN of three examples and of all."""
    spectrum = reference().spectrum
    hessian = largest_eigenpairs(HessianProduct(ref.model(), Categorical(), [BATCH]), 3)
    assert spectrum.overlap(hessian.vectors, 3) == golden(0.7330106715)
    few = reference(curvature_examples=3)
    assert few.spectrum.overlap(spectrum, 3) == golden(0.9525240220)
    assert few.spectrum.overlap(spectrum, 3, 3) == golden(0.9525240220)
    close(few.spectrum.directions(3).gradient, few.spectrum.eigenvectors(3).T @ spectrum.gradient())
    assert spectrum.overlap(spectrum, [0, 2, 4]) == pytest.approx(1, abs=1e-10)
    assert spectrum.overlap(spectrum, [0, 1], [2, 3]) == pytest.approx(0, abs=1e-10)
    assert spectrum.overlap(spectrum, 1, 4) == pytest.approx(0.5, abs=1e-10)  # one inside four


def test_reference_regression():
    """Seeds' loss is the mean over outputs, 2 / C times lapkit's."""
    batch = (ref.inputs(), ref.targets())
    spectrum = vivit(ref.model(), Gaussian(), batch).spectrum
    matrix = GGNProduct(ref.model(), Gaussian(), [batch])
    dense = matrix.to_dense() / 6
    assert float(spectrum.gram_trace) == pytest.approx(float(dense.trace()), rel=1e-12)
    assert magnitude_error(spectrum, matrix, 10, count=6) < 1e-10
    assert magnitude_error(spectrum, matrix, 10, count=12) == pytest.approx(1)


# -- random networks


@pytest.fixture(params=SEEDS)
def case(request):
    return RandomProblem(request.param)


def spectrum_of(case, **options):
    return vivit(case.model, case.likelihood, (case.x, case.y), **options).spectrum


def test_trace_rank_and_means(case):
    spectrum = spectrum_of(case)
    n, c = case.examples, case.classes
    assert spectrum.rank <= n * (c - 1 if case.kind == "categorical" else c)
    close(spectrum.eigenvalues.sum(), spectrum.gram_trace)
    known = spectrum.directions()
    close(known.curvatures.mean(0), spectrum.eigenvalues)
    assert (known.curvatures >= 0).all()
    close(known.gradient, known.gradients.mean(0))


def test_gradient_lies_in_the_range(case):
    """`sum_k gamma_k^2 = |g|^2` for the exact GGN of the same examples: the complement is nothing."""
    spectrum, g = spectrum_of(case), case.gradient() / case.examples
    close(spectrum.gradient(), g)
    close(spectrum.directions().gradient.square().sum(), g.square().sum(), 1e-8)


def test_woodbury(case):
    spectrum = spectrum_of(case)
    dense = case.operators(ggn=GGNDense)["ggn"].matrix / case.examples
    v = torch.randn(len(dense), 2)
    close(spectrum.inverse_product(v, 0.01), torch.linalg.solve(dense + 0.01 * torch.eye(len(dense)), v), 1e-8)
    close(spectrum.to_dense(), dense, 1e-9)


def test_repeated_and_permuted_examples(case):
    """Means do not change; a second copy of the data adds columns and no rank."""
    once = spectrum_of(case)
    order = torch.randperm(case.examples)
    for x, y in [(torch.cat([case.x, case.x]), torch.cat([case.y, case.y])), (case.x[order], case.y[order])]:
        other = vivit(case.model, case.likelihood, (x, y)).spectrum
        k = int((once.eigenvalues > 1e-6 * once.eigenvalues[0]).sum())
        close(other.eigenvalues[:k], once.eigenvalues[:k], 1e-9)
        close(other.directions(k).gradient.abs(), once.directions(k).gradient.abs(), 1e-6)
        assert other.overlap(once, k) == pytest.approx(1, abs=1e-8)


def test_overlap_lies_between_0_and_1(case):
    spectrum = spectrum_of(case)
    basis, _ = torch.linalg.qr(torch.randn(spectrum.size, 2))
    both = spectrum.overlap(basis, 1), eigenspace_overlap(basis, spectrum.eigenvectors(1))
    assert 0 <= both[0] <= 1
    assert both[0] == pytest.approx(both[1])


def test_examples_as_indices_are_examples_alone(case):
    """Curvature of some examples is that of a batch of them."""
    some = [case.examples - 1, 0]
    part = vivit(case.model, case.likelihood, (case.x[some], case.y[some])).spectrum
    close(spectrum_of(case, curvature_examples=some).eigenvalues, part.eigenvalues, 1e-8)


# -- Monte Carlo


def test_all_outcomes_together_are_the_exact_curvature():
    """`sum_c p_c s_c s_c^T` over all classes that could be drawn, each with the square root of its probability."""

    def outcomes(likelihood, f, y, draws):
        p = f.softmax(-1)
        return torch.stack(
            [likelihood.loss_gradient(f, torch.full_like(y, c)) * p[:, c, None].sqrt() for c in range(f.shape[1])]
        )

    exact, drawn = reference().spectrum, reference(columns=CustomColumns(outcomes)).spectrum
    close(drawn.eigenvalues[:10], exact.eigenvalues[:10], 1e-8)
    assert drawn.overlap(exact, 5) == pytest.approx(1, abs=1e-9)
    close(drawn.matmul(exact.gradient()), exact.matmul(exact.gradient()), 1e-9)


def test_monte_carlo_is_unbiased():
    """The mean of products over many draws, within five standard errors."""
    exact = reference().spectrum
    v = exact.eigenvectors(1)[:, 0]
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([reference(columns=MonteCarloGGN(1), generator=generator, gradients=False).spectrum.matmul(v)
                         for _ in range(150)])  # fmt: skip
    error = (found.mean(0) - exact.matmul(v)).abs()
    assert (error <= 5 * found.std(0) / 150**0.5 + 1e-12).all()
    assert found.std(0).max() > 0.1


def test_monte_carlo_has_fewer_columns_and_repeats_itself():
    """One seed, one answer; more samples, more columns; drawn for the example and not for its place."""

    def drawn(seed=3, **options):
        return reference(columns=MonteCarloGGN(2), generator=torch.Generator().manual_seed(seed), **options).spectrum

    one = drawn()
    assert one.rank <= 12
    assert torch.equal(one.eigenvalues, drawn().eigenvalues)
    assert not torch.allclose(one.eigenvalues[:3], drawn(4).eigenvalues[:3])
    part, order = drawn(curvature_examples=[5, 2]), drawn(curvature_examples=[2, 5])
    close(part.eigenvalues, order.eigenvalues)
    residue = one.inverse_product(one.gradient(), 0.5) + one.newton_step(0.5, complement=0.5)
    assert residue.abs().max() < 1e-12
    assert (one.newton_step(0.5) - one.newton_step(0.5, complement=0.5)).norm() > 1e-3  # gradients leave the range
