"""Outputs at several positions, of sequences and images: sums over positions, against every one by itself."""

import math

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    EmpiricalFisher,
    Engine,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
    borrowed,
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


class Tagger(nn.Module):
    """Classes for each word, which depend on the words around it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x)
        return self.head(h + self.mix(h, h, h, need_weights=False)[0])


def recurrent():
    class Last(nn.Module):
        def forward(self, x):
            return x[0]

    return nn.Sequential(nn.GRU(2, 3, batch_first=True, bidirectional=True), Last(), nn.Linear(6, 3))


def segmentation():
    """Down and up again, with classes along axis 1."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 3, 1),
    )


def channels_last():
    class Permuted(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), Permuted(), nn.Linear(3, 3))


def pixels(n):
    return torch.randn(n, 1, 4, 6)


NETWORKS = {  # name: (model, inputs, axis given, axis of classes, shape of one output)
    "tagger": (Tagger, lambda n: torch.randint(7, (n, 5)), None, -1, (5, 3)),
    "linear": (lambda: nn.Linear(2, 3), lambda n: torch.randn(n, 4, 2), None, -1, (4, 3)),
    "recurrent": (recurrent, lambda n: torch.randn(n, 4, 2), None, -1, (4, 3)),
    "one position": (lambda: nn.Linear(2, 3), lambda n: torch.randn(n, 1, 2), None, -1, (1, 3)),
    "sequence, classes in the middle": (lambda: nn.Conv1d(2, 3, 2), lambda n: torch.randn(n, 2, 5), 1, 1, (3, 4)),
    "segmentation": (segmentation, pixels, None, 1, (3, 4, 6)),
    "channels last": (channels_last, pixels, -1, -1, (3, 5, 3)),
}


