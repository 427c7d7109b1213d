"""Every extension of BackPACK 1.7.1 on networks that it supports, with its conventions converted.

With c times our loss being theirs: individual gradients have c, their squares c^2, curvatures c, columns sqrt(c).
Monte Carlo extensions get the targets that lapkit draws. What is not here: `HBP` and KFRA's definition are compared in
`test_hbp_peers`, factors of convolutions at length in `test_kfac_peers`, products on problem REF in `test_products`.
"""

import copy
from functools import partial

import pytest
import torch
from backpack_cases import CHAINS, DENSE, EXAMPLES, FACTORED, NETWORKS, SAMPLES, Problem, close, every
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    GGNDiagonal,
    GGNDiagonals,
    GGNKronecker,
    GradientMoments,
    GradientNorms,
    Gradients,
    MonteCarloGGN,
    compute,
    hessian_blocks,
    hessian_diagonal,
    hessian_products,
    kfra,
)

# BackPACK's own hooks make torch warn, since the inputs need no gradient.
pytestmark = [pytest.mark.peer("backpack"), pytest.mark.filterwarnings("ignore:Full backward hook is firing")]


@pytest.mark.parametrize(("network", "loss"), every(NETWORKS))
def test_first_order(network, loss):
    """BatchGrad, BatchL2Grad, SumGradSquared, Variance."""
    from backpack import extensions

    problem = Problem(network, loss)
    c = problem.factor
    found = problem.ours(each=Gradients, norms=GradientNorms, moments=GradientMoments)
    kinds = extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared(), extensions.Variance()
    peer = problem.theirs(*kinds, read=lambda p: (p.grad_batch, p.batch_l2, p.sum_grad_squared, p.variance, p.grad))
    for name, (each, norms, squares, variance, total) in peer.items():
        if network == "conv2d groups":  # BatchL2Grad takes the groups for one, and contradicts BatchGrad
            norms = each.flatten(1).square().sum(1)
        close(c * found["each"][name], each)
        close(c**2 * found["norms"][name], norms)
        close(c**2 * found["moments"].sum_of_squares()[name], squares)
        close(c**2 * found["moments"].variance()[name], variance)
        close(c * found["moments"].sum()[name], total)


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM])
def test_recurrent_gradients(cell):
    """BatchGrad, BatchL2Grad, SumGradSquared and Variance of recurrent layers, over three steps."""
    from backpack import extensions
    from backpack.custom_module.permute import Permute
    from backpack.custom_module.reduce_tuple import ReduceTuple

    problem = Problem("mlp", "cross_entropy sum")
    problem.model = nn.Sequential(
        cell(2, 4, batch_first=True), ReduceTuple(), Permute(0, 2, 1), nn.Flatten(), nn.Linear(12, 3)
    )
    problem.x = torch.randn(EXAMPLES, 3, 2)
    problem.data = [(problem.x[:1], problem.y[:1]), (problem.x[1:], problem.y[1:])]
    found = problem.ours(each=Gradients, norms=GradientNorms, moments=GradientMoments)
    kinds = extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared(), extensions.Variance()
    peer = problem.theirs(*kinds, read=lambda p: (p.grad_batch, p.batch_l2, p.sum_grad_squared, p.variance))
    for name, (each, norms, squares, variance) in peer.items():
        close(found["each"][name], each)
        close(found["norms"][name], norms)
        close(found["moments"].sum_of_squares()[name], squares)
        close(found["moments"].variance()[name], variance)


