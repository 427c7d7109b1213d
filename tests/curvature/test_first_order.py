"""Gradients of single examples and what is made of them, against plain autograd of one example after the other."""

import copy
from functools import partial

import pytest
import reference_problem as ref
import torch
from fitting import likelihood_for
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    Categorical,
    ClippedGradients,
    DenseJacobian,
    Gaussian,
    GGNDiagonal,
    GGNDiagonals,
    GGNTraces,
    GradientCovariance,
    GradientDots,
    GradientGram,
    GradientMoments,
    GradientNorms,
    Gradients,
    GradientSum,
    NetworkJacobian,
    OuterProduct,
    Parameters,
    compute,
)
from lapkit.curvature.quantities.gradient_products import inner_products

FIRST_ORDER = {
    "gradients": Gradients,
    "norms": GradientNorms,
    "sum": GradientSum,
    "moments": GradientMoments,
    "covariance": GradientCovariance,
    "gram": GradientGram,
    "dots": GradientDots,
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def flat(parts):
    return torch.cat([t.flatten() for t in parts.values()])


def slow_gradients(jacobian, model, x, y, loss):
    """g_n, (N, P), from the Jacobian and the loss' gradient at each output."""
    f = copy.deepcopy(model)(x).reshape(len(x), -1)
    return torch.stack([torch.func.grad(loss)(f_n, y_n) @ J_n for f_n, y_n, J_n in zip(f, y, jacobian, strict=True)])


def test_all_first_order_quantities_of_every_network(network, slow_jacobian):
    model, inputs = network
    x = inputs(5)
    likelihood, y, loss = likelihood_for(model, x)
    g = slow_gradients(slow_jacobian(model, x), model, x, y, loss).detach()
    given = torch.randn(g.shape[1], 2)
    wanted = {**FIRST_ORDER, "given": partial(GradientDots, vectors=given)}
    found = compute(model, likelihood, [(x[:3], y[:3]), (x[3:], y[3:])], wanted)
    close(found["gradients"].matrix(), g)
    close(found["norms"].squares(), g.square().sum(1))
    sizes = [p.numel() for p in model.parameters()]
    for (name, _), part in zip(model.named_parameters(), g.split(sizes, dim=1), strict=True):
        close(found["norms"][name], part.square().sum(1))
    close(found["sum"].vector(), g.mean(0))
    close(flat(found["moments"].sum()), g.sum(0))
    close(flat(found["moments"].second_moment()), g.square().mean(0))
    close(flat(found["moments"].variance()), g.var(0, correction=0))
    close(flat(found["moments"].variance(unbiased=True)), g.var(0))
    close(found["covariance"].uncentred(), g.T @ g / 5)
    close(found["covariance"].centred(unbiased=True), g.T.cov())
    close(found["gram"].matrix(), g @ g.T)
    close(found["dots"].tensors["dot"], g @ g.mean(0))
    close(found["given"].tensors["dot"], g @ given)


@pytest.mark.parametrize("each", ["model", "layer", "parameter"])
def test_clipped_sums_of_every_network(network, slow_jacobian, each):
    """The bound lies between the norms, so that some are clipped and some are not."""
    model, inputs = network
    x = inputs(4)
    likelihood, y, loss = likelihood_for(model, x)
    g = slow_gradients(slow_jacobian(model, x), model, x, y, loss).detach()
    bound = float(g.norm(dim=1).median()) * (1.0 if each == "model" else 0.4)
    groups = {}
    sizes = [p.numel() for p in model.parameters()]
    for (name, _), part in zip(model.named_parameters(), g.split(sizes, dim=1), strict=True):
        key = {"model": "", "layer": name.rpartition(".")[0], "parameter": name}[each]
        groups.setdefault(key, []).append((name, part))
    expected = {}
    for members in groups.values():
        norms = torch.cat([part for _, part in members], dim=1).norm(dim=1)
        factors = torch.where(norms > bound, bound / norms, 1.0)
        expected |= {name: (factors[:, None] * part).sum(0) for name, part in members}
    clip = partial(ClippedGradients, bound=bound, each=each)
    found = compute(model, likelihood, [(x[:1], y[:1]), (x[1:], y[1:])], {"clipped": clip})["clipped"]
    for name, p in model.named_parameters():
        close(found[name], expected[name].reshape(p.shape))
    assert clip(Parameters.of(model)).sensitivity == pytest.approx(bound * len(groups) ** 0.5)


def test_the_diagonal_of_each_example_of_every_network(network, slow_jacobian):
    model, inputs = network
    x = inputs(4)
    likelihood, y, loss = likelihood_for(model, x)
    f = copy.deepcopy(model)(x).reshape(len(x), -1).detach()
    jacobian = slow_jacobian(model, x)
    curvatures = [torch.func.hessian(loss)(f_n, y_n) for f_n, y_n in zip(f, y, strict=True)]
    expected = torch.stack([(J.T @ L @ J).diagonal() for J, L in zip(jacobian, curvatures, strict=True)])
    wanted = {"each": GGNDiagonals, "all": GGNDiagonal, "traces": GGNTraces}
    for budget in (None, 1):
        found = compute(model, likelihood, [(x[:3], y[:3]), (x[3:], y[3:])], wanted, memory_budget=budget)
        close(found["each"].matrix(), expected)
        close(found["each"].matrix().sum(0), found["all"].operator().diagonal())
        close(found["traces"].squares(), expected.sum(1))


GOLDEN = {"rel": 1e-9}


@pytest.fixture
def reference():
    model, data = ref.model(), [(ref.inputs(), ref.labels())]
    return compute(model, Categorical(), data, {**FIRST_ORDER, "clipped": partial(ClippedGradients, bound=1.5)})


def test_golden_numbers(reference):
    """Seeds, section 8."""
    assert reference["sum"].vector().norm() == pytest.approx(ref.MEAN_GRADIENT_NORM, **GOLDEN)
    assert reference["norms"].norms().tolist() == pytest.approx(list(ref.EXAMPLE_GRADIENT_NORMS), **GOLDEN)
    assert float(flat(reference["moments"].second_moment()).sum()) == pytest.approx(5.250276054621, rel=1e-12)
    assert float(flat(reference["moments"].variance()).sum()) == pytest.approx(5.027528732042, rel=1e-12)
    assert reference["clipped"].vector().norm() == pytest.approx(0.350500785498, rel=1e-11)
    assert float(reference.totals.loss) / reference.count == pytest.approx(ref.MEAN_LOSS, rel=1e-11)


def test_invariants(reference):
    mean = reference["sum"].vector()
    close(reference["gradients"].matrix().mean(0), mean)
    close(reference["gram"].matrix().diagonal(), reference["norms"].squares())
    close(reference["gram"].matrix().mean(1), reference["dots"].tensors["dot"])
    close(reference["covariance"].uncentred().diagonal(), flat(reference["moments"].second_moment()))
    close(reference["covariance"].centred().diagonal(), flat(reference["moments"].variance()))
    values = torch.linalg.eigvalsh(reference["gram"].matrix() / 6)
    close(torch.linalg.eigvalsh(reference["covariance"].uncentred())[-6:], values)
    assert int(reference["clipped"].tensors["clipped/"]) == sum(n > 1.5 for n in ref.EXAMPLE_GRADIENT_NORMS)


@pytest.mark.peer("backpack")
def test_backpacks_first_order_extensions():
    """Theirs are of gradients divided by N."""
    from backpack import backpack, extend, extensions

    model = ref.model()
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared(), extensions.Variance()):
        loss(extended(ref.inputs().requires_grad_()), ref.labels()).backward()
    found = compute(model, Categorical(), [(ref.inputs(), ref.labels())], FIRST_ORDER)
    for name, p in extended.named_parameters():
        close(found["gradients"][name] / 6, p.grad_batch)
        close(found["norms"][name] / 36, p.batch_l2)
        close(found["moments"].sum_of_squares()[name] / 36, p.sum_grad_squared)
        close(found["moments"].variance()[name] / 36, p.variance)


