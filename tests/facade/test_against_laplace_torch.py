"""Side by side with laplace-torch 0.3: the same numbers where its definitions are right, and where they are not, why.

Every network is float64. Its convolutions have no bias here unless that is the point: what laplace-torch calls the
Kronecker block of a convolution's bias is an approximation too, see below.
"""

import copy

import oracles
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace

pytestmark = [
    pytest.mark.peer("laplace"),
    pytest.mark.filterwarnings("ignore:By default .link_approx. is .probit.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

DELTA, NOISE = 0.7, 0.6


def mlp(outputs):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, outputs))


def cnn(outputs, bias=False):
    first = nn.Conv2d(1, 3, 3, padding=1, bias=bias)
    second = nn.Conv2d(3, 2, 2, stride=2, bias=bias)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(8, outputs))


class Case:
    def __init__(self, net, kind):
        outputs = {"classification": 3, "regression": 2}[kind]
        self.kind, self.net = kind, {"mlp": mlp, "cnn": cnn}[net](outputs)
        shape = {"mlp": (3,), "cnn": (1, 4, 4)}[net]
        self.x, self.new_x = torch.randn(13, *shape), torch.randn(4, *shape)
        self.y = torch.arange(13) % 3 if kind == "classification" else torch.randn(13, outputs)
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=5)

    def theirs(self, structure, subset="all", **options):
        import laplace

        noise = {"sigma_noise": NOISE} if self.kind == "regression" else {}
        la = laplace.Laplace(
            copy.deepcopy(self.net),
            self.kind,
            subset_of_weights=subset,
            hessian_structure=structure,
            **noise | {"prior_precision": DELTA} | options,
        )
        la.fit(self.loader)
        return la

    def ours(self, structure, subset="all", **options):
        noise = {"sigma_noise": NOISE} if self.kind == "regression" else {}
        la = Laplace(self.net, self.kind, subset, structure, **noise | {"prior_precision": DELTA} | options)
        return la.fit(self.loader)


def dense(precision):
    """Their posterior precision, which has a type for each structure."""
    if not isinstance(precision, torch.Tensor):
        return precision.to_matrix()
    return precision.diag() if precision.ndim == 1 else precision


def close(ours, theirs, rtol=1e-10):
    """Relative to the largest entry; 3e-15 was seen."""
    theirs = torch.as_tensor(theirs).detach()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


CASES = [("mlp", "classification"), ("mlp", "regression"), ("cnn", "classification"), ("cnn", "regression")]


@pytest.mark.parametrize(("net", "kind"), CASES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_the_same_numbers(net, kind, subset, structure):
    case = Case(net, kind)
    ours, theirs = case.ours(structure, subset), case.theirs(structure, subset)
    close(ours.posterior_precision.to_dense(), dense(theirs.posterior_precision))
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().squeeze())
    f = ours.function_distribution(case.new_x)
    mean, covariance = theirs._glm_predictive_distribution(case.new_x)
    close(f.mean, mean)
    close(f.covariance, covariance)
    if kind == "classification":
        close(ours(case.new_x), theirs(case.new_x, pred_type="glm", link_approx="probit"))
    else:
        joint = theirs._glm_predictive_distribution(case.new_x, joint=True)
        for mine, other in zip(ours(case.new_x, joint=True), joint, strict=True):
            close(mine, other)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_layerwise_priors(structure):
    case = Case("mlp", "classification")
    delta = torch.linspace(0.3, 3.0, 6)
    ours = case.ours(structure, prior_precision=delta)
    theirs = case.theirs(structure, prior_precision=delta)
    close(ours.posterior_precision.to_dense(), dense(theirs.posterior_precision))
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().squeeze())


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_empirical_fisher_of_a_classification(structure):
    """Kronecker factors of one column have a definition of their own; here too it is the same."""
    from laplace.curvature import BackPackEF, CurvlinopsEF

    case = Case("mlp", "classification")
    backend = BackPackEF if structure == "diag" else CurvlinopsEF
    theirs = case.theirs(structure, backend=backend)
    close(case.ours(structure, curvature="ef").posterior_precision.to_dense(), dense(theirs.posterior_precision))


