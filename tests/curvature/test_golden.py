"""Golden numbers of problem REF that take several results at once: ViViT, Cockpit's instruments, pruning, alpha.

lapkit has no names for most of them: each is a line or two over its results, and says that those are right together.
The other numbers are in `test_reference_problem` (GGN, factors, determinants, variances), `test_first_order`,
`test_hbp_reference` (Hessian, HBP, KFRA), `test_spectrum` and `test_products` (extreme eigenvalues), and
`facade/test_laplace` (evidence and its maximum).
"""

from functools import partial

import pytest
import reference_problem as ref
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lapkit.curvature import (
    Categorical,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    GradientDots,
    GradientMoments,
    GradientNorms,
    Gradients,
    GradientSum,
    HessianProduct,
    KroneckerProduct,
    LowRank,
    Parameters,
    SqrtGGN,
    compute,
    hessian_diagonal,
)
from lapkit.posteriors import Fit, GaussianPrior, log_evidence

N, P = ref.EXAMPLES, ref.PARAMETERS
DATA = [(ref.inputs(), ref.labels())]
FIRST_ORDER = {
    "norms": GradientNorms,
    "moments": GradientMoments,
    "dots": GradientDots,
    "each": Gradients,
    "sum": GradientSum,
}


def golden(value, digits=10):
    """Numbers are printed with so many digits, or to so many after the decimal point."""
    return pytest.approx(value, rel=10.0 ** (1 - digits), abs=10.0**-digits)


@pytest.fixture
def first():
    return compute(ref.model(), Categorical(), DATA, FIRST_ORDER)


@pytest.fixture
def curvature():
    return compute(ref.model(), Categorical(), DATA, {"sqrt": SqrtGGN, "dense": GGNDense, "kron": GGNKronecker})


def flat(parts):
    return torch.cat([t.flatten() for t in parts.values()])


def weights(model):
    return parameters_to_vector(model.parameters()).detach()


def mean_ggn(curvature):
    """The GGN of the mean loss by its columns."""
    return curvature["sqrt"].operator().scale(1 / N)


def leading(operator, count):
    """Eigenvalues, largest first, and eigenvectors of `V V^T` by those of `V^T V` (VV-3)."""
    values, vectors = torch.linalg.eigh(operator.gram)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    return values, operator.root @ vectors / values.sqrt()


# -- ViViT


def signal_to_noise(samples):
    return samples.mean(0).square() / samples.var(0)


def directional_curvatures(columns, directions):
    """`|V_n^T e_k|^2`, (N, K), with the columns of one example after those of all examples of the column before."""
    inner = columns.T @ directions
    return inner.unflatten(0, (-1, N)).square().sum(0)


def test_directional_derivatives(first, curvature):
    """(VV-4), (VV-5), (VV-6): gradients and curvatures of single examples along the three leading eigenvectors."""
    values, directions = leading(mean_ggn(curvature), 3)
    gamma = first["each"].matrix() @ directions
    assert gamma.mean(0).abs().tolist() == golden([0.2210969608, 0.3336290824, 0.0941191722])
    curvatures = directional_curvatures(curvature["sqrt"].operator().columns, directions)
    expected = [2.5177132134, 4.3595422638, 2.2223712006, 2.2153959391, 4.1684055908, 2.2124101081]
    assert curvatures[:, 0].tolist() == golden(expected)
    assert curvatures.mean(0).tolist() == golden(values.tolist(), 12)
    assert signal_to_noise(curvatures).tolist() == golden([8.2506985226, 13.3632128521, 2.9393900156])
    assert signal_to_noise(gamma).tolist() == golden([0.0099788332, 0.1455414673, 0.0429199677])


def test_damped_newton_step(first, curvature):
    step = mean_ggn(curvature).shift(0.1).solve(first["sum"].vector())
    assert float(step.norm()) == golden(1.745865605238, 12)


def overlap(one, two):
    """(VV-15)."""
    return float((one.T @ two).square().sum() / one.shape[1])


def test_overlaps_of_eigenspaces(curvature):
    """Leading three of the GGN and of the Hessian; GGN of three examples and of all."""
    _, ours = leading(mean_ggn(curvature), 3)
    hessian = HessianProduct(ref.model(), Categorical(), DATA) @ torch.eye(P)
    assert overlap(ours, torch.linalg.eigh(hessian).eigenvectors[:, -3:]) == golden(0.7330106715)
    some = compute(ref.model(), Categorical(), [(ref.inputs()[:3], ref.labels()[:3])], {"sqrt": SqrtGGN})
    assert overlap(ours, leading(some["sqrt"].operator(), 3)[1]) == golden(0.9525240220)


