"""What holds for any network and any data: the invariants of the seeds' reference problem, on random networks.

Widths, depth, activations, biases, kind of targets, convolutions and weights are drawn from a seed. What the invariants
say of the mean loss holds for lapkit's sums over examples divided by their number.
"""

import random
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Gaussian,
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
    MonteCarloGGN,
    Parameters,
    SqrtGGN,
    compute,
    hessian_blocks,
    hessian_diagonal,
)
from lapkit.posteriors import Fit, GaussianPrior, log_evidence

SEEDS = range(9)
ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU]
KINDS = {
    "categorical": (Categorical(), lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "gaussian": (Gaussian(), lambda f, y: F.mse_loss(f, y, reduction="sum") / 2),
    "bernoulli": (Bernoulli(), lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum")),
}
STRUCTURES = {"full": GGNDense, "blocks": GGNBlocks, "diagonal": GGNDiagonal}


def close(actual, expected, rtol=1e-10):
    """To so many digits of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(float(expected.abs().max()), 1e-12))


class Random:
    """A network, data and a likelihood by chance."""

    def __init__(self, seed, activations=ACTIVATIONS, kind=None, layers=()):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        self.classes, self.examples = chance.randint(2, 4), chance.randint(3, 6)
        modules, width = [], chance.randint(2, 4)
        shape = (width,)
        if seed % 3 == 1:
            shape, channels = (1, 4, 3), chance.randint(1, 3)
            first = nn.Conv2d(1, channels, 2, bias=chance.random() < 0.7)
            modules += [first, chance.choice(activations)(), nn.Flatten()]
            width = 6 * channels
        for _ in range(chance.randint(1, 2)):
            inner = chance.randint(2, 5)
            modules += [nn.Linear(width, inner, bias=chance.random() < 0.7), *(layer(inner) for layer in layers)]
            modules.append(chance.choice(activations)())
            width = inner
        modules.append(nn.Linear(width, self.classes))
        self.model = nn.Sequential(*modules).eval()
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.8)
        self.kind = kind or list(KINDS)[seed % 3 if seed < 6 else (seed + 1) % 3]
        self.likelihood, self.loss = KINDS[self.kind]
        self.x = torch.randn(self.examples, *shape)
        self.y = {
            "categorical": torch.randint(self.classes, (self.examples,)),
            "gaussian": torch.randn(self.examples, self.classes),
            "bernoulli": torch.randint(2, (self.examples, self.classes)).double(),
        }[self.kind]
        cut = chance.randint(1, self.examples - 1)
        self.batches = [(self.x[:cut], self.y[:cut]), (self.x[cut:], self.y[cut:])]
        self.sizes = [p.numel() for p in self.model.parameters()]
        self.names = [name for name, _ in self.model.named_parameters()]

    def compute(self, data=None, **quantities):
        return compute(self.model, self.likelihood, data or self.batches, quantities)

    def operators(self, data=None, **quantities):
        return {name: result.operator() for name, result in self.compute(data, **quantities).items()}

    def gradient(self):
        """Of the summed loss, by autograd."""
        loss = self.loss(self.model(self.x), self.y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()))])

    def hessian(self):
        """Of the summed loss, by autograd."""
        start = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()

        def loss(vector):
            pieces = vector.split(self.sizes)
            shaped = {n: v.view(p.shape) for (n, p), v in zip(self.model.named_parameters(), pieces, strict=True)}
            return self.loss(functional_call(self.model, shaped, self.x), self.y)

        return torch.func.hessian(loss)(start)

    def diagonal_blocks(self, matrix):
        return [rows.split(self.sizes, 1)[i] for i, rows in enumerate(matrix.split(self.sizes))]

    def hbp(self, mode):
        """Blocks by name."""
        found = hessian_blocks(self.model, self.likelihood, self.batches, mode=mode).blocks
        return {name: parts[0] for name, parts in found.items()}


@pytest.fixture(params=SEEDS)
def case(request):
    return Random(request.param)


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
    case = Random(seed, [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
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


# -- Monte Carlo


def outcomes(case):
    """Targets (N, ...) and their probabilities (N,): all there are, or for real targets some of the same covariance."""
    f = case.model(case.x).detach()
    if case.kind == "categorical":
        return [(torch.full((case.examples,), c), f.softmax(1)[:, c]) for c in range(case.classes)]
    if case.kind == "bernoulli":
        answers = torch.tensor(list(product([0.0, 1.0], repeat=case.classes)))
        p = torch.distributions.Bernoulli(logits=f)
        return [(y.expand_as(f), p.log_prob(y.expand_as(f)).sum(1).exp()) for y in answers]
    steps = torch.eye(case.classes) * case.classes**0.5
    weight = torch.full((case.examples,), 1 / (2 * case.classes))
    return [(f + step, weight) for step in torch.cat([steps, -steps])]


def at_outcomes(case, monkeypatch, quantity, weighted=True):
    """Results with Monte Carlo columns, for each outcome as if it had been drawn, weighted by its probability."""
    found = []
    for y, p in outcomes(case):
        monkeypatch.setattr(type(case.likelihood), "sample", lambda self, f, draws, m=0, y=y: y)
        data = [(case.x, case.y, p if weighted else torch.ones_like(p))]
        found.append(case.compute(data, q=partial(quantity, columns=MonteCarloGGN()))["q"])
    return found


def test_monte_carlo_in_expectation(case, monkeypatch):
    """Exactly: DiagGGN-MC is DiagGGN, the whole is the GGN, and KFAC's B is KFLR's."""
    for quantity in (GGNDiagonal, GGNDense):
        sampled = [r.operator().to_dense() for r in at_outcomes(case, monkeypatch, quantity)]
        close(sum(sampled), case.operators(q=quantity)["q"].to_dense())
    exact, sampled = case.compute(q=GGNKronecker)["q"], at_outcomes(case, monkeypatch, GGNKronecker)
    for name in case.names:
        close(sum(r.factors(name)[0] for r in sampled), exact.factors(name)[0])


def variances(case, monkeypatch):
    """Of one draw's DiagGGN-MC, (P,): sums over examples of squares minus squared means."""
    with monkeypatch.context() as patch:
        each = [r.matrix() for r in at_outcomes(case, patch, GGNDiagonals, weighted=False)]
    mean = case.compute(q=GGNDiagonals)["q"].matrix()
    if case.kind == "gaussian":
        return (2 * mean.square()).sum(0)  # that of a squared normal number
    probabilities = [p[:, None] for _, p in outcomes(case)]
    return (sum(p * d.square() for p, d in zip(probabilities, each, strict=True)) - mean.square()).sum(0)


@pytest.mark.parametrize("draws", [1, 9])
def test_monte_carlo_spreads_as_it_should(case, draws, monkeypatch):
    """Errors in units of their standard deviation, `1 / sqrt(M)` of one draw's: mean squares of each and of their mean.

    Both are near one; entries depend on each other, so by a factor of a few.
    """
    exact, variance = case.operators(q=GGNDiagonal)["q"].values, variances(case, monkeypatch)
    alive = variance > 1e-12 * variance.max()
    errors = []
    for seed in range(10):
        columns = MonteCarloGGN(draws, seed=seed)
        errors.append(case.operators(q=partial(GGNDiagonal, columns=columns))["q"].values - exact)
    units = (torch.stack(errors) * (draws / variance).sqrt())[:, alive]
    assert 0.25 < float(units.square().mean()) < 4
    assert float(units.mean(0).square().mean()) * len(units) < 4


# -- evidence and pruning


def test_dropping_entries_raises_the_determinant(case):
    """Fischer and Hadamard: log det of full <= blocks <= diagonal, and the evidence the other way round."""
    results = case.compute(**STRUCTURES)
    totals, parameters = results.totals, Parameters.of(case.model)
    for delta in (0.1, 1.0):
        determinants, evidences = [], []
        for name in STRUCTURES:
            H = results[name].operator()
            fit = Fit(parameters, parameters.vector(), H, totals.loss, totals.count, totals.outputs)
            determinants.append(float(H.shifted_logdet(delta)))
            evidences.append(float(log_evidence(fit, case.likelihood, GaussianPrior(delta))))
        assert all(a <= b + 1e-10 for a, b in pairwise(determinants))
        assert all(a >= b - 1e-10 for a, b in pairwise(evidences))


def test_surgeon_spares_more_than_damage(case):
    """`1 / (C^-1)_ii <= C_ii`, equal for a diagonal: saliencies of OBS and OBD without the squared weights."""
    for name, operator in case.operators(**STRUCTURES, kron=GGNKronecker, columns=SqrtGGN).items():
        damped = operator.shift(0.1)
        surgeon, damage = 1 / damped.inverse_diagonal(), damped.diagonal()
        assert (surgeon <= damage * (1 + 1e-10)).all(), name
        if name == "diagonal":
            close(surgeon, damage)
        close(damped.inverse_diagonal(), torch.linalg.inv(damped.to_dense()).diagonal())


# -- data


def factors(case, data):
    found = case.compute(data, k=GGNKronecker)["k"]
    return {f"{name}{i}": f for name in case.names for i, f in enumerate(found.factors(name))}


def test_every_example_twice(case):
    """Means stay as they are, there are twice as many columns, and A is a mean already."""
    twice = [*case.batches, *case.batches]
    for quantity in (GGNDense, GGNDiagonal, GGNBlocks, SqrtGGN):
        one, two = (case.operators(data, q=quantity)["q"].to_dense() for data in (case.batches, twice))
        close(two / 2, one)
    once, again = factors(case, case.batches), factors(case, twice)
    for name, factor in once.items():
        close(again[name] / (2 if name.endswith("0") else 1), factor)
    numbers = []
    for data in (case.batches, twice):
        found = compute(case.model, case.likelihood, data, {"q": GGNDiagonals, "g": Gradients})
        numbers.append((found.count, len(found["q"].matrix())))
        close(found["g"].matrix().mean(0), case.gradient() / case.examples)
    assert numbers[1] == (2 * numbers[0][0], 2 * numbers[0][1])


def test_number_of_columns(case):
    """N C columns, N (C - 1) for classes, as far as there are not more than weights."""
    each = case.classes - (case.kind == "categorical")
    for times in (1, 2):
        found = case.operators(case.batches * times, q=SqrtGGN)["q"]
        assert found.rank == min(times * case.examples * each, sum(case.sizes))


def test_order_of_examples(case):
    order = torch.randperm(case.examples)
    data = [(case.x[order], case.y[order])]
    for quantity in (GGNDense, GGNDiagonal, GGNBlocks, GGNKronecker, SqrtGGN):
        close(case.operators(data, q=quantity)["q"].to_dense(), case.operators(q=quantity)["q"].to_dense())
    close(case.compute(data, q=Gradients)["q"].matrix(), case.compute(q=Gradients)["q"].matrix()[order])
    close(case.compute(data, q=GGNDiagonals)["q"].matrix(), case.compute(q=GGNDiagonals)["q"].matrix()[order])
    close(factors(case, data)["0.weight0"], factors(case, case.batches)["0.weight0"])


def test_columns_of_classes_add_up(case):
    """The GGN is the sum of its parts by class."""
    parts = [case.operators(q=partial(GGNDense, columns=GGN(classes=(c,))))["q"].matrix for c in range(case.classes)]
    close(sum(parts), case.operators(q=GGNDense)["q"].matrix)


# -- batch normalisation


class Affine(nn.Module):
    """`a x + b`, what batch normalisation is in eval mode."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (scale, norm.bias - norm.running_mean * scale))

    def forward(self, x):
        return self.a * x + self.b


def change_of_variables(norm):
    """`d (a, b) / d (weight, bias)`."""
    deviation, size = (norm.running_var + norm.eps).sqrt(), len(norm.running_mean)
    change = torch.eye(2 * size)
    change[:size, :size] = torch.diag(1 / deviation)
    change[size:, :size] = torch.diag(-norm.running_mean / deviation)
    return change


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_norm_is_its_affine_map(seed):
    """The same curvature in all other weights, and that of scale and shift by the change of variables."""
    case = Random(seed, layers=[nn.BatchNorm1d])
    changes = []
    for module in case.model:
        changes.append(torch.eye(sum(p.numel() for p in module.parameters())))
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            changes[-1] = change_of_variables(module)
    change = torch.block_diag(*[matrix for matrix in changes if len(matrix)])
    ours = case.operators(q=GGNDense)["q"].matrix
    case.model = nn.Sequential(*[Affine(m) if isinstance(m, nn.BatchNorm1d) else m for m in case.model])
    close(ours, change.T @ case.operators(q=GGNDense)["q"].matrix @ change)
