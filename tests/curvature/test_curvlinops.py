"""Every operator of curvlinops 3.0.1 that has a counterpart in lapkit, with its conventions converted.

Monte Carlo operators get the targets that lapkit draws, stochastic estimators its probes. Not here: products on problem
REF and by groups of parameters (`test_products`), a loss for each position (`test_kfac_peers`). XTrace, XDiag and the
smoothed Lanczos densities have no counterpart with the same numbers, and convolutions in groups share one input factor
there.
"""

import pytest
import torch
from curvlinops_cases import CASES, DAMPING, EXAMPLES, NETWORKS, SAMPLES, Problem, close, dense, generator
from torch import nn

from lapkit.curvature import (
    Categorical,
    EmpiricalFisherProduct,
    Engine,
    FisherProduct,
    GGNDense,
    GGNKronecker,
    GGNProduct,
    HessianProduct,
    MonteCarloGGN,
    Parameters,
    borrowed,
    compute,
    ekfac,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    squared_norm,
)

pytestmark = [pytest.mark.peer("curvlinops"), pytest.mark.filterwarnings("ignore")]


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
    ours = ekfac(problem.model, problem.likelihood, problem.batches, parameters=weights).operator()
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
