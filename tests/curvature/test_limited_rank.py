"""The GGN by few columns: batches merged without being expanded, what is lost, and what takes over beyond P columns."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    DenseJacobian,
    EmpiricalFisher,
    GGNDense,
    LowRankSum,
    OuterProduct,
    Parameters,
    SqrtGGN,
    accumulate,
)
from lapkit.curvature.quantities import running_factor
from lapkit.curvature.quantities.running_factor import RunningFactor, root
from lapkit.curvature.quantities.sqrt_ggn import joined


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def fit(model, batches, likelihood, *makers, columns=None, **options):
    parameters = Parameters.of(model)
    made = [make(parameters) for make in makers]
    accumulate(model, parameters, likelihood, columns or GGN(), batches, made, **options)
    return [quantity.result() for quantity in made]


def limited(rank, **options):
    return lambda parameters: SqrtGGN(parameters, rank=rank, **options)


def check_best(columns, matrix, tolerance=1e-9):
    """The largest eigenvalues of the matrix, and nothing above it: a nearest matrix of that rank."""
    scale = float(matrix.diagonal().sum()) + 1e-300
    found = torch.linalg.eigvalsh(columns.T @ columns)
    expected = torch.linalg.eigvalsh(matrix)[-columns.shape[1] :]
    close(found / scale, expected / scale, tolerance)
    check_below(columns, matrix, tolerance)


def check_below(columns, matrix, tolerance=1e-9):
    rest = torch.linalg.eigvalsh(matrix - columns @ columns.T)
    assert float(rest.min()) >= -tolerance * float(matrix.diagonal().sum())


def problem_of(network):
    model, inputs = network
    x = inputs(5)
    with torch.no_grad():
        outputs = model(x).reshape(5, -1).shape[1]
    likelihood = Bernoulli() if outputs == 1 else Categorical()
    return model, x, torch.arange(5) % max(outputs, 2), likelihood


def test_one_batch_of_every_network(network):
    """Fewer columns than the batch has: a nearest matrix, over all weights and for each parameter."""
    model, x, y, likelihood = problem_of(network)
    dense, whole, apart = fit(
        model, [(x, y)], likelihood, GGNDense, limited(3), limited(2, per_parameter=True), columns=EmpiricalFisher()
    )
    matrix = dense.operator().matrix
    check_best(whole.tensors["columns"], matrix, 1e-7)
    starts = torch.tensor([0, *(t.numel() for t in Parameters.of(model).tensors)]).cumsum(0).tolist()
    for name, start, stop in zip(whole.shapes, starts, starts[1:], strict=False):
        check_best(apart.tensors[f"columns/{name}"], matrix[start:stop, start:stop], 1e-7)


def test_several_batches_of_every_network(network):
    """What is lost is what is reported."""
    model, x, y, likelihood = problem_of(network)
    batches = list(zip(x.split(3), y.split(3), strict=True))
    dense, whole = fit(model, batches, likelihood, GGNDense, limited(2))
    matrix, columns = dense.operator().matrix, whole.tensors["columns"]
    check_below(columns, matrix, 1e-7)
    close(whole.tensors["trace"], matrix.trace(), 1e-7)
    expected = 1 - float(columns.square().sum()) / float(matrix.trace())
    assert whole.dropped()["columns"] == pytest.approx(max(expected, 0), abs=1e-9)


class Wide(nn.Module):
    """More weights (125) than a batch has columns."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x):
        return self.two(self.one(x).tanh())


@pytest.fixture
def problem():
    return Wide(), torch.randn(24, 6), torch.arange(24) % 5