@pytest.mark.parametrize(("network", "loss"), every(NETWORKS))
def test_exact_ggn(network, loss):
    """DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact."""
    from backpack import extensions

    problem = Problem(network, loss)
    c = problem.factor
    found = problem.ours(diagonal=GGNDiagonal, each=GGNDiagonals)
    kinds = extensions.DiagGGNExact(), extensions.BatchDiagGGNExact(), extensions.SqrtGGNExact()
    peer = problem.theirs(*kinds, read=lambda p: (p.diag_ggn_exact, p.diag_ggn_exact_batch, p.sqrt_ggn_exact))
    classes = GGN(classes=range(problem.outputs))  # their root has a column for each class
    roots = problem.columns(classes, problem.outputs)
    for name, (diagonal, each, root) in peer.items():
        close(c * found["diagonal"][name], diagonal)
        close(c * found["each"][name], each)
        close(c**0.5 * roots[name], root)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_of_each_pixel(reduction):
    """Outputs (N, C, H, W): a sum over pixels, or a mean over them too."""
    from backpack import backpack, extend, extensions

    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Sigmoid(), nn.Conv2d(4, 3, 2))
    x, y = torch.randn(EXAMPLES, 2, 4, 4), torch.randint(3, (EXAMPLES, 2, 2))
    factor = 1.0 if reduction == "sum" else 1 / y.numel()
    wanted = {"diagonal": GGNDiagonal, "each": GGNDiagonals, "gradients": Gradients}
    found = compute(model, Categorical(), [(x[:1], y[:1]), (x[1:], y[1:])], wanted, output_axis=1)
    extended = extend(copy.deepcopy(model))
    loss = extend(nn.CrossEntropyLoss(reduction=reduction))(extended(x), y)
    with backpack(extensions.DiagGGNExact(), extensions.BatchDiagGGNExact(), extensions.BatchGrad()):
        loss.backward()
    for name, p in extended.named_parameters():
        close(factor * found["diagonal"][name], p.diag_ggn_exact)
        close(factor * found["each"][name], p.diag_ggn_exact_batch)
        close(factor * found["gradients"][name], p.grad_batch)


@pytest.mark.parametrize(("network", "loss"), every(NETWORKS))
def test_monte_carlo(network, loss, monkeypatch):
    """DiagGGNMC, BatchDiagGGNMC, SqrtGGNMC."""
    from backpack import extensions

    problem = Problem(network, loss)
    problem.inject(monkeypatch)
    c, columns = problem.factor, MonteCarloGGN(SAMPLES)
    found = problem.ours(diagonal=partial(GGNDiagonal, columns=columns), each=partial(GGNDiagonals, columns=columns))
    kinds = [k(SAMPLES) for k in (extensions.DiagGGNMC, extensions.BatchDiagGGNMC, extensions.SqrtGGNMC)]
    peer = problem.theirs(*kinds, read=lambda p: (p.diag_ggn_mc, p.diag_ggn_mc_batch, p.sqrt_ggn_mc))
    roots = problem.columns(columns, SAMPLES)
    sign = -1 if "square" in loss else 1  # theirs are of y - f there
    for name, (diagonal, each, root) in peer.items():
        close(c * found["diagonal"][name], diagonal)
        close(c * found["each"][name], each)
        close(sign * c**0.5 * roots[name], root)


def kronecker(factors):
    """Theirs for one parameter multiplied out."""
    return factors[0] if len(factors) == 1 else torch.kron(*factors)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("network", "loss"), every(FACTORED))
def test_kronecker_factors(network, loss, sampled, monkeypatch):
    """KFLR and KFAC; of a convolution theirs are T times A of "expand" and B of "reduce", T its positions."""
    from backpack import extensions

    problem = Problem(network, loss)
    problem.inject(monkeypatch)
    columns = MonteCarloGGN(SAMPLES) if sampled else GGN()
    found = problem.ours(
        expand=partial(GGNKronecker, columns=columns), reduce=partial(GGNKronecker, setting="reduce", columns=columns)
    )
    kind = extensions.KFAC(SAMPLES) if sampled else extensions.KFLR()
    peer = problem.theirs(kind, read=lambda p: p.kfac if sampled else p.kflr)
    for name, theirs in peer.items():
        ours = problem.factor * found["reduce"].factors(name)[0][0]
        if problem.parameters[name].ndim == 1:
            close(ours, theirs[0])
            block = found["expand"].operator().blocks[list(peer).index(name)]
            close(problem.factor * block.to_dense(), theirs[0])
        else:
            positions = found["expand"].tensors[f"positions/{name}"] / EXAMPLES
            close(ours, theirs[0])
            close(positions * found["expand"].factors(name)[1][0], theirs[1])


