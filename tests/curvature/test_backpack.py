"""Every extension of BackPACK 1.7.1 on networks that it supports, with its conventions converted.

With c times our loss being theirs: individual gradients have c, their squares c^2, curvatures c, columns sqrt(c).
Monte Carlo extensions get the targets that lapkit draws. What is not here: `HBP` and KFRA's definition are compared in
`test_hbp_peers`, factors of convolutions at length in `test_kfac`, products on problem REF in `test_products`.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Draws,
    Gaussian,
    GGNDiagonal,
    GGNDiagonals,
    GGNKronecker,
    GradientMoments,
    GradientNorms,
    Gradients,
    MonteCarloGGN,
    SqrtGGN,
    compute,
    example_keys,
    hessian_blocks,
    hessian_diagonal,
    hessian_products,
    kfra,
    seed_from,
)

# BackPACK's own hooks make torch warn, since the inputs need no gradient.
pytestmark = [pytest.mark.peer("backpack"), pytest.mark.filterwarnings("ignore:Full backward hook is firing")]
EXAMPLES, SAMPLES, SEED = 4, 3, 5


def batch_norm():
    """With statistics of its own, used in eval mode."""
    layer = nn.BatchNorm2d(3)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(layer.weight)
    return layer


def residual():
    """A sum of two branches, by the modules that BackPACK has for it."""
    from backpack.custom_module.branching import Parallel

    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return [nn.Linear(4, 4), Parallel(nn.Identity(), inner), nn.Sigmoid(), nn.Linear(4, 3)], (4,)


NETWORKS = {  # modules and the shape of an input, with 3 outputs or one
    "mlp": lambda: ([nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)], (4,)),
    "activations": lambda: (
        [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.LeakyReLU(0.1), nn.Linear(5, 4), nn.ELU(),
         nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 4), nn.LogSigmoid(), nn.Dropout(), nn.Linear(4, 3)],
        (4,),
    ),
    "relu": lambda: (
        [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Dropout(), nn.Linear(4, 3)], (4,)
    ),
    "one output": lambda: ([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)], (4,)),
    "conv1d": lambda: (
        [nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool1d(2), nn.Conv1d(3, 4, 2, stride=2, bias=False),
         nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 3)],
        (2, 9),
    ),
    "conv2d": lambda: (
        [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, (2, 3), stride=(2, 1), dilation=(1, 2)), batch_norm(),
         nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
         nn.Linear(8, 3)],
        (2, 6, 9),
    ),
    "conv2d pooled": lambda: (
        [nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Conv2d(3, 2, 2),
         nn.Sigmoid(), nn.AvgPool2d(2, stride=1), nn.Flatten(), nn.Linear(8, 3)],
        (2, 4, 4),
    ),
    "residual": residual,
    "embedding": lambda: ([nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3)], (4,)),
    "conv2d groups": lambda: (
        [nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(16, 3)],
        (4, 4, 4),
    ),
    "conv3d": lambda: (
        [nn.Conv3d(1, 2, 2), nn.Sigmoid(), nn.MaxPool3d(2), nn.AvgPool3d((1, 2, 1)), nn.Flatten(), nn.Linear(4, 3)],
        (1, 3, 5, 5),
    ),
    "transposed": lambda: (
        [nn.ConvTranspose1d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)], (2, 3)
    ),
    "transposed 2d": lambda: (
        [nn.ConvTranspose2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3)],
        (2, 3, 3),
    ),
    "transposed 3d": lambda: (
        [nn.ConvTranspose3d(1, 2, 2, dilation=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 3)], (1, 2, 2, 2)
    ),
}  # fmt: skip
FACTORED = ["mlp", "relu", "one output", "conv2d pooled"]  # their factors: no batch norm, no groups
CHAINS = ["mlp", "activations", "one output", "conv2d pooled", "conv1d", "conv3d"]  # without batch norm
LOSSES = {  # theirs, ours, and ours in theirs
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum"), Categorical(), 1.0),
    "cross_entropy mean": (nn.CrossEntropyLoss(), Categorical(), 1 / EXAMPLES),
    "square sum": (nn.MSELoss(reduction="sum"), Gaussian(0.5**0.5), 2.0),
    "square mean": (nn.MSELoss(), Gaussian(0.5**0.5), 2 / EXAMPLES / 3),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli(), 1.0),  # of one output
    "binary mean": (nn.BCEWithLogitsLoss(), Bernoulli(), 1 / EXAMPLES),
}

DENSE = [name for name in LOSSES if "binary" not in name]  # those whose Hessian KFRA and products of theirs have


def close(ours, theirs):
    """To ten digits of the largest entry."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * max(float(theirs.abs().max()), 1e-3))


