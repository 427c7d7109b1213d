"""Patches of a convolution's input, whole and cut out a few examples at a time, and large symmetric products."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    DenseJacobian,
    Engine,
    GGNBlocks,
    GGNDiagonal,
    GGNKronecker,
    OuterProduct,
    Parameters,
    accumulate,
    borrowed,
)
from lapkit.curvature.jacobians.outer_product import concatenated
from lapkit.curvature.jacobians.patches import Patches


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


GEOMETRIES = {  # name: (channels and lengths of the padded input, kernel, stride, dilation, groups)
    "1d": ((4, 9), (3,), (1,), (1,), 1),
    "1d, strided, dilated, groups": ((4, 11), (3,), (2,), (2,), 2),
    "1d, as long as the kernel": ((2, 3), (3,), (2,), (1,), 1),
    "2d": ((3, 5, 6), (3, 2), (1, 1), (1, 1), 1),
    "2d, one by one": ((3, 4, 4), (1, 1), (2, 1), (1, 1), 1),
    "2d, strided, dilated, groups": ((4, 9, 8), (3, 2), (2, 3), (1, 2), 2),
    "2d, depthwise": ((3, 5, 5), (2, 2), (1, 2), (2, 1), 3),
    "3d": ((2, 4, 3, 5), (2, 2, 3), (1, 1, 2), (1, 1, 1), 1),
    "3d, strided, dilated, groups": ((4, 5, 4, 6), (2, 1, 2), (2, 1, 1), (2, 1, 3), 2),
}


def patches(name, examples=3, rounds=2):
    size, *settings = GEOMETRIES[name]
    return Patches(torch.randn(examples, rounds, *size), *settings)


def by_hand(patches):
    """`(N, T, G, I)`, every number looked up by itself."""
    x, groups, size = patches.x, patches.groups, patches.x.shape[3:]
    outputs = [
        range(0, length - d * (k - 1), s)
        for length, k, s, d in zip(size, patches.kernel, patches.stride, patches.dilation, strict=True)
    ]
    offsets = list(
        itertools.product(*[range(0, d * k, d) for d, k in zip(patches.dilation, patches.kernel, strict=True)])
    )
    each = x.shape[2] // groups
    rows = [
        [
            [
                x[(slice(None), r, c, *[o + p for o, p in zip(offset, place, strict=True)])]
                for c in mine
                for offset in offsets
            ]
            for mine in (range(g * each, (g + 1) * each) for g in range(groups))
        ]
        for r in range(x.shape[1])
        for place in itertools.product(*outputs)
    ]
    return torch.stack([torch.stack([torch.stack(group, -1) for group in row], 1) for row in rows], 1)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_by_hand(name):
    given = patches(name)
    expected = by_hand(given)
    assert given.shape == expected.shape
    assert torch.equal(given[:], expected)
    assert given.nbytes == expected.numel() * expected.element_size()
    assert given.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name.startswith("2d")])
def test_patches_are_those_of_unfold(name):
    given = patches(name, rounds=1)
    unfolded = F.unfold(given.x[:, 0], given.kernel, dilation=given.dilation, stride=given.stride)
    assert torch.equal(given[:], unfolded.unflatten(1, (given.groups, -1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_is_the_product_with_its_patches(name):
    given = patches(name, rounds=1)
    channels, groups = given.x.shape[2], given.groups
    weight = torch.randn(2 * groups, channels // groups, *given.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(given.kernel) - 1]
    expected = convolve(given.x[:, 0], weight, stride=given.stride, dilation=given.dilation, groups=groups)
    actual = torch.einsum("ntgi,goi->ngot", given[:], weight.reshape(groups, 2, -1))
    close(actual.flatten(1, 2), expected.flatten(2))


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3), slice(2, 3), slice(1, 9), slice(None)])
def test_some_examples_alone(name, part):
    given = patches(name)
    assert torch.equal(given[part], by_hand(given)[part])


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("part", [slice(1, 3), slice(None)])
def test_rows_are_patches_with_the_kernel_before_channels(name, part):
    given = patches(name)
    expected, kernel = by_hand(given)[part], math.prod(given.kernel)
    assert torch.equal(given.rows(part), expected.unflatten(3, (-1, kernel)).transpose(3, 4).flatten(3))
    rows = given.rows(part).flatten(0, 1)
    close(given.in_order(torch.einsum("rgi,rgj->gij", rows, rows)), torch.einsum("ntgi,ntgj->gij", expected, expected))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_moments_of_factors(name, weighted, kept):
    given = replace(patches(name), kept=kept)
    a, weights = by_hand(given), torch.rand(3) if weighted else torch.ones(3)
    for g in (torch.randn(2, *a.shape[:3], 2), torch.randn(2, 3, *a.shape[2:3], 2, a.shape[1]).movedim(-1, 2)):
        jacobian = OuterProduct(given, g, budget=1000)
        moment, count = jacobian.input_moment(weights if weighted else None)
        close(moment, torch.einsum("n,ntgi,ntgj->gij", weights, a, a))
        assert count == pytest.approx(a.shape[1] * float(weights.sum()))
        close(jacobian.output_moment(), torch.einsum("kntgo,kntgp->gop", g, g))


def test_patches_are_kept_from_the_second_time_on():
    for kept in (True, False):
        given = replace(patches("2d"), kept=kept)
        expected = by_hand(given)
        for part in (slice(0, 2), slice(2, 3), slice(0, 2), slice(2, 3), slice(0, 3)):
            assert torch.equal(given[part], expected[part])
        one, two = given[0:2], given[0:2]  # both alive: what is freed may be handed out again
        assert (one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()) == kept


def test_inputs_that_are_no_contiguous_piece_of_memory():
    base = torch.randn(6, 5, 4, 2, 3)
    x = base.permute(3, 4, 2, 1, 0)[1:, ::2]  # (1, 2, 4, 5, 6)
    given = Patches(x, (2, 3), (1, 2), (1, 1), 2)
    assert torch.equal(given[:], by_hand(given))
    expanded = Patches(torch.randn(1, 1, 4, 5, 6).expand(3, 2, -1, -1, -1), (2, 3), (1, 2), (1, 1), 2)
    assert torch.equal(expanded[1:], by_hand(expanded)[1:])


def test_half_precision_is_widened():
    given = Patches(torch.randn(2, 1, 3, 5, 5).bfloat16(), (2, 2), (1, 1), (1, 1), 1)
    assert given.dtype == given[:].dtype == torch.float32
    assert given.nbytes == 4 * given.shape.numel()
    assert torch.equal(given[:], by_hand(given).float())


ALGEBRAS = {  # geometry, and outputs of each group
    "1d, strided, dilated, groups": 2,
    "1d, as long as the kernel": 3,
    "2d, one by one": 2,
    "2d, strided, dilated, groups": 3,
    "2d, depthwise": 1,
    "3d": 7,
}


@pytest.fixture(params=ALGEBRAS)
def pair(request):
    """Two columns' Jacobian with patches that are there, and one that cuts them out one example at a time."""
    given = patches(request.param, examples=4)
    g = torch.randn(2, *given.shape[:3], ALGEBRAS[request.param])
    return OuterProduct(given[:], g), OuterProduct(given, g, budget=1)


