"""What is kept of the columns: structures against the dense GGN, Kronecker factors against their definition."""

import copy
from types import SimpleNamespace

import oracles
import pytest
import torch
from fitting import likelihood_for
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
)

STRUCTURES = {"diagonal": GGNDiagonal, "blocks": GGNBlocks, "dense": GGNDense, "kronecker": GGNKronecker}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def fit(model, batches, likelihood, structures=STRUCTURES, **options):
    """Quantities by name after one pass."""
    parameters = Parameters.of(model)
    quantities = {name: STRUCTURES[name](parameters) for name in structures}
    accumulate(model, parameters, likelihood, GGN(), batches, list(quantities.values()), **options)
    return SimpleNamespace(parameters=parameters, **quantities)


def true_ggn(jacobian, model, x, y, loss):
    f = copy.deepcopy(model)(x).reshape(len(x), -1)
    return oracles.ggn(jacobian, oracles.output_hessian(loss, f, y))


def test_exact_structures_of_every_network(network, slow_jacobian):
    model, inputs = network
    x = inputs(5)
    likelihood, y, loss = likelihood_for(model, x)
    expected = true_ggn(slow_jacobian(model, x), model, x, y, loss)
    found = fit(model, [(x[:3], y[:3]), (x[3:], y[3:])], likelihood)
    close(found.dense.result().operator().to_dense(), expected)
    close(found.diagonal.result().operator().to_dense(), torch.diag(expected.diagonal()))
    sizes = found.parameters.sizes
    blocks = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(expected.split(sizes))]
    close(found.blocks.result().operator().to_dense(), torch.block_diag(*blocks))


def test_sums_do_not_depend_on_batches_their_order_or_the_budget(network):
    model, inputs = network
    x = inputs(5)
    likelihood, y, _ = likelihood_for(model, x)
    expected = fit(model, [(x, y)], likelihood)
    order = torch.tensor([3, 0, 4, 1, 2])
    for sizes, options in (([2, 3], {}), ([1] * 5, {}), ([5], {"memory_budget": 1}), ([4, 1], {"memory_budget": 1})):
        found = fit(model, [(x[part], y[part]) for part in order.split(sizes)], likelihood, **options)
        for name in STRUCTURES:
            close(
                getattr(found, name).result().operator().to_dense(),
                getattr(expected, name).result().operator().to_dense(),
            )


def test_biases_have_exact_kronecker_blocks(network):
    model, inputs = network
    x = inputs(5)
    likelihood, y, _ = likelihood_for(model, x)
    found = fit(model, [(x[:2], y[:2]), (x[2:], y[2:])], likelihood)
    pairs = zip(found.kronecker.result().operator().blocks, found.blocks.result().operator().blocks, strict=True)
    checked = 0
    for tensor, (kron, exact) in zip(found.parameters.tensors, pairs, strict=True):
        if tensor.ndim <= 1:
            close(kron.to_dense(), exact.to_dense())
            checked += 1
    assert checked == sum(p.ndim <= 1 for p in model.parameters())


def roots(f, y, loss):
    """A square root S of each output Hessian from its eigenvectors, columns first: (C, N, C)."""
    values, vectors = torch.linalg.eigh(oracles.output_hessian(loss, f, y))
    return (vectors * values.clamp_min(0).sqrt()[:, None]).movedim(2, 0)


def linear_patches(layer, x):
    return x.reshape(len(x), -1, 1, layer.in_features)


def conv_patches(layer, x):
    """(N, T, G, I): what `F.unfold` gives, in groups of channels."""
    if x.ndim == 3:  # one dimension is two with a width of one
        x, kernel, options = x[..., None], (*layer.kernel_size, 1), [(*o, 0) for o in (layer.padding,)]
        dilation, padding, stride = (*layer.dilation, 1), options[0], (*layer.stride, 1)
    else:
        kernel, dilation, padding, stride = layer.kernel_size, layer.dilation, layer.padding, layer.stride
    patches = F.unfold(x, kernel, dilation, padding, stride).mT
    return patches.unflatten(-1, (layer.groups, -1))


