"""What holds for any network and any data: the invariants of the seeds' reference problem, on random networks.

Widths, depth, activations, biases, kind of targets, convolutions and weights are drawn from a seed. What the invariants
say of the mean loss holds for lapkit's sums over examples divided by their number.
"""

from itertools import pairwise

import pytest
import torch
from random_problems import SEEDS, RandomProblem, close
from torch import nn

from lapkit.curvature import (
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNDiagonals,
    GGNKronecker,
    GGNTraces,
    GradientDots,
    GradientGram,
    GradientMoments,
    GradientNorms,
    Gradients,
    GradientSum,
    SqrtGGN,
    hessian_diagonal,
)


@pytest.fixture(params=SEEDS)
def case(request):
    return RandomProblem(request.param)


# -- gradients


def test_individual_gradients_sum_to_the_gradient(case):
    found = case.compute(each=Gradients, total=GradientSum)
    close(found["each"].matrix().sum(0), case.gradient())
    close(found["total"].vector() * case.examples, case.gradient())


def test_gradient_tests_are_pythagorean(case):
    """NormTest^2 = InnerTest^2 + OrthoTest^2, the norm test from the variances and the others from inner products."""
    found = case.compute(n=GradientNorms, d=GradientDots, m=GradientMoments, s=GradientSum, gram=GradientGram)
    n, g = case.examples, found["s"].vector().square().sum()
    along = (found["d"].tensors["dot"] / g).square()
    inner = (along.sum() - n) / n / (n - 1)
    ortho = (found["n"].squares() / g - along).sum() / n / (n - 1)
    variance = sum(v.sum() for v in found["m"].variance().values())
    close(inner + ortho, variance / g / (n - 1))
    close(found["gram"].matrix().mean(), g)
    close(found["gram"].matrix().diagonal(), found["n"].squares())


def test_early_stopping_is_the_mean_signal_to_noise(case):
    """1 - (N - 1) MeanGSNR, from sums of squares and from single gradients; where a variance is not zero."""
    found, n = case.compute(m=GradientMoments, each=Gradients), case.examples
    each = found["each"].matrix()
    g, spread = each.mean(0), each.var(0, correction=0)
    alive = spread > 1e-10 * each.square().mean()
    squares, variance, mean = (
        torch.cat([t.flatten() for t in parts.values()])[alive]
        for parts in (found["m"].sum_of_squares(), found["m"].variance(), found["m"].mean())
    )
    stopping = 1 - n * (n - 1) * (mean.square() / (squares - n * mean.square())).mean()
    close(stopping, 1 - (n - 1) * (mean.square() / variance).mean(), 1e-9)
    close(stopping, 1 - (n - 1) * (g.square() / spread)[alive].mean(), 1e-8)


# -- the GGN by its columns


def test_diagonals(case):
    """Of single examples, of the sum, of `V V^T` and of the matrix."""
    found = case.compute(each=GGNDiagonals, traces=GGNTraces, diagonal=GGNDiagonal, sqrt=SqrtGGN, dense=GGNDense)
    expected = found["dense"].operator().diagonal()
    for name in ("diagonal", "sqrt"):
        close(found[name].operator().diagonal(), expected)
    close(found["each"].matrix().sum(0), expected)
    close(found["traces"].squares(), found["each"].matrix().sum(1))


def test_traces_and_rank(case):
    """`tr G = tr V^T V = sum lambda_k`, and a rank of at most N C, or N (C - 1) for classes."""
    operator, dense = case.operators(s=SqrtGGN, d=GGNDense).values()
    for trace in (operator.gram.trace(), operator.eigenvalues.sum(), operator.trace(), dense.matrix.trace()):
        close(trace, dense.eigenvalues.sum())
    most = case.examples * (case.classes - (case.kind == "categorical"))
    assert operator.rank <= max(most, sum(case.sizes))
    assert int((dense.eigenvalues > 1e-12 * dense.eigenvalues[-1]).sum()) <= most


def eigenpairs(operator, count):
    """(VV-3) of the mean: the leading eigenvectors by those of `V^T V`."""
    values, vectors = torch.linalg.eigh(operator.gram / count)
    keep = values > 1e-5 * values[-1]
    return values[keep], operator.columns @ vectors[:, keep] / (count * values[keep]).sqrt()


def test_directional_derivatives(case):
    """Orthonormal directions; gradients and curvatures of single examples whose means are those of the whole."""
    found, n = case.compute(s=SqrtGGN, g=Gradients, d=GGNDense), case.examples
    values, directions = eigenpairs(found["s"].operator(), n)
    close(directions.T @ directions, torch.eye(len(values)))
    close((found["g"].matrix() @ directions).mean(0), directions.T @ case.gradient() / n)
    each = []
    for i in range(n):
        columns = case.operators([(case.x[i : i + 1], case.y[i : i + 1])], s=SqrtGGN)["s"].columns
        each.append((columns.T @ directions).square().sum(0))
    close(torch.stack(each).mean(0), values)
    close(((found["d"].operator().matrix / n) @ directions * directions).sum(0), values)