def parts(jacobian):
    """Every result of the algebra, by name."""
    columns, examples, size = jacobian.shape
    generator = torch.Generator().manual_seed(1)
    groups, inputs, outputs = *jacobian.a.shape[2:], jacobian.g.shape[-1]

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    weights, vectors, cotangent = random(size).abs(), random(size, 3), random(columns, examples)
    left, right, shares = random(groups, outputs, outputs), random(groups, inputs, inputs), random(examples).abs()
    reduced, selected = jacobian.reduced(), jacobian.select(slice(1, 3))
    rotated, (alone,) = jacobian.rotate(left, right), jacobian.split([size])
    moment, count = jacobian.input_moment()
    weighted, total = jacobian.input_moment(shares)
    return {
        "shape": torch.tensor(jacobian.shape),
        "dense": jacobian.to_dense(),
        "square_sum": jacobian.square_sum(),
        "squares": jacobian.squares(),
        "square_norms": jacobian.square_norms(),
        "weighted_gram": jacobian.weighted_gram(weights),
        "gram": jacobian.gram(),
        "project": jacobian.project(vectors),
        "pull_back": jacobian.pull_back(cotangent),
        "block": jacobian.block(),
        "output_moment": jacobian.output_moment(),
        "input_moment": moment,
        "count": torch.tensor(float(count)),
        "weighted input_moment": weighted,
        "weighted count": torch.tensor(float(total)),
        "reduced": reduced.to_dense(),
        "reduced input_moment": reduced.input_moment()[0],
        "select": selected.to_dense(),
        "select square_sum": selected.square_sum(),
        "rotate": rotated.to_dense(),
        "rotate square_sum": rotated.square_sum(),
        "rotate one side": jacobian.rotate(None, right).to_dense(),
        "split": alone.square_sum(),
        "concatenated": concatenated([jacobian, jacobian]).to_dense(),
        "concatenated square_sum": concatenated([jacobian, jacobian]).square_sum(),
    }