def sequence_model():
    """Outputs at T positions: (N, T, C)."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_losses_summed_over_positions():
    model, x, y = sequence_model(), torch.randn(4, 5, 3), torch.randint(2, (4, 5))
    g = []
    for x_n, y_n in zip(x, y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x_n), y_n, reduction="sum"), list(model.parameters()))
        g.append(torch.cat([t.flatten() for t in grads]))
    g = torch.stack(g)
    found = compute(model, Categorical(), [(x[:3], y[:3]), (x[3:], y[3:])], FIRST_ORDER)
    close(found["gradients"].matrix(), g)
    close(found["norms"].squares(), g.square().sum(1))
    close(found["gram"].matrix(), g @ g.T)


@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("budget", [1, 2**20])
def test_contractions_of_factored_jacobians(positions, groups, transposed, budget):
    """Both routes for several positions: pairs where they are few, the expanded Jacobian where they are many."""
    jacobian = OuterProduct(
        torch.randn(4, positions, groups, 5), torch.randn(3, 4, positions, groups, 6), transposed, budget
    )
    dense = jacobian.to_dense()
    for one in (jacobian, DenseJacobian(dense)):
        close(one.square_norms(), dense.square().sum(-1))
        close(one.squares(), dense.square().sum(0))
    both = NetworkJacobian((jacobian, DenseJacobian(dense)))
    close(both.square_norms(), 2 * dense.square().sum(-1))


@pytest.mark.parametrize("positions", [(1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("budget", [1, 500, 2**28])
def test_inner_products_between_batches(positions, budget):
    one, two = (
        OuterProduct(torch.randn(n, t, 2, 5), torch.randn(1, n, t, 2, 3))
        for n, t in ((4, positions[0]), (6, positions[1]))
    )
    expected = one.to_dense()[0] @ two.to_dense()[0].T
    close(inner_products(one, two, budget), expected)
    close(inner_products(DenseJacobian(one.to_dense()), two, budget), expected)


def test_a_gradient_of_zero_is_not_clipped_to_nan():
    model = nn.Linear(2, 1)
    x = torch.randn(3, 2)
    y = model(x).detach()
    y[0] += 100
    found = compute(model, Gaussian(), [(x, y)], {"clipped": partial(ClippedGradients, bound=1.0)})["clipped"]
    assert float(torch.cat([t.flatten() for t in found.sum().values()]).norm()) == pytest.approx(1.0)
    assert int(found.tensors["clipped/"]) == 1


def test_a_bound_for_each_layer():
    model, data = ref.model(), [(ref.inputs(), ref.labels())]
    bounds = {"0": 0.1, "2": 0.5, "4": 1.0}
    found = compute(
        model,
        Categorical(),
        data,
        {"mixed": partial(ClippedGradients, bound=bounds, each="layer")}
        | {name: partial(ClippedGradients, bound=c, each="layer") for name, c in bounds.items()},
    )
    for layer in bounds:
        for own, total in found["mixed"].by_layer()[layer].items():
            close(total, found[layer].by_layer()[layer][own])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bound": 0.0}, "positive and finite"),
        ({"bound": float("inf")}, "positive and finite"),
        ({"bound": {"0": 1.0}, "each": "layer"}, r"the groups are \['0', '2', '4'\]"),
        ({"bound": 1.0, "each": "tensor"}, "Choose one of 'model', 'layer', 'parameter'"),
    ],
)
def test_bounds_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        ClippedGradients(Parameters.of(ref.model()), **options)


def test_vectors_of_another_length():
    with pytest.raises(ValueError, match=r"\(59,\) or \(59, R\), got \(58, 1\)"):
        GradientDots(Parameters.of(ref.model()), torch.ones(58))


def test_one_example_has_no_unbiased_variance():
    found = compute(ref.model(), Categorical(), [(ref.inputs()[:1], ref.labels()[:1])], FIRST_ORDER)
    assert float(flat(found["moments"].variance()).abs().max()) < 1e-15
    for variance in (found["moments"].variance, found["covariance"].centred):
        with pytest.raises(ValueError, match="at least two examples"):
            variance(unbiased=True)