def test_balance_of_kronecker_factors(curvature):
    """(B.22): the damped inverse of the mean loss' factors has `B + I / pi` and `A + pi I` for a damping of one."""
    for name, expected in zip("024", [6.899876751548, 1.122223645834, 1.001008522908], strict=True):
        b, a = curvature["kron"].factors(f"{name}.weight")
        product = KroneckerProduct(b / N, a).damped_inverse(1.0)
        left, right = (torch.linalg.inv(m[0]) - f[0] for m, f in ((product.left, b / N), (product.right, a)))
        assert right.diagonal().tolist() == golden([expected] * len(right), 12)
        assert left.diagonal().tolist() == golden([1 / expected] * len(left), 12)


# -- Cockpit


def test_gradient_tests(first):
    """(C.16c), (C.19c), (C.22b)."""
    squares, dots, g = first["norms"].squares(), first["dots"].tensors["dot"], first["sum"].vector()
    lengths, along = squares / (g @ g), (dots / (g @ g)).square()
    pairs = N * (N - 1)
    assert float(((lengths.sum() - N) / pairs).sqrt()) == golden(2.124643319990, 12)
    assert float(((along.sum() - N) / pairs).sqrt()) == golden(1.093120414589, 12)
    assert float(((lengths - along).sum() / pairs).sqrt()) == golden(1.821866349760, 12)


def test_batch_size_and_stopping(first):
    """(C.9), (C.11d), (C.28)."""
    g, variance = first["sum"].vector(), flat(first["moments"].variance())
    loss = float(first.totals.loss) / N
    assert 0.1 * float(variance.sum()) / loss == golden(0.400691441099, 12)
    ratio = g.square() / variance
    assert float(ratio.mean()) == golden(0.118435163284, 12)
    spread = flat(first["moments"].sum_of_squares()) - N * g.square()
    assert 1 - N * (N - 1) / P * float((g.square() / spread).sum()) == golden(0.407824183578, 12)


def test_takeuchi_criteria(first, curvature):
    """(C.25), (C.26), by Hessian and by GGN."""
    second = flat(first["moments"].second_moment())
    ggn = curvature["dense"].operator().diagonal() / N
    hessian = hessian_diagonal(ref.model(), Categorical(), DATA).diagonal() / N
    assert float(second.sum() / hessian.sum()) == golden(1.503358938511, 12)
    assert float(second.sum() / ggn.sum()) == golden(1.341098788184, 12)
    assert float((second / ggn).sum()) == golden(68.166563086996, 12)
    assert float((second / hessian).sum()) == golden(1.666934158907, 12)


def observed(model, step):
    """Mean loss and its slope along a step, with the variances of both over the examples."""
    found = compute(model, Categorical(), DATA, {"slopes": partial(GradientDots, vectors=step)})
    slopes = found["slopes"].tensors["dot"][:, 0]
    losses = torch.nn.functional.cross_entropy(model(ref.inputs()), ref.labels(), reduction="none").detach()
    assert float(losses.mean()) == pytest.approx(float(found.totals.loss) / N, rel=1e-14)
    return (losses.mean(), losses.var(correction=0)), (slopes.mean(), slopes.var(correction=0))


def alpha(rate, length=1.0):
    """(C.7): a parabola through losses and slopes at both ends of a gradient step, weighted by their noise.

    The step counts as this length.
    """
    model = ref.model()
    g = compute(model, Categorical(), DATA, {"sum": GradientSum})["sum"].vector()
    step = -rate * g
    start = observed(model, step / length)
    vector_to_parameters(weights(model) + step, model.parameters())
    end = observed(model, step / length)
    values, variances = zip(start[0], end[0], start[1], end[1], strict=True)
    design = torch.tensor([[1, 0, 0], [1, length, length**2], [0, 1, 0], [0, 1, 2 * length]])
    noise = torch.stack(variances).sqrt()
    w = torch.linalg.lstsq(design / noise[:, None], (torch.stack(values) / noise)[:, None]).solution[:, 0]
    return float(length / (-w[1] / (2 * w[2])) - 1)