def cut(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def refuse(*_):
    raise AssertionError("Expanded.")


def test_a_batch_is_not_expanded(problem, monkeypatch):
    model, x, y = problem
    (dense,) = fit(model, [(x, y)], Categorical(), GGNDense)
    monkeypatch.setattr(OuterProduct, "to_dense", refuse)
    monkeypatch.setattr(OuterProduct, "block", refuse)
    (whole,) = fit(model, [(x, y)], Categorical(), limited(7))
    check_best(whole.tensors["columns"], dense.operator().matrix)
    values = torch.linalg.eigvalsh(dense.operator().matrix)
    assert whole.dropped()["columns"] == pytest.approx(float(values[:-7].sum() / values.sum()))
    fit(model, cut(x, y, 6), Categorical(), limited(7))


@pytest.mark.parametrize("size", [1, 2, 5, 24])
@pytest.mark.parametrize("rank", [1, 4, 20, 60])
@pytest.mark.parametrize("budget", [None, 1])
def test_the_error_is_what_was_dropped(problem, size, rank, budget):
    """By expanded pieces, by merged batches, and column by column; the trace of the rest bounds every norm of it."""
    model, x, y = problem
    (dense,) = fit(model, [(x, y)], Categorical(), GGNDense)
    (whole,) = fit(model, cut(x, y, size), Categorical(), limited(rank), memory_budget=budget)
    matrix, columns = dense.operator().matrix, whole.tensors["columns"]
    assert columns.shape == (125, rank)
    check_below(columns, matrix)
    lost = whole.dropped()["columns"] * matrix.trace()
    close((matrix - columns @ columns.T).trace(), lost)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values[:-rank].sum()) - 1e-9 <= float(lost)
    if size == 24:
        check_best(columns, matrix)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_each_batch_leaves_the_best_of_what_was_there(problem, size):
    model, x, y = problem
    parameters = Parameters.of(model)
    quantity, before = SqrtGGN(parameters, rank=5), torch.zeros(125, 125)
    for batch in cut(x, y, size):
        (dense,) = fit(model, [batch], Categorical(), GGNDense)
        accumulate(model, parameters, Categorical(), GGN(), [batch], [quantity])
        held = quantity.factors[""]._columns()
        assert held.shape[1] <= 10
        wanted = before + dense.operator().matrix
        close(held @ held.T, wanted) if held.shape[1] > 5 else check_best(held, wanted)
        before = held @ held.T


def test_the_order_matters_once_something_is_lost(problem):
    model, x, y = problem
    batches = cut(x, y, 6)
    one, other = (fit(model, b, Categorical(), limited(5))[0] for b in (batches, batches[::-1]))
    assert one.dropped()["columns"] != pytest.approx(other.dropped()["columns"], rel=1e-6)
    one, other = (
        fit(model, b, Categorical(), limited(24), columns=EmpiricalFisher())[0] for b in (batches, batches[::-1])
    )
    close(one.operator().to_dense(), other.operator().to_dense())


def test_merged_parts(problem):
    model, x, y = problem
    one, two = (fit(model, cut(a, b, 6), Categorical(), limited(5))[0] for a, b in ((x[:12], y[:12]), (x[12:], y[12:])))
    (dense,) = fit(model, [(x, y)], Categorical(), GGNDense)
    both = one + two
    assert isinstance(both, LowRankSum)
    check_below(both.tensors["columns"], dense.operator().matrix)
    close(both.tensors["trace"], dense.operator().matrix.trace())


def test_a_batch_larger_than_its_memory(problem, monkeypatch):
    """In several steps, inner products of at most 20 columns at a time."""
    model, x, y = problem
    (dense,) = fit(model, [(x, y)], Categorical(), GGNDense)
    monkeypatch.setattr(running_factor, "SIDE", 20)
    seen = []
    original = OuterProduct._gram
    monkeypatch.setattr(OuterProduct, "_gram", lambda j, o: seen.append(j.shape[0] * j.shape[1]) or original(j, o))
    (whole,) = fit(model, [(x, y)], Categorical(), limited(6))
    assert max(seen) <= 20
    check_below(whole.tensors["columns"], dense.operator().matrix)
    assert 0 < whole.dropped()["columns"] < 0.7


def test_columns_wait_for_the_end_of_the_batch_while_there_is_room(problem, monkeypatch):
    """Sent back one at a time, they are merged at once, unless the limit is too small."""
    model, x, y = problem
    added = []
    original = RunningFactor.add
    monkeypatch.setattr(RunningFactor, "add", lambda f, parts: added.append(parts[0].shape[0]) or original(f, parts))
    (dense,) = fit(model, [(x, y)], Categorical(), GGNDense)
    (roomy,) = fit(model, [(x, y)], Categorical(), limited(6), memory_budget=1)
    assert added == [4]
    check_best(roomy.tensors["columns"], dense.operator().matrix)
    (tight,) = fit(model, [(x, y)], Categorical(), limited(6, memory_limit=2**14), memory_budget=1)
    assert added == [4, 1, 1, 1, 1]
    check_below(tight.tensors["columns"], dense.operator().matrix)
    assert tight.dropped()["columns"] > roomy.dropped()["columns"] * (1 + 1e-6)


