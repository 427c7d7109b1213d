"""The GGN by its columns: exact unless a rank is asked for, inside a memory limit, and mergeable."""

import oracles
import pytest
import torch
from fitting import fit, likelihood_for
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNKronecker,
    LowRank,
    LowRankSum,
    Parameters,
    SqrtGGN,
    ekfac,
)
from lapkit.curvature.quantities import cross
from lapkit.curvature.quantities.running_factor import root


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def by_parameter(parameters):
    return SqrtGGN(parameters, per_parameter=True)


def test_columns_of_every_network(network):
    model, inputs = network
    x = inputs(5)
    likelihood, y, _ = likelihood_for(model, x)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    dense, blocks, whole, apart = fit(model, batches, GGNDense, GGNBlocks, SqrtGGN, by_parameter, likelihood=likelihood)
    close(whole.operator().to_dense(), dense.operator().to_dense())
    close(apart.operator().to_dense(), blocks.operator().to_dense())
    assert max(*whole.dropped().values(), *apart.dropped().values()) < 1e-12


@pytest.fixture
def problem():
    """More weights (55) than columns, and a bias with fewer."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3, bias=False))
    return model, torch.randn(8, 4), torch.arange(8) % 3


def test_columns_are_jacobians_times_roots(problem):
    """`v_{kn} = J_n^T s_{kn}`: their Gram matrix has the eigenvalues of the GGN by autograd."""
    model, x, y = problem
    (result,) = fit(model, [(x, y)], SqrtGGN)
    loss = lambda f, y: F.cross_entropy(f[None], y[None])  # noqa: E731
    expected = oracles.ggn(oracles.jacobian(model, x), oracles.output_hessian(loss, model(x), y))
    operator = result.operator()
    assert isinstance(operator, LowRank)
    assert operator.columns.shape == (60, 16)
    close(operator.to_dense(), expected)
    close(operator.eigenvalues, torch.linalg.eigvalsh(expected)[-16:])


def test_halves_add_up(problem):
    model, x, y = problem
    for make in (SqrtGGN, by_parameter):
        one, two, whole = (fit(model, [(x[p], y[p])], make)[0] for p in (slice(3), slice(3, 8), slice(8)))
        total = one + two
        assert total.count == 8
        close(total.operator().to_dense(), whole.operator().to_dense())
        close((one.operator() + two.operator()).to_dense(), whole.operator().to_dense())


def test_never_more_columns_than_weights(problem):
    model, x, y = problem
    batches = [(x, y)] * 6
    whole, apart, dense = fit(model, batches, SqrtGGN, by_parameter, GGNDense)
    assert whole.operator().rank == 60
    assert [b.rank for b in apart.operator().blocks] == [24, 6, 18, 3, 9]
    close(whole.operator().to_dense(), dense.operator().to_dense())
    double = whole + whole
    assert double.operator().rank == 60
    close(double.operator().to_dense(), 2 * dense.operator().to_dense())


def test_a_limited_rank_keeps_the_largest_part(problem):
    model, x, y = problem
    exact, small = fit(model, [(x, y)], SqrtGGN, lambda p: SqrtGGN(p, rank=5))
    values, vectors = torch.linalg.eigh(exact.operator().to_dense())
    close(small.operator().to_dense(), vectors[:, -5:] * values[-5:] @ vectors[:, -5:].T)
    assert small.dropped()["columns"] == pytest.approx(float(values[:-5].sum() / values.sum()))
    assert (small + small).operator().rank == 5
    close((small + small).operator().to_dense(), 2 * small.operator().to_dense())
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
    (streamed,) = fit(model, batches, lambda p: SqrtGGN(p, rank=14))
    assert streamed.operator().rank == 14
    assert 0 <= streamed.dropped()["columns"] < 0.05
    with pytest.raises(ValueError, match="'rank'"):
        small + exact


def test_memory_is_limited(problem):
    """60 weights of 8 bytes: 16 columns take 7680 bytes."""
    model, x, y = problem
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    fit(model, batches, lambda p: SqrtGGN(p, memory_limit=7680))
    with pytest.raises(ValueError, match=r"60 weights take .* MiB each.*GiB after 8 examples.*limit.*MonteCarloGGN"):
        fit(model, batches, lambda p: SqrtGGN(p, memory_limit=7679))
    fit(model, batches * 5, lambda p: SqrtGGN(p, rank=2, memory_limit=7680))


@pytest.mark.parametrize("options", [{"rank": 0}, {"memory_limit": 0}])
def test_impossible_settings(options):
    with pytest.raises(ValueError, match="at least 1"):
        SqrtGGN(Parameters.of(nn.Linear(2, 2)), **options)


def test_stored(problem, tmp_path):
    model, x, y = problem
    for make in (SqrtGGN, by_parameter, lambda p: SqrtGGN(p, rank=3)):
        (result,) = fit(model, [(x, y)], make)
        result.save(tmp_path / "columns.safetensors")
        again = LowRankSum.load(tmp_path / "columns.safetensors")
        close(again.operator().to_dense(), result.operator().to_dense())
        close((again + result).operator().to_dense(), 2 * result.operator().to_dense())


class Silent(torch.autograd.Function):
    """Passes nothing back, which autograd knows before it computes anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_parameters_that_the_outputs_do_not_depend_on():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.spare = nn.Linear(4, 3), nn.Parameter(torch.randn(2))

        def forward(self, x):
            return self.one(x) + Silent.apply(x[:, :2] * self.spare).sum(1, keepdim=True)

    x, y = torch.randn(5, 4), torch.arange(5) % 3
    makers = (SqrtGGN, by_parameter, GGNDense, GGNKronecker)
    whole, apart, dense, kronecker = fit(Spare(), [(x, y)], *makers)
    close(whole.operator().to_dense(), dense.operator().to_dense())
    corrected = ekfac(Spare(), Categorical(), [(x, y)]).operator()
    for operator in (apart.operator(), kronecker.operator(), corrected):
        assert not operator.to_dense()[:2].any()
        assert operator.to_dense()[2:].any()
    close((apart + apart).operator().shift(0.5).to_dense(), 2 * apart.operator().shift(0.25).to_dense())