def test_gradients_lie_in_the_range_of_the_exact_columns(case):
    """`sum_k gamma_k^2 = |g|^2` for the exact GGN of the same examples."""
    columns, g = case.operators(s=SqrtGGN)["s"].columns, case.gradient()
    directions, values, _ = torch.linalg.svd(columns, full_matrices=False)
    gamma = directions[:, values > 1e-12 * values[0]].T @ g
    close(gamma.square().sum(), g.square().sum(), 1e-9)


def test_inverse_by_woodbury(case):
    low_rank, dense = case.operators(s=SqrtGGN, d=GGNDense).values()
    vectors = torch.randn(low_rank.size, 2)
    for delta in (0.1, torch.rand(low_rank.size) + 0.1):
        expected = torch.linalg.solve(dense.matrix + torch.diag(torch.as_tensor(delta).expand(low_rank.size)), vectors)
        close(low_rank.shift(delta).solve(vectors), expected)
        close(low_rank.shift(delta).logdet(), dense.shift(delta).logdet())


def test_overlaps(case):
    """A space with itself 1, with others between 0 and 1."""
    all_of, some = (case.operators(data, s=SqrtGGN)["s"] for data in (case.batches, case.batches[:1]))
    _, one = eigenpairs(all_of, 1)
    _, two = eigenpairs(some, 1)
    count = min(one.shape[1], two.shape[1])
    close((one.T @ one).square().sum() / one.shape[1], torch.tensor(1.0))
    overlap = float((one[:, -count:].T @ two[:, -count:]).square().sum()) / count
    assert -1e-12 <= overlap <= 1 + 1e-12


# -- blocks of the Hessian


def test_blocks_by_hessian_backpropagation(case):
    """Mode "ggn" against the blocks of `V V^T`, mode "hessian" against autograd."""
    matrix = case.operators(s=SqrtGGN)["s"].to_dense()
    for mode, whole in (("ggn", matrix), ("hessian", case.hessian())):
        blocks = case.hbp(mode)
        for name, expected in zip(case.names, case.diagonal_blocks(whole), strict=True):
            close(blocks[name], expected)


def smallest(matrix):
    """The smallest eigenvalue in units of the largest entry."""
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) / max(float(matrix.abs().max()), 1e-12)


def test_positive_curvature_is_ordered(case):
    """abs >= clip >= GGN >= 0 and clip >= Hessian, as matrices, for each block."""
    absolute, clipped, ggn, hessian = (case.hbp(mode) for mode in ("pch-abs", "pch-clip", "ggn", "hessian"))
    for name in case.names:
        scale = absolute[name].abs().max()
        for larger, lesser in pairwise((absolute, clipped, ggn)):
            assert float(torch.linalg.eigvalsh(larger[name] - lesser[name])[0]) >= -1e-12 * scale
        assert float(torch.linalg.eigvalsh(clipped[name] - hessian[name])[0]) >= -1e-12 * scale
        assert smallest(ggn[name]) >= -1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_piecewise_linear_networks(seed):
    """Blocks and diagonal of the Hessian are those of the GGN."""
    case = RandomProblem(seed, [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
    hessian, ggn = case.hbp("hessian"), case.hbp("ggn")
    for name in case.names:
        close(hessian[name], ggn[name])
    diagonal = hessian_diagonal(case.model, case.likelihood, case.batches)
    close(diagonal.diagonal(), case.operators(d=GGNDiagonal)["d"].diagonal())


def test_diagonal_of_the_hessian(case):
    diagonal = hessian_diagonal(case.model, case.likelihood, case.batches)
    close(diagonal.diagonal(), case.hessian().diagonal())


# -- Kronecker factors


def test_kronecker_factor_of_a_bias_is_its_block(case):
    kron, exact = case.operators(k=GGNKronecker, b=GGNBlocks).values()
    for name, ours, block in zip(case.names, kron.blocks, exact.blocks, strict=True):
        if "bias" in name:
            close(ours.to_dense(), block.to_dense())


def test_order_of_kronecker_factors(case):
    """`B (x) A` for weights in rows is `A (x) B` for weights in columns; exact for one example and a linear layer."""
    one = [(case.x[:1], case.y[:1])]
    kron, exact = case.compute(one, k=GGNKronecker), case.operators(one, b=GGNBlocks)["b"]
    for i, (name, p) in enumerate(case.model.named_parameters()):
        if p.ndim == 2:
            b, a = (f[0] for f in kron["k"].factors(name))
            rows = torch.arange(p.numel()).view(p.shape).T.flatten()
            block = exact.blocks[i].to_dense()
            close(torch.kron(b, a), block)
            close(torch.kron(a, b), block[rows][:, rows])
