"""Every operator of curvlinops 3.0.1 that has a counterpart in lapkit, with its conventions converted.

Monte Carlo operators get the targets that lapkit draws, stochastic estimators its probes. Not here: products on problem
REF and by groups of parameters (`test_products`), a loss for each position (`test_kfac`). XTrace, XDiag and the
smoothed Lanczos densities have no counterpart with the same numbers, and convolutions in groups share one input factor
there.
"""

from functools import partial

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Draws,
    EmpiricalFisher,
    EmpiricalFisherProduct,
    Engine,
    FisherProduct,
    Gaussian,
    GGNDense,
    GGNKronecker,
    GGNProduct,
    HessianProduct,
    MonteCarloGGN,
    Parameters,
    borrowed,
    compute,
    ekfac,
    example_keys,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    seed_from,
    squared_norm,
)

pytestmark = [pytest.mark.peer("curvlinops"), pytest.mark.filterwarnings("ignore")]
SAMPLES, SEED, DAMPING = 3, 7, 0.3


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


NETWORKS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)), (4,)),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), Mean(), nn.Linear(4, 3)), (3, 4)
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 1)), nn.Tanh(),
            nn.Conv2d(4, 3, 2, dilation=2, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 3),
        ),
        (2, 5, 6),
    ),
}  # fmt: skip
LOSSES = {  # theirs, ours, the factors of a curvature and of products of two gradients
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum"), Categorical(), lambda n: (1, 1)),
    "cross_entropy mean": (nn.CrossEntropyLoss(), Categorical(), lambda n: (1 / n, 1 / n)),
    "square sum": (nn.MSELoss(reduction="sum"), Gaussian(0.5**0.5), lambda n: (2, 4)),
    "square mean": (nn.MSELoss(), Gaussian(0.5**0.5), lambda n: (2 / n / 3, 4 / n / 3)),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli(), lambda n: (1, 1)),
    "binary mean": (nn.BCEWithLogitsLoss(), Bernoulli(), lambda n: (1 / n / 3, 1 / n / 3)),
}
CASES = [("mlp", loss) for loss in LOSSES] + [(n, "cross_entropy sum") for n in NETWORKS if n != "mlp"]
SETTINGS = ["expand", "reduce"]