def test_lazy_patches_give_what_whole_ones_do(pair):
    whole, lazy = map(parts, pair)
    for name, expected in whole.items():
        close(lazy[name], expected)


def test_lazy_patches_against_the_expanded_jacobian(pair):
    for jacobian in pair:
        found, dense = parts(jacobian), parts_of_dense(jacobian)
        for name, expected in dense.items():
            close(found[name], expected)


def parts_of_dense(jacobian):
    """The results that need no factors, from every number of the Jacobian."""
    columns, examples, size = jacobian.shape
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(size, generator=generator).abs()
    vectors, cotangent = torch.randn(size, 3, generator=generator), torch.randn(columns, examples, generator=generator)
    dense = DenseJacobian(torch.einsum("kntgo,ntgi->kngoi", jacobian.g, jacobian.a[:]).flatten(2))
    names = ("square_sum", "squares", "square_norms", "gram", "block")
    return {
        "dense": dense.values,
        **{name: getattr(dense, name)() for name in names},
        "weighted_gram": dense.weighted_gram(weights),
        "project": dense.project(vectors),
        "pull_back": dense.pull_back(cotangent),
        "select": dense.values[:, 1:3],
    }


class Convolutions(nn.Module):
    """Grouped, dilated and strided convolutions in one to three dimensions, a shared one, one of one position."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=(1, 2))
        self.grouped = nn.Conv2d(4, 4, 2, groups=2, padding=1)
        self.shared = nn.Conv1d(4, 4, 3, padding=1)
        self.cube = nn.Conv3d(1, 2, 2, stride=(2, 1, 2))
        self.last = nn.Conv1d(2, 3, 4)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        h = self.grouped(self.one(x).tanh()).tanh().flatten(2)
        h = self.shared(self.shared(h).tanh())
        h = self.cube(h[:, None, :, :, None].expand(-1, -1, -1, -1, 2)).tanh().flatten(2)
        return self.head(self.last(h[:, :, :4])[:, :, 0])


BUDGETS = (1, 2000, 20000)


@pytest.fixture
def convolutions():
    return Convolutions(), torch.randn(7, 2, 7, 8)


@pytest.mark.parametrize("budget", BUDGETS)
def test_sums_do_not_depend_on_the_budget(convolutions, budget):
    model, x = convolutions
    parameters, y = Parameters.of(model), torch.randint(3, (len(x),))

    def results(memory_budget):
        quantities = [kind(parameters) for kind in (GGNDiagonal, GGNKronecker, GGNBlocks)]
        accumulate(
            model, parameters, Categorical(), GGN(), [(x, y), (x[:2], y[:2])], quantities, memory_budget=memory_budget
        )
        return [q.result() for q in quantities]

    for small, large in zip(results(budget), results(2**30), strict=True):
        assert small.tensors.keys() == large.tensors.keys()
        for name, expected in large.tensors.items():
            close(small.tensors[name], expected)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("budget", [1, *(10_000 * 2**k for k in range(8))])
def test_one_batch_may_be_cut_and_another_not(budget, order):
    model, x, y = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)),
        torch.randn(9, 1, 6, 6),
        [0, 1, 2] * 3,
    )
    parameters, y = Parameters.of(model), torch.tensor(y)
    data = [(x[:1], y[:1]), (x[1:], y[1:])][::order]
    factors = []
    for memory_budget in (budget, 2**30):
        kronecker = GGNKronecker(parameters)
        accumulate(model, parameters, Categorical(), GGN(), data, [kronecker], memory_budget=memory_budget)
        factors.append(kronecker.result().factors("0.weight"))
    for actual, expected in zip(*factors, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_jacobians_do_not_depend_on_the_budget(convolutions, budget):
    model, x = convolutions
    parameters = Parameters.of(model)
    weights, vectors = torch.rand(parameters.numel), torch.randn(parameters.numel, 2)

    def results(memory_budget):
        with borrowed(model, parameters):
            f, jacobian = Engine(model, parameters, memory_budget=memory_budget).jacobian(x)
        lazy = [p for p in jacobian.parts if isinstance(p, OuterProduct) and isinstance(p.a, Patches) and not p.a.kept]
        found = (
            f,
            jacobian.to_dense(),
            jacobian.weighted_gram(weights),
            jacobian.project(vectors),
            jacobian.square_sum(),
        )
        return found, len(lazy)

    small, cut = results(budget)
    large, kept = results(2**30)
    assert kept == 0
    assert budget > 1 or cut == 4  # of the five; the shared one is used twice and has to be put together
    for actual, expected in zip(small, large, strict=True):
        close(actual, expected)