class Problem:
    """A network, data, and the truth about it: each example alone, each output number alone."""

    def __init__(self, name, examples=4):
        build, inputs, self.axis, self.classes, self.shape = NETWORKS[name]
        self.model, self.x = build().eval(), inputs(examples)
        self.parameters = Parameters.of(self.model)
        with torch.no_grad():
            output = self.model(self.x)
        assert output.shape[1:] == self.shape
        self.outputs = output.movedim(self.classes, -1)  # (N, *positions, C)
        self.places = self.outputs.shape[1:-1]

    def jacobian(self):
        """`(N, T, C, P)`, one number at a time."""
        rows = []
        for n in range(len(self.x)):
            f = self.model(self.x[n : n + 1]).movedim(self.classes, -1)[0]
            rows.append(torch.stack([self._gradient(c) for c in f.flatten()]).unflatten(0, (-1, f.shape[-1])))
        return torch.stack(rows)

    def _gradient(self, number):
        weights = self.parameters.tensors
        found = torch.autograd.grad(number, weights, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def flat(self):
        """Outputs `(N, T, C)`."""
        return self.outputs.flatten(1, -2)


@pytest.fixture(params=NETWORKS)
def problem(request):
    return Problem(request.param)


@pytest.mark.parametrize("budget", [None, 1])
def test_jacobian_rows_are_position_major(problem, budget):
    """Unit column `k = t C + c` is class c at position t, positions counted row by row."""
    expected = problem.jacobian()
    with borrowed(problem.model, problem.parameters):
        engine = Engine(problem.model, problem.parameters, output_axis=problem.axis, memory_budget=budget)
        for _ in range(2):  # the second time from what was learned
            f, jacobian = engine.jacobian(problem.x)
            close(f, problem.flat())
            positions, classes = f.shape[1:]
            assert jacobian.shape == (positions * classes, len(problem.x), problem.parameters.numel)
            found = jacobian.to_dense()
            for t in range(positions):
                for c in range(classes):
                    close(found[t * classes + c], expected[:, t, c])


def softmax_hessian(f, y):
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[..., None] * p[..., None, :]


LIKELIHOODS = {  # name: (likelihood, targets from shape and classes, Hessian of one position, gradient of it)
    "categorical": (
        Categorical,
        lambda p: torch.randint(p.flat().shape[-1], (len(p.x), *p.places)),
        softmax_hessian,
        lambda f, y: f.softmax(-1) - F.one_hot(y.flatten(1), f.shape[-1]).to(f),
    ),
    "gaussian": (
        Gaussian,
        lambda p: torch.randn(len(p.x), *p.shape),
        lambda f, y: torch.eye(f.shape[-1]).expand(*f.shape, -1),
        None,
    ),
}


def structures(problem, likelihood, y, columns, **arguments):
    kinds = (GGNDiagonal, GGNBlocks, GGNDense, GGNKronecker)
    quantities = [kind(problem.parameters) for kind in kinds]
    batches = [(problem.x[:1], y[:1]), (problem.x[1:], y[1:])]
    totals = accumulate(
        problem.model,
        problem.parameters,
        likelihood,
        columns,
        batches,
        quantities,
        output_axis=problem.axis,
        **arguments,
    )
    return totals, *(q.result() for q in quantities)


def check_structures(found, H, parameters):
    diagonal, blocks, dense, _ = found
    sizes = parameters.sizes
    close(diagonal.operator().values, H.diagonal())
    close(dense.operator().to_dense(), H)
    close(
        blocks.operator().to_dense(),
        torch.block_diag(*[rows.split(sizes, 1)[i] for i, rows in enumerate(H.split(sizes))]),
    )


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_curvature_is_the_sum_over_positions(problem, likelihood, budget):
    kind, targets, hessian, _ = LIKELIHOODS[likelihood]
    y = targets(problem)
    _, *found = structures(problem, kind(), y, GGN(), memory_budget=budget)
    J, f = problem.jacobian().flatten(0, 1), problem.flat()
    H = oracles.ggn(J, hessian(f, y).flatten(0, 1))
    check_structures(found, H, problem.parameters)


def test_loss_is_the_sum_over_positions(problem):
    f = problem.flat()
    y = LIKELIHOODS["categorical"][1](problem)
    totals, *_ = structures(problem, Categorical(), y, GGN())
    close(totals.loss, F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum"))
    assert (totals.count, totals.outputs) == (len(problem.x), f[0].numel())
    y = LIKELIHOODS["gaussian"][1](problem)
    totals, *_ = structures(problem, Gaussian(), y, GGN())
    close(totals.loss, 0.5 * (f - y.movedim(problem.classes, -1).flatten(1, -2)).square().sum())


def test_the_empirical_fisher_is_that_of_whole_examples(problem):
    """The gradients of an example's positions are summed before they are squared."""
    y = LIKELIHOODS["categorical"][1](problem)
    _, *found = structures(problem, Categorical(), y, EmpiricalFisher())
    gradient = LIKELIHOODS["categorical"][3](problem.flat(), y)
    rows = torch.einsum("ntc,ntcp->np", gradient, problem.jacobian())
    check_structures(found, rows.T @ rows, problem.parameters)


def cotangent_moment(outputs, layer_output, hessian, size):
    """`sum g g^T` over examples, columns and positions of a layer, one column at a time."""
    total = torch.zeros(size, size)
    for n, f in enumerate(outputs):
        for t, place in enumerate(f):
            values, vectors = torch.linalg.eigh(hessian[n, t])
            for s in (vectors * values.clamp_min(0).sqrt()).T:
                g = torch.autograd.grad(place, layer_output, s, retain_graph=True)[0][n].reshape(-1, size)
                total += g.T @ g
    return total


def test_kronecker_factors_of_a_sequence():
    """Input rows of all positions are averaged, cotangent rows of all positions and columns summed."""
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(4, 5, 2)
    parameters, y = Parameters.of(model), torch.randint(3, (4, 5))
    kronecker = GGNKronecker(parameters)
    accumulate(model, parameters, Categorical(), GGN(), [(x, y)], [kronecker])
    result = kronecker.result()
    hidden = model[0](x)
    a = hidden.tanh()
    f = model[2](a)
    hessian = softmax_hessian(f, y).detach()
    for name, rows, output in (("0.weight", x, hidden), ("2.weight", a, f)):
        B, A = result.factors(name)
        rows = rows.detach().flatten(0, 1)
        close(A[0], rows.T @ rows / 20)
        close(B[0], cotangent_moment(f, output, hessian, output.shape[-1]))
    # Positions do not act on each other here, so that the factors are those of 20 examples.
    alone = GGNKronecker(parameters)
    accumulate(model, parameters, Categorical(), GGN(), [(x.flatten(0, 1), y.flatten())], [alone])
    for name in ("0.weight", "2.weight"):
        for actual, expected in zip(result.factors(name), alone.result().factors(name), strict=True):
            close(actual, expected)


def test_kronecker_factors_of_a_last_convolution():
    """Of 1 by 1: the factors are those of a linear layer at each pixel, and with one position exact blocks."""
    model, x = nn.Conv2d(2, 3, 1), torch.randn(4, 2, 3, 5)
    parameters, y = Parameters.of(model), torch.randint(3, (4, 3, 5))
    results = []
    for data, shape in (((x, y), (3, 2, 1, 1)), ((x.movedim(1, -1).flatten(0, 2), y.flatten()), (3, 2))):
        given = model if len(shape) == 4 else nn.Linear(2, 3)
        if len(shape) == 2:
            given.load_state_dict({"weight": model.weight.data.reshape(shape), "bias": model.bias.data})
        kronecker = GGNKronecker(Parameters.of(given))
        accumulate(given, Parameters.of(given), Categorical(), GGN(), [data], [kronecker])
        results.append(kronecker.result())
    for name in ("weight", "bias"):
        for actual, expected in zip(*[r.factors(name) for r in results], strict=True):
            close(actual, expected)
    assert parameters.numel == 9


def test_kronecker_is_exact_for_one_position():
    problem = Problem("one position")
    y = LIKELIHOODS["categorical"][1](problem)
    *_, together = structures(problem, Categorical(), y, GGN())
    flat = GGNKronecker(problem.parameters)
    accumulate(problem.model, problem.parameters, Categorical(), GGN(), [(problem.x[:, 0], y[:, 0])], [flat])
    close(together.operator().to_dense(), flat.result().operator().to_dense())


def test_weights_of_examples_multiply_all_positions():
    problem = Problem("tagger")
    y, weights = LIKELIHOODS["categorical"][1](problem), torch.tensor([2.0, 0.5, 0.0, 1.0])
    quantities = [kind(problem.parameters) for kind in (GGNDiagonal, GGNDense)]
    accumulate(problem.model, problem.parameters, Categorical(), GGN(), [(problem.x, y, weights)], quantities)
    J, H = problem.jacobian(), softmax_hessian(problem.flat(), y)
    expected = oracles.ggn(J.flatten(0, 1), (weights[:, None, None, None] * H).flatten(0, 1))
    close(quantities[0].result().operator().values, expected.diagonal())
    close(quantities[1].result().operator().to_dense(), expected)


def test_positions_that_are_left_out_add_nothing():
    """`ignore_index` takes positions out, not examples."""
    problem = Problem("segmentation")
    y = LIKELIHOODS["categorical"][1](problem)
    y[0, :2], y[1], y[2, 3, 3] = -100, -100, -100
    totals, *found = structures(problem, Categorical(), y, GGN())
    kept = (y != -100).flatten(1)
    H = softmax_hessian(problem.flat(), y) * kept[..., None, None]
    check_structures(found, oracles.ggn(problem.jacobian().flatten(0, 1), H.flatten(0, 1)), problem.parameters)
    expected = F.cross_entropy(problem.flat()[kept], y.flatten(1)[kept], reduction="sum")
    close(totals.loss, expected)


def test_predictive_covariance_over_all_positions(problem):
    """`J diag(v) J^T` of each example: positions correlate through the weights."""
    J = problem.jacobian().flatten(1, 2)
    variance = torch.rand(problem.parameters.numel)
    with borrowed(problem.model, problem.parameters):
        _, jacobian = Engine(problem.model, problem.parameters, output_axis=problem.axis).jacobian(problem.x)
    close(jacobian.weighted_gram(variance), (J * variance) @ J.mT)
    vector = torch.randn(problem.parameters.numel, 2)
    close(jacobian.project(vector).transpose(0, 1), J @ vector)
    assert jacobian.shape[0] == math.prod(problem.shape)


@pytest.mark.parametrize(
    ("name", "y", "words"),
    [
        ("tagger", torch.zeros(4, dtype=torch.long), "shape"),
        ("tagger", torch.zeros(4, 6, dtype=torch.long), "shape"),
        ("segmentation", torch.zeros(4, 23, dtype=torch.long), "shape"),
        ("segmentation", torch.zeros(4, 6, 4, dtype=torch.long), "positions"),  # height and width exchanged
        ("segmentation", torch.zeros(4, 2, 12, dtype=torch.long), "positions"),
        ("segmentation", torch.full((4, 4, 6), 3), "between"),
    ],
)
def test_targets_of_another_shape_are_refused(name, y, words):
    problem = Problem(name)
    with pytest.raises(ValueError, match=words):
        structures(problem, Categorical(), y, GGN())


def test_batches_of_other_lengths():
    """Sequences of other lengths from batch to batch: the graph is the same, its shapes are not."""
    model = Tagger().eval()
    parameters = Parameters.of(model)
    data = [(torch.randint(7, (n, t)), torch.randint(3, (n, t))) for n, t in ((3, 5), (2, 3), (1, 4), (4, 1))]
    quantities = [kind(parameters) for kind in (GGNDiagonal, GGNDense)]
    accumulate(model, parameters, Categorical(), GGN(), data, quantities)
    expected = 0
    for x, y in data:
        J = oracles.jacobian(model, x).unflatten(1, (-1, 3))
        expected = expected + oracles.ggn(J.flatten(0, 1), softmax_hessian(model(x).detach(), y).flatten(0, 1))
    close(quantities[0].result().operator().values, expected.diagonal())
    close(quantities[1].result().operator().to_dense(), expected)