def close(ours, theirs, rtol=1e-10):
    """To ten digits of the largest entry."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


class Problem:
    def __init__(self, network, loss, examples=7):
        torch.manual_seed(2)
        self.model, shape = NETWORKS[network]()
        self.loss, self.likelihood, factors = LOSSES[loss]
        self.factor, self.square = factors(examples)
        self.x = torch.randn(examples, *shape)
        self.y = {
            "cross_entropy": torch.arange(examples) % 3,
            "square": torch.randn(examples, 3),
            "binary": torch.randint(2, (examples, 3)).double(),
        }[loss.split()[0]]
        self.batch = [(self.x, self.y)]
        self.batches = [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]
        self.names = [name for name, _ in self.model.named_parameters()]

    def theirs(self, kind, data, names=None, **options):
        chosen = [p for n, p in self.model.named_parameters() if names is None or n in names]
        return kind(self.model, self.loss, chosen, data, check_deterministic=False, **options)

    def drawn(self):
        """The targets that lapkit draws for its Monte Carlo columns, (M, N, ...)."""
        draws = Draws(seed_from(generator()), example_keys((self.x, self.y), len(self.x)))
        f = self.model(self.x).detach()
        return torch.stack([self.likelihood.sample(f, draws, m) for m in range(SAMPLES)])

    def kinds(self):
        """Their Fisher types: our columns and the factor."""
        return {
            "type-2": (GGN(), self.factor),
            "mc": (MonteCarloGGN(SAMPLES), self.factor),
            "empirical": (EmpiricalFisher(), self.square),
        }

    def inject(self, monkeypatch):
        """Let their factors be of those, one after the other and from the first again."""
        import curvlinops

        targets = self.drawn()
        count = iter(range(10**6))
        monkeypatch.setattr(
            curvlinops.KFACLinearOperator, "draw_label", lambda self, output: targets[next(count) % SAMPLES]
        )


def generator():
    return torch.Generator().manual_seed(SEED)


def dense(operator):
    return torch.as_tensor(operator @ torch.eye(operator.shape[1])).detach()


# -- products


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_products(network, loss):
    """Hessian, GGN and empirical Fisher."""
    import curvlinops

    problem = Problem(network, loss)
    for ours, theirs, factor in (
        (HessianProduct, curvlinops.HessianLinearOperator, problem.factor),
        (GGNProduct, curvlinops.GGNLinearOperator, problem.factor),
        (EmpiricalFisherProduct, curvlinops.EFLinearOperator, problem.square),
    ):
        vectors = torch.randn(sum(p.numel() for p in problem.model.parameters()), 3)
        peer = problem.theirs(theirs, problem.batches) @ vectors
        close(factor * (ours(problem.model, problem.likelihood, problem.batches) @ vectors), peer.detach())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_products_with_a_loss_of_each_position(reduction):
    """Outputs (N, C, T): a sum over positions, or a mean over them too. (Their empirical Fisher is by position.)"""
    import curvlinops

    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 2))
    x, y = torch.randn(5, 2, 6), torch.randint(3, (5, 4))
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    loss, factor = nn.CrossEntropyLoss(reduction=reduction), 1 if reduction == "sum" else 1 / 20
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 3)
    for ours, theirs in (
        (HessianProduct, curvlinops.HessianLinearOperator),
        (GGNProduct, curvlinops.GGNLinearOperator),
    ):
        peer = theirs(model, loss, list(model.parameters()), data, check_deterministic=False) @ vectors
        close(factor * (ours(model, Categorical(), data, output_axis=1) @ vectors), peer.detach())


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_monte_carlo_fisher(network, loss, monkeypatch):
    import curvlinops

    problem = Problem(network, loss)
    targets = problem.drawn()

    def sampler(loss_function):
        def gradients(output, count, y, generator):
            """Of the loss that is not averaged."""
            assert count == SAMPLES
            if isinstance(loss_function, nn.CrossEntropyLoss):
                return output.softmax(1) - nn.functional.one_hot(targets, 3)
            return 2 * (output - targets) if isinstance(loss_function, nn.MSELoss) else output.sigmoid() - targets

        return gradients

    monkeypatch.setattr(curvlinops.fisher, "make_grad_output_sampler", sampler)
    peer = dense(problem.theirs(curvlinops.FisherMCLinearOperator, problem.batch, mc_samples=SAMPLES))
    ours = FisherProduct(problem.model, problem.likelihood, problem.batches, samples=SAMPLES, generator=generator())
    close(problem.factor * ours.to_dense(), peer)
    columns = MonteCarloGGN(SAMPLES)
    matrix = compute(
        problem.model, problem.likelihood, problem.batches, {"H": GGNDense}, columns=columns, generator=generator()
    )
    close(problem.factor * matrix["H"].operator().to_dense(), peer)


@pytest.mark.parametrize("network", NETWORKS)
def test_jacobians(network):
    """Rows are outputs of examples; and their transpose."""
    import curvlinops

    problem = Problem(network, "cross_entropy sum")
    parameters = Parameters.of(problem.model)
    with borrowed(problem.model, parameters):
        _, jacobian = Engine(problem.model, parameters).jacobian(problem.x)
    ours = jacobian.to_dense().transpose(0, 1).flatten(0, 1)
    for kind, wanted in (
        (curvlinops.JacobianLinearOperator, ours),
        (curvlinops.TransposedJacobianLinearOperator, ours.T),
    ):
        peer = kind(problem.model, list(problem.model.parameters()), problem.batches, check_deterministic=False)
        close(wanted, dense(peer))


def test_submatrix():
    """Rows and columns of some weights are those of a selection."""
    import curvlinops

    problem = Problem("mlp", "square mean")
    chosen = list(range(25, 45))  # weight of the second layer
    peer = curvlinops.SubmatrixLinearOperator(
        problem.theirs(curvlinops.GGNLinearOperator, problem.batches), chosen, chosen
    )
    ours = GGNProduct(
        problem.model,
        problem.likelihood,
        problem.batches,
        parameters=Parameters.of(problem.model, ["2.weight"]),
    )
    close(problem.factor * ours.to_dense(), dense(peer))


# -- Kronecker factors


def blocks(problem, result, factor, setting):
    """What theirs is made of: a separate bias has B of its weight, which under "expand" is not the exact block."""
    parts = []
    for name in problem.names:
        b, a = (f[0] for f in result.factors(name.replace("bias", "weight")))
        parts.append(factor * (torch.kron(b, a) if "weight" in name else b))
    return torch.block_diag(*parts)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize(("network", "loss"), CASES)
def test_kfac(network, loss, kind, setting, monkeypatch):
    import curvlinops

    problem = Problem(network, loss)
    problem.inject(monkeypatch)
    columns, factor = problem.kinds()[kind]
    maker = partial(GGNKronecker, setting=setting, columns=columns)
    found = compute(problem.model, problem.likelihood, problem.batches, {"k": maker}, generator=generator())["k"]
    samples = SAMPLES if kind == "mc" else 1
    data = problem.batch if kind == "mc" else problem.batches
    peer = problem.theirs(
        curvlinops.KFACLinearOperator, data, fisher_type=kind, mc_samples=samples, kfac_approx=setting
    )
    close(blocks(problem, found, factor, setting), dense(peer))
    if network == "mlp" or setting == "reduce":  # then ours of a bias is theirs, too
        close(factor * found.operator().to_dense(), dense(peer))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_only(network, setting):
    """The factor of inputs, and ones in place of the other."""
    import curvlinops

    problem = Problem(network, "cross_entropy mean")
    maker = partial(GGNKronecker, setting=setting)
    found = compute(problem.model, problem.likelihood, problem.batches, {"k": maker})["k"]
    weights = [n for n in problem.names if "weight" in n]
    factors = [found.factors(n) for n in weights]
    peer = problem.theirs(
        curvlinops.KFACLinearOperator, problem.batches, weights, fisher_type="forward-only", kfac_approx=setting
    )
    close(torch.block_diag(*[torch.kron(torch.eye(b.shape[-1]), a[0]) for b, a in factors]), dense(peer))


class Joint(nn.Module):
    """A linear layer whose bias is a column of its weight."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach())

    def forward(self, x):
        return nn.functional.linear(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), self.weight)