# -- where the two differ


def gradients_of_log_likelihood(case, noise):
    """Of each example, (N, P), for a regression with this noise."""
    parameters = {name: p.detach() for name, p in case.net.named_parameters()}

    def log_likelihood(p, x, y):
        return torch.distributions.Normal(functional_call(case.net, p, (x[None],))[0], noise).log_prob(y).sum()

    rows = []
    for x, y in zip(case.x, case.y, strict=True):
        gradient = torch.func.grad(log_likelihood)(parameters, x, y)
        rows.append(torch.cat([part.flatten() for part in gradient.values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("noise", [1.0, NOISE])
def test_empirical_fisher_of_a_regression_is_made_of_gradients_of_the_log_likelihood(noise):
    """Theirs is `(2 r)^2 / 2` where it should be `r^2`, twice too large, over `noise^2` where it should be `noise^4`.

    The gradient of `-r^2 / (2 noise^2)` in f is `r / noise^2`; the Fisher takes its square.
    """
    from laplace.curvature import CurvlinopsEF

    case = Case("mlp", "regression")
    G = gradients_of_log_likelihood(case, noise)
    fisher, prior = G.T @ G, DELTA * torch.eye(G.shape[1])
    ours = case.ours("full", curvature="ef", sigma_noise=noise)
    close(ours.posterior_precision.to_dense(), fisher + prior)
    theirs = case.theirs("full", backend=CurvlinopsEF, sigma_noise=noise)
    close(dense(theirs.posterior_precision), 2 * noise**2 * fisher + prior)


def test_bias_of_a_convolution_has_its_exact_block_in_a_kronecker_posterior():
    """A bias is one number a channel, added at every position: `sum_n (sum_t g_nt) (sum_t g_nt)^T`.

    Theirs counts positions as examples, `sum_nt g_nt g_nt^T`, as if they had a bias each. That is needed for weights,
    whose exact block has no product form; the bias has nothing to factor and is exact at no cost.
    """
    case = Case("cnn", "classification")
    case.net = cnn(3, bias=True)
    p = case.net(case.x).detach().softmax(1)
    hessians = torch.stack([q.diag() - torch.outer(q, q) for q in p])
    ours, theirs = (la.posterior_precision for la in (case.ours("kron"), case.theirs("kron")))
    sizes = [q.numel() for q in case.net.parameters()]
    for name, start in (("0.bias", sizes[0]), ("2.bias", sum(sizes[:3]))):
        exact = oracles.ggn(oracles.jacobian(case.net, case.x, [name]), hessians)
        part = slice(start, start + len(exact))
        prior = DELTA * torch.eye(len(exact))
        close(ours.to_dense()[part, part], exact + prior)
        error = (dense(theirs)[part, part] - prior - exact).norm() / exact.norm()
        assert error > 0.2, f"laplace-torch has changed: {name} is now within {error:.2f}"


def test_traces_of_convolutions_stay_near_the_exact_ones():
    """BackPACK sums A over the T positions where KFAC takes the mean, and its B is the block of a bias.

    Where cotangents at different positions agree, that is T times too large (its documentation says so): 16 positions
    here, then 4. An approximation has some error; ours is of the size of the exact block.
    """
    from laplace.curvature import BackPackGGN

    case = Case("cnn", "classification")
    sizes = [q.numel() for q in case.net.parameters()]

    def traces(diagonal):
        return [float(part.sum()) for part in diagonal.split(sizes)]

    exact = traces(case.ours("full").fitted.curvature.diagonal())
    ours = traces(case.ours("kron").fitted.curvature.diagonal())
    theirs = case.theirs("kron", backend=BackPackGGN).posterior_precision.to_matrix()
    theirs = traces(theirs.diagonal() - DELTA)
    for layer in (0, 1):  # the two convolutions come first
        assert 0.7 < ours[layer] / exact[layer] < 1.4
        assert theirs[layer] / exact[layer] > 1.6, "laplace-torch has changed"
    assert theirs[0] / exact[0] > 6, "laplace-torch has changed"
    assert theirs[2:] == pytest.approx(ours[2:], rel=1e-8)  # a linear layer is the same for all


class Sequences(nn.Module):
    """A classifier of three classes of sequences: its first layer is shared by all positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh().mean(1))


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_positions_of_sequences_are_no_examples():
    """ASDL sees N T examples in a layer that is shared by T positions; curvlinops sees N, as we do.

    Its diagonal is `sum_nt` of squares, and not `sum_n` of the squared sums over t, which the GGN has. Its Kronecker
    block is T times too large: that of sums over all positions, `(sum_nt g g^T) (x) (sum_nt a a^T)`, divided by N.
    """
    from laplace.curvature import AsdlGGN, CurvlinopsGGN

    positions, case = 6, Case("mlp", "classification")
    case.net, case.x = Sequences(), torch.randn(13, positions, 3)
    case.loader = DataLoader(TensorDataset(case.x, case.y), batch_size=5)
    shared, prior = slice(12), DELTA * torch.eye(12)
    exact = case.ours("full").fitted.curvature.to_dense()[shared, shared]
    diagonal = case.ours("diag").fitted.curvature.diagonal()[shared]
    close(diagonal, exact.diagonal())
    close(case.theirs("diag", backend=CurvlinopsGGN).posterior_precision[shared] - DELTA, diagonal)
    asdl = case.theirs("diag", backend=AsdlGGN).posterior_precision[shared] - DELTA
    assert (asdl - diagonal).norm() > 0.2 * diagonal.norm(), "laplace-torch has changed"

    block = case.ours("kron").fitted.curvature.to_dense()[shared, shared]
    close(dense(case.theirs("kron", backend=CurvlinopsGGN).posterior_precision)[shared, shared] - prior, block)
    asdl = dense(case.theirs("kron", backend=AsdlGGN).posterior_precision)[shared, shared] - prior
    close(asdl, positions * block, rtol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_evidence_at_a_temperature_tempers_the_normaliser_too(temperature):
    """`p(y|f)^(1/T)` of a Gaussian has the constant `-log(noise sqrt(2 pi)) / T`; theirs keeps it as it is at T = 1.

    That leaves the posterior the same, but the evidence's slope in the noise is wrong, and with it the noise it finds
    best: an example counted twice (T = 1/2) must count twice in all its terms. Written out here for the dense GGN.
    """
    case = Case("mlp", "regression")
    f, w = case.net(case.x).detach(), oracles.flat_parameters(case.net)
    H = oracles.ggn(oracles.jacobian(case.net, case.x), torch.eye(2).expand(13, 2, 2)) / (NOISE**2 * temperature)
    log_likelihood = torch.distributions.Normal(f, NOISE).log_prob(case.y).sum()
    exact = oracles.log_gaussian_evidence(log_likelihood / temperature, H, DELTA, w, 0.0)
    ours, theirs = case.ours("full", temperature=temperature), case.theirs("full", temperature=temperature)
    close(ours.posterior_precision.to_dense(), dense(theirs.posterior_precision))
    close(ours.log_marginal_likelihood(), exact)
    constant = -case.y.numel() * torch.log(torch.tensor(NOISE) * (2 * torch.pi) ** 0.5)
    close(theirs.log_marginal_likelihood().squeeze(), exact + (1 - 1 / temperature) * constant)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
def test_noise_has_a_gradient_in_a_kronecker_evidence():
    """Theirs loses a part of it, by `math.pow` of a tensor; ours is the slope of the values, on which both agree."""
    case = Case("mlp", "regression")
    noise = torch.tensor(NOISE, requires_grad=True)
    (ours,) = torch.autograd.grad(case.ours("kron").log_marginal_likelihood(sigma_noise=noise), noise)
    up, down = (float(case.theirs("kron", sigma_noise=NOISE + s).log_marginal_likelihood()) for s in (1e-5, -1e-5))
    assert float(ours) == pytest.approx((up - down) / 2e-5, rel=1e-6)  # central differences
    peer = case.theirs("kron", sigma_noise=noise)
    (theirs,) = torch.autograd.grad(peer.log_marginal_likelihood().squeeze(), noise)
    assert abs(float(theirs - ours)) > 0.01 * abs(float(ours)), "laplace-torch has changed"