def test_a_weight_counts_an_example_as_often(problem):
    model, x, y = problem
    times = torch.tensor([2, 0, 1, 3, 1, 1, 1, 1])
    repeated = torch.arange(8).repeat_interleave(times)
    for make in (SqrtGGN, GGNDense):
        (weighted,) = fit(model, [(x, y, times.double())], make)
        (expected,) = fit(model, [(x[repeated], y[repeated])], make)
        close(weighted.operator().to_dense(), expected.operator().to_dense())


@pytest.mark.parametrize("columns", [GGN(), EmpiricalFisher()])
@pytest.mark.parametrize("budget", [1, 2**26])
def test_the_full_matrix_from_pairs_of_layers(network, columns, budget, monkeypatch):
    """Against the columns themselves, for one column and several, an example at a time and all at once."""
    monkeypatch.setattr(cross, "BUDGET", budget)
    model, inputs = network
    x = inputs(4)
    likelihood, y, _ = likelihood_for(model, x)
    pairs, whole = fit(model, [(x, y)], GGNDense, SqrtGGN, columns=columns, likelihood=likelihood)
    close(pairs.operator().to_dense(), whole.operator().to_dense())


# -- unequal scales, single precision


SCALES = torch.tensor([1e4, 1.0, 1e-3], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [7, 60])
def test_small_curvature_is_kept_beside_large(dtype, batch):
    """Entry by entry relative to the diagonal, when there are more columns than weights: by batches, and added up."""
    scales = SCALES if dtype == torch.float32 else SCALES.square()
    x = torch.randn(60, 3) * scales
    model = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight.mul_(1e-9)
    data = [(part.to(dtype), torch.zeros(len(part), 2, dtype=dtype)) for part in x.split(batch)]
    (whole,) = fit(model, data, SqrtGGN, likelihood=Gaussian())
    inputs = torch.cat([x.to(dtype).double(), torch.ones(60, 1)], dim=1)
    expected = torch.block_diag(*[inputs.T @ inputs] * 2)
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])  # of (weight, bias)
    expected = expected[order][:, order]
    size = expected.diagonal().sqrt()
    whitened = lambda columns: columns.double() @ columns.double().T / torch.outer(size, size)  # noqa: E731
    wanted = expected / torch.outer(size, size)
    for result, times in ((whole, 1), (whole + whole, 2)):
        columns = result.operator().columns
        assert columns.dtype == dtype
        assert columns.shape == (8, 8)
        torch.testing.assert_close(whitened(columns), times * wanted, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_a_weight_without_curvature_has_no_column():
    matrix = torch.diag(torch.tensor([1e8, 0.0, 1e-12]))
    columns = root(matrix)
    torch.testing.assert_close(columns @ columns.T, matrix, rtol=1e-14, atol=0)
    assert not root(torch.zeros(2, 2)).any()


def test_directions_that_float32_would_lose_are_summed_in_float64():
    """Two inputs that differ by 1e-4 of their size: the curvature of their difference is 1e-9 of the largest."""
    x = torch.randn(50, 1) + 1e-4 * torch.randn(50, 2)
    model = nn.Linear(2, 1, bias=False).float()
    data = [(x.float(), torch.zeros(50, 1).float())]
    (result,) = fit(model, data, SqrtGGN, likelihood=Gaussian())
    values = torch.linalg.svdvals(result.operator().columns.double())
    expected = torch.linalg.svdvals(x.float().double())
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=0)


def test_a_batch_that_is_cut_leaves_less_than_the_best_and_says_so():
    model, x = nn.Linear(40, 3), torch.randn(100, 40)
    data = [(x, torch.randint(3, (100,)))]
    one, cut_up = (
        fit(model, data, lambda p, limit=limit: SqrtGGN(p, rank=3, memory_limit=limit))[0] for limit in (None, 200_000)
    )
    assert one.dropped()["columns"] < cut_up.dropped()["columns"] < 1