def joint(problem):
    """The same network with weight and bias in one."""
    return nn.Sequential(*[Joint(m) if isinstance(m, nn.Linear) else m for m in problem.model])


def apart(matrix, outputs):
    """A block over `[W, b]` in rows, as one over W and then b."""
    places = torch.arange(len(matrix)).reshape(outputs, -1)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return matrix[order][:, order]


def widths(problem):
    return [m.out_features for m in problem.model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("network", ["mlp", "sequence"])
def test_kfac_of_weight_and_bias_together(network, kind, setting, monkeypatch):
    import curvlinops

    problem = Problem(network, "cross_entropy mean")
    problem.inject(monkeypatch)
    columns, factor = problem.kinds()[kind]
    maker = partial(GGNKronecker, setting=setting, columns=columns)
    found = compute(joint(problem), problem.likelihood, problem.batches, {"k": maker}, generator=generator())["k"]
    peer = problem.theirs(
        curvlinops.KFACLinearOperator,
        problem.batch if kind == "mc" else problem.batches,
        fisher_type=kind,
        mc_samples=SAMPLES if kind == "mc" else 1,
        kfac_approx=setting,
        separate_weight_and_bias=False,
    )
    ours = [apart(b.to_dense(), o) for b, o in zip(found.operator().blocks, widths(problem), strict=True)]
    close(factor * torch.block_diag(*ours), dense(peer))


# -- corrected eigenvalues


def corrected(problem, kind, setting, model=None):
    columns, factor = problem.kinds()[kind]
    found = ekfac(
        model or problem.model,
        problem.likelihood,
        problem.batches,
        columns=columns,
        setting=setting,
        generator=generator(),
    )
    return [factor * block.to_dense() for block in found.blocks]


EXAMPLES = 60  # enough for factors of full rank, with gaps between their eigenvalues


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_ekfac(network, kind, setting, monkeypatch):
    """Where factors have equal eigenvalues the basis is arbitrary, and so is the result: these have none."""
    import curvlinops

    problem = Problem(network, "cross_entropy sum", EXAMPLES)
    problem.inject(monkeypatch)
    peer = problem.theirs(
        curvlinops.EKFACLinearOperator,
        problem.batch if kind == "mc" else problem.batches,
        fisher_type=kind,
        mc_samples=SAMPLES if kind == "mc" else 1,
        kfac_approx=setting,
    )
    sizes = [p.numel() for p in problem.model.parameters()]
    theirs = [rows.split(sizes, 1)[i] for i, rows in enumerate(dense(peer).split(sizes))]
    for name, ours, block in zip(problem.names, corrected(problem, kind, setting), theirs, strict=True):
        if "weight" in name or network == "mlp" or setting == "reduce":  # other biases: ours is exact
            close(ours, block, 1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", ["mlp", "sequence"])
def test_ekfac_of_weight_and_bias_together(network, setting):
    import curvlinops

    problem = Problem(network, "cross_entropy sum", EXAMPLES)
    peer = problem.theirs(
        curvlinops.EKFACLinearOperator,
        problem.batches,
        fisher_type="type-2",
        kfac_approx=setting,
        separate_weight_and_bias=False,
    )
    ours = corrected(problem, "type-2", setting, joint(problem))
    together = torch.block_diag(*[apart(b, o) for b, o in zip(ours, widths(problem), strict=True)])
    close(together, dense(peer), 1e-10)


# -- inverses


@pytest.mark.parametrize("network", NETWORKS)
def test_inverse_of_kronecker_factors(network):
    """Damped exactly, by shared damping, and of corrected eigenvalues; weights only."""
    import curvlinops

    problem = Problem(network, "cross_entropy sum", EXAMPLES)
    weights = [n for n in problem.names if "weight" in n]
    results = compute(problem.model, problem.likelihood, problem.batches, {"k": GGNKronecker}, parameters=weights)
    found = results["k"].operator()
    kfac, corrected = (
        problem.theirs(kind, problem.batches, weights, fisher_type="type-2")
        for kind in (curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator)
    )
    vectors = torch.randn(found.size, 3)
    exact = curvlinops.KFACInverseLinearOperator(kfac, DAMPING, use_exact_damping=True) @ vectors
    close(found.shift(DAMPING).solve(vectors), exact)
    shared = curvlinops.KFACInverseLinearOperator(kfac, DAMPING, use_heuristic_damping=True) @ vectors
    pieces = zip(found.blocks, vectors.split(found.sizes), strict=True)
    close(torch.cat([block.damped_inverse(DAMPING).matmul(v) for block, v in pieces]), shared)
    theirs = curvlinops.KFACInverseLinearOperator(corrected, DAMPING, use_exact_damping=True) @ vectors
    ours = ekfac(problem.model, problem.likelihood, problem.batches, parameters=weights)
    close(ours.shift(DAMPING).solve(vectors), theirs, 1e-10)


def test_inverses_by_iteration():
    """Conjugate gradients, LSMR and Neumann's series, each to its own tolerance."""
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator

    problem = Problem("mlp", "cross_entropy mean")
    found = compute(problem.model, problem.likelihood, problem.batches, {"H": GGNDense})["H"].operator()
    ours = found.scale(problem.factor).shift(1.0)
    size = found.size
    shapes = [tuple(p.shape) for p in problem.model.parameters()]
    identity = IdentityLinearOperator(shapes, torch.device("cpu"), torch.float64)
    damped = problem.theirs(curvlinops.GGNLinearOperator, problem.batches) + identity
    vectors = torch.randn(size, 1)
    solution = ours.solve(vectors)
    settings = {"eps": 0.0, "tolerance": 1e-13, "stop_updating_after": 1e-15, "max_iter": size, "max_tridiag_iter": 0}
    close(solution, (curvlinops.CGInverseLinearOperator(damped, **settings) @ vectors).detach())
    lsmr = curvlinops.LSMRInverseLinearOperator(damped, atol=1e-14, btol=1e-14, maxiter=10 * size)
    close(solution, (lsmr @ vectors).detach())
    scale = 2 / float(ours.eigenvalues[0] + ours.eigenvalues[-1])
    series = curvlinops.NeumannInverseLinearOperator(damped, num_terms=40, scale=scale)
    close(solution, (series @ vectors).detach())


# -- estimators


ESTIMATORS = {
    "hutchinson_trace": (hutchinson_trace, {"probes": 6}, 6),
    "hutchinson_diag": (hutchinson_diagonal, {"probes": 6}, 6),
    "hutchinson_squared_fro": (squared_norm, {"probes": 6}, 6),
    "hutchpp_trace": (hutchpp_trace, {"products": 9}, 9),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name, monkeypatch):
    """With the same probes, one after the other."""
    import curvlinops

    problem = Problem("mlp", "cross_entropy sum")
    product = GGNProduct(problem.model, problem.likelihood, problem.batches)
    probes = torch.randint(2, (product.size, 50)) * 2.0 - 1
    ours, options, count = ESTIMATORS[name]
    given = iter(range(50))
    module = __import__(getattr(curvlinops, name).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "random_vector", lambda *_: probes[:, next(given)])
    theirs = getattr(curvlinops, name)(problem.theirs(curvlinops.GGNLinearOperator, problem.batches), count)
    mine = iter(range(50))
    draw = lambda matrix, number, generator: probes[:, [next(mine) for _ in range(number)]]  # noqa: E731
    close(ours(product, **options, draw=draw).value, theirs.detach())
