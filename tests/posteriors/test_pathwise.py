"""Draws without matrices: their linear maps, enumerated, have exactly the posterior's covariance."""

import pytest
import torch
from dense_laplace import problem
from networks.attention import ViT
from oracles import jacobian
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Diagonal,
    Engine,
    FactoredGGN,
    Gaussian,
    GGNProduct,
    Parameters,
    SqrtGGN,
    accumulate,
    borrowed,
)
from lapkit.curvature.products import pushforward as pushforward_module
from lapkit.curvature.products.pushforward import pushforward
from lapkit.curvature.products.square_root import normal_noise, times_square_root
from lapkit.posteriors import GaussianPosterior, function_samples, matheron_samples, sample_then_optimize
from lapkit.posteriors.pathwise import optimized

LIKELIHOODS = {"classification": Categorical, "regression": Gaussian, "binary": Bernoulli}


def close(actual, expected, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def unit_noise(likelihood, data, model):
    """The vectors e of a whole data set, one unit vector for each of its R numbers; and R."""
    counts = [len(likelihood.hessian_root(model(x).detach(), y)) * len(x) for x, y, *_ in data]
    total, start = sum(counts), iter(torch.tensor([0, *counts]).cumsum(0).tolist())

    def noise(batch, shape):
        own = len(batch.f) * shape[0]
        begin = next(start)
        return torch.eye(total)[:, begin : begin + own].view(total, len(batch.f), *shape)

    return noise, total


def precision_of(case, prior, scale=1.0):
    return scale * case.curvature("full") + torch.diag(torch.as_tensor(prior).expand(len(case.mean())))


# -- V e


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_the_square_root_squares_to_the_ggn(net, kind):
    case = problem(kind, net)
    product = GGNProduct(case.model, LIKELIHOODS[kind](), case.data)
    noise, total = unit_noise(product.likelihood, case.data, case.model)
    rows = times_square_root(product, noise)
    assert rows.shape == (total, len(case.mean()))
    close(rows.T @ rows, case.curvature("full"))


def test_weights_of_examples():
    case, weights = problem("classification"), torch.rand(13)
    data = [(x, y, w) for (x, y), w in zip(case.data, weights.split(5), strict=True)]
    product = GGNProduct(case.model, Categorical(), data)
    rows = times_square_root(product, unit_noise(product.likelihood, data, case.model)[0])
    close(rows.T @ rows, product.to_dense())


def test_noise_belongs_to_places_not_to_examples():
    """An example that occurs twice has independent noise; the size of batches does not matter."""
    x, y = torch.randn(1, 3).expand(6, 3), torch.zeros(6, dtype=torch.long)
    case = problem("classification")

    def draws(step):
        product = GGNProduct(case.model, Categorical(), list(zip(x.split(step), y.split(step), strict=True)))
        return times_square_root(product, normal_noise(3, torch.Generator().manual_seed(0)))

    close(draws(2), draws(6))
    seen = []
    noise = normal_noise(2, torch.Generator().manual_seed(0))
    product = GGNProduct(case.model, Categorical(), [(x[:4], y[:4]), (x[4:], y[4:])])
    times_square_root(product, lambda batch, shape: seen.append(noise(batch, shape)) or seen[-1])
    numbers = torch.cat([e.flatten() for e in seen])
    assert len(numbers.unique()) == len(numbers) == 2 * 6 * 2


# -- sample-then-optimise


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("prior", ["number", "each weight"])
def test_sample_then_optimize_is_exact(kind, prior):
    """All noise of data and prior as unit vectors gives the map B; `B B^T` is the posterior's covariance."""
    case, scale = problem(kind), 1.7
    size = len(case.mean())
    precision = torch.tensor(0.8) if prior == "number" else torch.linspace(0.5, 3.0, size)
    product = GGNProduct(case.model, LIKELIHOODS[kind](), case.data)
    noise, total = unit_noise(product.likelihood, case.data, case.model)

    def only_data(batch, shape):
        return torch.cat([noise(batch, shape), torch.zeros(size, len(batch.f), *shape)])

    only_prior = torch.cat([torch.zeros(total, size), torch.eye(size)])
    rows = optimized(product, precision, only_data, only_prior, scale, 1e-12, 400)
    close(rows.T @ rows, torch.linalg.inv(precision_of(case, precision, scale)))


def test_draws_follow_the_generator_and_have_the_spread():
    case = problem("classification")
    product = GGNProduct(case.model, Categorical(), case.data, check=False)
    draws = [
        sample_then_optimize(product, 2.0, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    exact = torch.linalg.inv(precision_of(case, 2.0)).diagonal()
    assert (draws[0].square().mean(0) / exact - 1).abs().max() < 5 * (2 / 200) ** 0.5


def test_sample_then_optimize_refuses():
    case = problem("classification")
    product = GGNProduct(case.model, Categorical(), case.data, check=False)
    for precision, scale in ((0.0, 1.0), (torch.ones(3), 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="positive prior precision"):
            sample_then_optimize(product, precision, scale=scale)
    with pytest.raises(RuntimeError, match=r"after 2 steps.*max_iterations"):
        sample_then_optimize(product, 1e-3, max_iterations=2)


# -- Matheron's rule


@pytest.mark.parametrize("quantity", [SqrtGGN, FactoredGGN])
@pytest.mark.parametrize("offset", ["number", "layers", "each weight"])
def test_matheron_is_exact(quantity, offset):
    case = problem("classification", "cnn")
    parameters = Parameters.of(case.model)
    made = quantity(parameters)
    accumulate(case.model, parameters, Categorical(), GGN(), case.data, [made])
    sizes = parameters.sizes
    values = {
        "number": 0.6,
        "layers": torch.linspace(0.5, 2.0, len(sizes)),
        "each weight": torch.rand(sum(sizes)) + 0.3,
    }
    precision = made.result().operator().scale(1.3).shift(values[offset], sizes)
    size, rank = precision.size, precision.rank
    noise = torch.eye(size + rank)
    prior = precision.prior_root()[:, None] * noise[:size]
    root = precision.conditioned(prior, noise[size:])
    close(root @ root.T, torch.linalg.inv(precision.to_dense()))
    posterior = GaussianPosterior(parameters.vector(), precision)
    one, two = (matheron_samples(posterior, 3, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)
    generator = torch.Generator().manual_seed(0)
    t0, e = torch.randn(size, 3, generator=generator), torch.randn(rank, 3, generator=generator)
    close(one, posterior.mean + (root @ torch.cat([t0, e])).T)


def test_matheron_needs_columns():
    with pytest.raises(TypeError, match="LowRank or Factored, got Diagonal"):
        matheron_samples(GaussianPosterior(torch.zeros(2), Diagonal(torch.ones(2))))


# -- functions


class Detached(torch.autograd.Function):
    """A square whose gradient has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class OnceDifferentiable(nn.Module):
    def forward(self, x):
        return Detached.apply(x)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
    "vision transformer": (lambda: ViT(4), (3, 8, 8)),
    "no second derivative": (lambda: nn.Sequential(nn.Linear(4, 5), OnceDifferentiable(), nn.Linear(5, 3)), (4,)),
}


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("net", NETS)
def test_pushforward(net, samples):
    build, shape = NETS[net]
    model, x = build(), torch.randn(4, *shape)
    parameters = Parameters.of(model)
    vectors = torch.randn(samples, parameters.numel)
    with borrowed(model, parameters):
        f, moved = pushforward(Engine(model, parameters), x, vectors)
        drawn = function_samples(Engine(model, parameters), x, vectors)
        small = pushforward(Engine(model, parameters, memory_budget=3000), x, vectors)[1]
    expected = torch.einsum("ncp,sp->snc", jacobian(model, x), vectors)
    close(f, model(x).detach())
    close(moved, expected)
    close(small, expected)
    close(drawn, f + expected)


def test_outputs_at_positions():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 1)), torch.randn(2, 1, 4, 4)
    parameters = Parameters.of(model)
    engine = Engine(model, parameters, output_axis=1)
    for samples in (2, 20):  # 12 outputs
        vectors = torch.randn(samples, parameters.numel)
        with borrowed(model, parameters):
            f, moved = pushforward(engine, x, vectors)
        assert f.shape == (2, 4, 3)
        rows = jacobian(model, x).unflatten(1, (3, 4)).transpose(1, 2)
        close(moved, torch.einsum("ntcp,sp->sntc", rows, vectors))


def test_the_route_follows_the_number_of_samples(monkeypatch):
    taken = []
    for name in ("_through_graph", "_by_jacobian"):
        route = getattr(pushforward_module, name)
        monkeypatch.setattr(
            pushforward_module, name, lambda *args, name=name, route=route: taken.append(name) or route(*args)
        )
    model, x = NETS["mlp"][0](), torch.randn(4, 4)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        for samples in (3, 4):
            pushforward(Engine(model, parameters), x, torch.randn(samples, parameters.numel))
    assert taken == ["_through_graph", "_by_jacobian"]