@pytest.mark.parametrize("rank", [None, 70, 124, 125, 500])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_the_matrix_takes_over_beyond_as_many_columns_as_weights(problem, rank, per_parameter):
    """96 columns a batch and 125 weights: nothing is lost on the way, and at the end what the rank leaves out."""
    model, x, y = problem
    batches = [(x, y), (2 * x, y), (x.flip(0) / 2, y)]
    dense, found = fit(model, batches, Categorical(), GGNDense, limited(rank, per_parameter=per_parameter))
    matrix = dense.operator().matrix
    if not per_parameter:
        assert found.tensors["columns"].shape == (125, min(rank or 125, 125))
        check_best(found.tensors["columns"], matrix)
        return
    for block, start, size in zip(found.operator().blocks, (0, 60, 70, 120), (60, 10, 50, 5), strict=True):
        close(block.to_dense(), matrix[start : start + size, start : start + size])


def test_a_merge_through_the_smaller_matrix():
    """A batch with more columns than weights, of which a few are kept."""
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.arange(20) % 3
    parameters = Parameters.of(model)
    assert SqrtGGN(parameters, rank=3).factors[""].numbers(40) == 3 * 15  # it is not kept
    dense, found = fit(model, [(x, y)], Categorical(), GGNDense, limited(3))
    check_best(found.tensors["columns"], dense.operator().matrix)
    dense, found = fit(model, cut(x, y, 10), Categorical(), GGNDense, limited(3))
    check_below(found.tensors["columns"], dense.operator().matrix)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rank", [0, 1, 7, 30])
def test_root(dtype, tolerance, rank):
    factor = torch.randn(30, rank) * torch.logspace(0, -4, rank)
    matrix = (factor @ factor.T).to(dtype)
    columns = root(matrix)
    assert columns.dtype == dtype
    close(columns @ columns.T, matrix, tolerance * max(float(matrix.abs().max()), 1e-3))


def test_no_root_of_what_is_not_finite():
    factor = RunningFactor([2], None, 2**20, torch.zeros(1))
    for value in (float("nan"), float("inf")):
        assert not torch.isfinite(root(torch.diag(torch.tensor([1.0, value])))).all()
    factor.add([DenseJacobian(torch.full((1, 3, 2), float("nan")))])
    assert not torch.isfinite(factor.columns()).all()


def test_chunks_of_columns_are_joined():
    a, g = torch.randn(4, 2, 1, 3), torch.randn(5, 4, 2, 1, 2)
    whole = OuterProduct(a, g)
    chunks = [OuterProduct(a.clone(), part) for part in g.split([1, 2, 2])]
    one = joined(chunks)
    assert isinstance(one, OuterProduct)
    close(one.to_dense(), whole.to_dense())
    for odd in (
        DenseJacobian(chunks[1].to_dense()),
        OuterProduct(torch.cat([a, 0 * a], 1), torch.cat([chunks[1].g] * 2, 2)),
    ):
        mixed = joined([chunks[0], odd, chunks[2]])
        assert isinstance(mixed, DenseJacobian)
        close(mixed.to_dense(), whole.to_dense())


PEAK = """
import resource, torch
from torch import nn
from lapkit.curvature import GGN, Categorical, Parameters, SqrtGGN, accumulate
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if {linux} else 2**20)
model = nn.Sequential(nn.Linear(500, 1000), nn.ReLU(), nn.Linear(1000, 10))
x, y = torch.randn(64, 500), torch.arange(64) % 10
parameters = Parameters.of(model)
accumulate(model, parameters, Categorical(), GGN(), [(x[:16], y[:16])], [SqrtGGN(parameters, rank=2)])
before = peak()
accumulate(model, parameters, Categorical(), GGN(), [(x, y)] * 2, [SqrtGGN(parameters, rank=5)])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="no resource usage")
def test_memory_of_a_limited_rank():
    """511,010 weights: 5 columns take 10 MiB, the 576 of a batch 1,123 MiB."""
    code = PEAK.format(linux=sys.platform.startswith("linux"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 400