@pytest.mark.parametrize(("network", "loss"), every(FACTORED, DENSE))
def test_kfra(network, loss):
    """Factors of a convolution differ as those of KFLR do: theirs has the bias' block, and T times the other factor."""
    from backpack import extensions

    problem = Problem(network, loss)
    blocks = dict(
        zip(problem.parameters, kfra(problem.model, problem.likelihood, problem.data).operator().blocks, strict=True)
    )
    peer = problem.theirs(extensions.KFRA(), read=lambda p: p.kfra)
    positions = problem.ours(kfac=GGNKronecker)["kfac"].part("positions")
    for name, theirs in peer.items():
        if problem.parameters[name].ndim < 4:
            close(problem.factor * blocks[name].to_dense(), kronecker([f.contiguous() for f in theirs]))
        else:
            close(problem.factor * blocks[name.replace("weight", "bias")].to_dense(), theirs[0])
            close(positions[name] / EXAMPLES * blocks[name].right[0], theirs[1])


@pytest.mark.parametrize(("network", "loss"), every(CHAINS))
def test_hessian_diagonal(network, loss):
    """DiagHessian, BatchDiagHessian."""
    from backpack import extensions

    problem = Problem(network, loss)
    total = hessian_diagonal(problem.model, problem.likelihood, problem.data)
    parts = [(problem.x[n : n + 1], problem.y[n : n + 1]) for n in range(EXAMPLES)]
    each = [hessian_diagonal(problem.model, problem.likelihood, [part]) for part in parts]
    kinds = extensions.DiagHessian(), extensions.BatchDiagHessian()
    peer = problem.theirs(*kinds, read=lambda p: (p.diag_h, p.diag_h_batch))
    for name, (diagonal, rows) in peer.items():
        close(problem.factor * total[name], diagonal)
        close(problem.factor * torch.stack([one[name] for one in each]), rows)


@pytest.fixture
def residual_once(monkeypatch):
    """PCHMP of 1.7.1 multiplies its residual with the incoming gradient, which `hessian_diagonal` has in it."""
    from backpack.extensions.curvmatprod.pchmp.pchmpbase import PCHMPBase

    def product(self, ext, module, g_inp, g_out, mat, modify):
        return self.modifications[modify](self.derivatives.hessian_diagonal(module, g_inp, g_out)) * mat

    monkeypatch.setattr(PCHMPBase, "modified_residual_mat_prod", product)


@pytest.mark.parametrize("mode", ["hessian", "ggn", "pch-abs", "pch-clip"])
@pytest.mark.parametrize(("network", "loss"), every(FACTORED, DENSE))
@pytest.mark.usefixtures("residual_once")
def test_products(network, loss, mode):
    """HMP, GGNMP, PCHMP."""
    from backpack import extensions

    problem = Problem(network, loss)
    vectors = {name: torch.randn(2, p.numel()) for name, p in problem.parameters.items()}
    found = hessian_products(problem.model, problem.likelihood, problem.data, mode=mode).products(vectors)
    blocks = hessian_blocks(problem.model, problem.likelihood, problem.data, mode=mode).blocks
    kind, field = {
        "hessian": (extensions.HMP(), "hmp"),
        "ggn": (extensions.GGNMP(), "ggnmp"),
        "pch-abs": (extensions.PCHMP(modify="abs"), "pchmp"),
        "pch-clip": (extensions.PCHMP(modify="clip"), "pchmp"),
    }[mode]
    each = iter(vectors.values())
    peer = problem.theirs(kind, read=lambda p: getattr(p, field)(next(each).view(2, *p.shape)).flatten(1).detach())
    for name, theirs in peer.items():
        close(problem.factor * found[name], theirs)
        close(problem.factor * vectors[name] @ blocks[name][0], theirs)