@pytest.mark.parametrize(("rate", "expected"), [(0.05, -0.949095364885), (0.5, -0.464156045335)])
def test_alpha(rate, expected):
    assert alpha(rate) == golden(expected, 12)
    for length in (0.01, 3.0):  # whatever unit the step is measured in
        assert alpha(rate, length) == golden(expected, 10)


def test_importance_sampling(first):
    """(3.38): uniform sampling and sampling by the gradients' norms, which is optimal."""
    squared = first["sum"].vector().square().sum()
    assert float(first["norms"].squares().mean() - squared) == golden(5.027528732043, 12)
    assert float(first["norms"].norms().mean().square() - squared) == golden(4.447067532067, 12)


# -- evidence


@pytest.mark.parametrize(
    ("structure", "kind"),
    [
        ("full", GGNDense),
        ("full", SqrtGGN),
        ("block_diagonal", GGNBlocks),
        ("kron", GGNKronecker),
        ("diag", GGNDiagonal),
    ],
)
def test_best_prior_precision(structure, kind):
    """The evidence at its maximum, where its slope by bisection is zero.

    The printed maximisers were found by their values, which are flat there: they hold to eight digits.
    """
    results = compute(ref.model(), Categorical(), DATA, {"H": kind})
    parameters, totals = Parameters.of(ref.model()), results.totals
    operator = results["H"].operator()
    best = stationary(torch.linalg.eigvalsh(operator.to_dense()).clamp_min(0), parameters.vector().square().sum())
    assert best == pytest.approx(ref.BEST_PRIOR_PRECISION[structure], rel=5e-8)
    fit = Fit(parameters, parameters.vector(), operator, totals.loss, totals.count, totals.outputs)
    delta = torch.tensor(best, requires_grad=True)
    value = log_evidence(fit, Categorical(), GaussianPrior(delta))
    assert float(value.detach()) == golden(ref.BEST_LOG_EVIDENCE[structure], 12)
    (slope,) = torch.autograd.grad(value, delta)
    assert abs(float(slope)) < 1e-10 * P / best


def stationary(eigenvalues, squared_norm):
    """Where `P / tau = |theta|^2 + sum_k 1 / (lambda_k + tau)`, the slope falling through zero."""
    low, high = 0.01, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        slope = P / middle - squared_norm - (1 / (eigenvalues + middle)).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


# -- pruning


def test_saliencies(curvature):
    """(3.34b): OBS and OBD of the damped GGN, and OBD of the GGN alone."""
    damped, squares = mean_ggn(curvature).shift(0.1), weights(ref.model()).square()
    surgeon, damage = squares / damped.inverse_diagonal() / 2, squares * damped.diagonal() / 2
    assert surgeon.argsort()[:5].tolist() == [2, 30, 3, 13, 37]
    assert damage.argsort()[:5].tolist() == [2, 30, 3, 13, 32]
    assert [float(surgeon.min()), float(damage.min())] == pytest.approx([2.98944e-7, 3.23649e-7], rel=1e-5)
    assert [float(surgeon.sum()), float(damage.sum())] == golden([3.288303330504, 4.478899738049], 12)
    alone = squares * mean_ggn(curvature).diagonal() / 2
    assert float(alone.sum()) == golden(1.349260625323, 12)


def test_extreme_eigenvalues_of_the_regression():
    """Seeds, erratum 20: nearly opposite, so that power iteration for the largest fails. Four digits are given.

    The mean over examples of `|f - y|^2 / C`, which is 2 / C times lapkit's.
    """
    product = HessianProduct(ref.model(), Gaussian(), [(ref.inputs(), ref.targets())])
    values = torch.linalg.eigvalsh((product @ torch.eye(P)) * 2 / ref.CLASSES / N)
    assert [float(values[-1]), float(values[0])] == pytest.approx([12.07, -11.97], abs=5e-3)


def test_columns_and_blocks_have_the_same_traces(curvature):
    """The trace of the whole is that of the blocks, by columns of each parameter."""
    found = compute(ref.model(), Categorical(), DATA, {"s": partial(SqrtGGN, per_parameter=True), "b": GGNBlocks})
    for columns, block, expected in zip(
        found["s"].operator().blocks, found["b"].operator().blocks, ref.GGN_MEAN_TRACES, strict=True
    ):
        assert isinstance(columns, LowRank)
        assert float(columns.trace()) / N == golden(expected)
        assert float(block.trace()) / N == golden(expected)