class Problem:
    def __init__(self, network, loss):
        torch.manual_seed(1)
        modules, shape = NETWORKS[network]()
        self.model = nn.Sequential(*modules).eval()
        self.loss, self.likelihood, self.factor = LOSSES[loss]
        words = any(isinstance(m, nn.Embedding) for m in modules)
        self.x = torch.randint(7, (EXAMPLES, *shape)) if words else torch.randn(EXAMPLES, *shape)
        self.outputs = self.model(self.x).shape[1]
        kind = loss.split()[0]
        self.y = {
            "cross_entropy": torch.tensor([0, 2, 1, 1]),
            "square": torch.randn(EXAMPLES, self.outputs),
            "binary": torch.tensor([[0.0], [1], [1], [0]]),
        }[kind]
        self.parameters = dict(self.model.named_parameters())
        self.data = [(self.x[:1], self.y[:1]), (self.x[1:], self.y[1:])]

    def ours(self, **quantities):
        generator = torch.Generator().manual_seed(SEED)
        return compute(self.model, self.likelihood, self.data, quantities, generator=generator)

    def columns(self, columns, count):
        """Those of the GGN for each parameter, (K, N, *shape)."""
        maker = partial(SqrtGGN, columns=columns)
        (found,) = compute(
            self.model, self.likelihood, [(self.x, self.y)], {"v": maker}, generator=torch.Generator().manual_seed(SEED)
        ).values()
        rows = found.operator().columns.T
        assert len(rows) == count * EXAMPLES  # all there, not compressed
        pieces = rows.split([p.numel() for p in self.parameters.values()], dim=1)
        shapes = {name: (count, EXAMPLES, *p.shape) for name, p in self.parameters.items()}
        return {name: v.reshape(shape) for (name, shape), v in zip(shapes.items(), pieces, strict=True)}

    def theirs(self, *extensions, read=None):
        """By parameter what `read` finds on it, inside the context of the extensions."""
        from backpack import backpack, extend

        model = extend(copy.deepcopy(self.model))
        loss = extend(copy.deepcopy(self.loss))(model(self.x), self.y)
        with backpack(*extensions):
            loss.backward()
            return {name: read(p) for name, p in model.named_parameters()}

    def drawn(self):
        """The targets that lapkit draws for its Monte Carlo columns, (M, N, ...)."""
        draws = Draws(seed_from(torch.Generator().manual_seed(SEED)), example_keys((self.x, self.y), EXAMPLES))
        f = self.model(self.x).detach()
        return torch.stack([self.likelihood.sample(f, draws, m) for m in range(SAMPLES)])

    def inject(self, monkeypatch):
        """Let BackPACK take those."""
        from backpack.core.derivatives import bcewithlogitsloss, crossentropyloss, mseloss

        targets = self.drawn()

        class Drawn:
            def sample(self, sample_shape):
                assert tuple(sample_shape) == (SAMPLES,)
                return targets

        for kind in (
            bcewithlogitsloss.BCELossWithLogitsDerivatives,
            crossentropyloss.CrossEntropyLossDerivatives,
            mseloss.MSELossDerivatives,
        ):
            monkeypatch.setattr(kind, "_make_distribution", lambda self, f: Drawn())


def every(networks, losses=LOSSES):
    """Every network with one loss, and one network with every loss that fits its outputs."""
    first, *others = networks
    return [("one output" if "binary" in loss else first, loss) for loss in losses] + [
        (network, "square sum" if network == "one output" else "cross_entropy sum") for network in others
    ]


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
    blocks = dict(zip(problem.parameters, kfra(problem.model, problem.likelihood, problem.data).blocks, strict=True))
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