def to_positions(layer, g):
    """Cotangents of a layer's output as (N, T, G, O)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, 1, layer.out_features)
    return g.flatten(2).mT.unflatten(-1, (layer.groups, -1))


# name: (layer, what comes after it, inputs, patches)
FACTORED = {
    "linear": (lambda: nn.Linear(4, 5), lambda: nn.Sequential(nn.Tanh(), nn.Linear(5, 3)), (4,), linear_patches),
    "sequence": (
        lambda: nn.Linear(4, 5),
        lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        (6, 4),
        linear_patches,
    ),
    "conv2d": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 1)),
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        (2, 5, 4),
        conv_patches,
    ),
    "conv2d in groups": (
        lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=2),
        lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (4, 4, 4),
        conv_patches,
    ),
    "depthwise": (
        lambda: nn.Conv2d(3, 6, 2, groups=3),
        lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (3, 3, 3),
        conv_patches,
    ),
    "conv1d": (
        lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2),
        lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 7),
        conv_patches,
    ),
}


@pytest.mark.parametrize("case", FACTORED)
def test_kronecker_factors_are_what_the_definition_says(case):
    """B = sum g g^T, A = sum a a^T / (N T), with g by plain autograd at the layer's output."""
    make, rest, shape, patches = FACTORED[case]
    layer, rest = make(), rest()
    x, y = torch.randn(5, *shape), torch.tensor([0, 1, 2, 0, 1])
    h = layer(x)
    f = rest(h)
    s = roots(f, y, lambda f, y: F.cross_entropy(f[None], y[None]))
    g = [to_positions(layer, torch.autograd.grad(f, h, column, retain_graph=True)[0]) for column in s]
    b = sum(torch.einsum("ntgo,ntgp->gop", one, one) for one in g)
    a = patches(layer, x)
    a = torch.einsum("ntgi,ntgj->gij", a, a) / (a.shape[0] * a.shape[1])
    model = nn.Sequential(layer, rest)
    kronecker = fit(model, [(x[:2], y[:2]), (x[2:], y[2:])], Categorical()).kronecker
    found_b, found_a = kronecker.result().factors("0.weight")
    close(found_b, b)
    close(found_a, a)
    expected = torch.block_diag(*[torch.kron(b_, a_) for b_, a_ in zip(b, a, strict=True)])
    close(kronecker.result().operator().blocks[0].to_dense(), expected)


class Transposed(nn.Module):
    """`x W` with the weight stored as inputs x outputs."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x @ self.weight


def test_weights_stored_as_inputs_times_outputs_have_the_factors_the_other_way_round():
    straight, rest = nn.Linear(4, 5, bias=False), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))
    turned = Transposed(straight.weight.detach().T.clone())
    data = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
    one, two = (fit(nn.Sequential(layer, rest), data, Categorical()) for layer in (straight, turned))
    for structure in ("kronecker", "blocks"):
        here, there = (getattr(found, structure).result().operator().blocks[0].to_dense() for found in (one, two))
        close(there.reshape(4, 5, 4, 5).permute(1, 0, 3, 2).reshape(20, 20), here)
    b, a = one.kronecker.result().factors("0.weight")
    assert (b.shape, a.shape) == ((1, 5, 5), (1, 4, 4))
    for actual, expected in zip(two.kronecker.result().factors("0.weight"), (a, b), strict=True):
        close(actual, expected)


def test_a_single_example_makes_kronecker_exact_for_linear_layers():
    """B (x) A is the block itself when one example has one position."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = fit(model, [(torch.randn(1, 4), torch.tensor([1]))], Categorical())
    close(found.kronecker.result().operator().to_dense(), found.blocks.result().operator().to_dense())


def conv_relu_linear():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


def conv_tanh_pool_linear():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 4))


def conv_relu_average():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten())


CONVOLUTIONS = [conv_relu_linear, conv_tanh_pool_linear, conv_relu_average]


def image_data():
    return torch.randn(16, 2, 8, 8), torch.arange(16) % 4


@pytest.mark.parametrize("build", CONVOLUTIONS)
def test_trace_of_convolution_blocks_is_near_the_exact_one(build):
    """Reference seeds 2.6: 1.01, 1.02 and 0.70 where factors without the division by T reach 31 to 555."""
    model, data = build(), image_data()
    found = fit(model, [data], Categorical(), ["kronecker", "blocks"])
    b, a = found.kronecker.result().factors("0.weight")
    ratio = b[0].trace() * a[0].trace() / found.blocks.result().operator().blocks[0].trace()
    assert 0.5 < ratio < 1.5


@pytest.mark.peer("backpack")
@pytest.mark.parametrize("build", CONVOLUTIONS)
def test_trace_of_backpacks_factors_is_far_from_the_exact_one(build):
    """Why lapkit's convolution factors are not those of BackPACK; its diagonal agrees."""
    from backpack import backpack, extend, extensions

    model, (x, y) = build(), image_data()
    found = fit(model, [(x, y)], Categorical(), ["diagonal", "blocks"])
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(extensions.KFLR(), extensions.DiagGGNExact()):
        loss(extended(x.clone().requires_grad_()), y).backward()
    one, two = extended[0].weight.kflr
    assert one.trace() * two.trace() > 10 * found.blocks.result().operator().blocks[0].trace()
    close(
        torch.cat([p.diag_ggn_exact.flatten() for p in extended.parameters()]),
        found.diagonal.result().operator().values,
    )


@pytest.mark.peer("backpack")
def test_linear_layers_have_backpacks_factors():
    from backpack import backpack, extend, extensions

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    kronecker = fit(model, [(x, y)], Categorical()).kronecker
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(extensions.KFLR()):
        loss(extended(x.clone().requires_grad_()), y).backward()
    for name, parameter in extended.named_parameters():
        theirs = parameter.kflr[0] if parameter.ndim == 1 else torch.kron(*parameter.kflr)
        ours = kronecker.result().operator().blocks[kronecker.parameters.names.index(name)].to_dense()
        close(ours, theirs)
