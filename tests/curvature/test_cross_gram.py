"""Inner products of the Jacobians of two batches: every class with every class, against the expanded Jacobians."""

import itertools

import pytest
import torch
from torch import nn

from lapkit.curvature import GGN, Categorical, DenseJacobian, Engine, NetworkJacobian, OuterProduct, Parameters
from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.jacobians.inner_products import filled
from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.jacobians.patches import Patches
from lapkit.curvature.jacobians.routed import RoutedJacobian
from lapkit.curvature.jacobians.sum_jacobian import SumJacobian
from lapkit.curvature.jacobians.tied import TiedJacobian
from lapkit.curvature.parameters import borrowed

OUTPUTS, INPUTS = 6, 4  # of a weight of 24 entries, which all classes below stand for
BUDGETS = (1, 3000, 2**28)


def random(low, high):
    return int(torch.randint(low, high + 1, ()))


def table_index(rows, *shape):
    """Some rows twice, some never, some places padded."""
    return torch.randint(-1, rows, shape)


def outer_product(k, n, budget, groups=1, transposed=False):
    t = random(1, 4)
    a, g = torch.randn(n, t, groups, INPUTS // groups), torch.randn(k, n, t, groups, OUTPUTS)
    return OuterProduct(a, g, transposed, budget)


def convolution(k, n, budget):
    """Patches of images of any width: one channel, kernels of four."""
    width = random(4, 7)
    patches = Patches(torch.randn(n, 1, 1, width), (4,), (1,), (1,), 1)
    return OuterProduct(patches, torch.randn(k, n, width - 3, 1, OUTPUTS), False, budget)


def embedding(k, n, budget):
    t = random(1, 4)
    return EmbeddingJacobian(table_index(OUTPUTS, n, t), torch.randn(k, n, t, INPUTS), OUTPUTS, budget)


def tied(k, n, budget):
    return TiedJacobian(embedding(k, n, budget), outer_product(k, n, budget))


def routed(k, n, budget, experts=2, transposed=False):
    """Rows in any number, none for some examples."""
    rows = random(1, 9)
    a, g = torch.randn(rows, INPUTS // 2), torch.randn(k, rows, OUTPUTS)
    owner, expert = torch.randint(n, (rows,)), torch.randint(experts, (rows,))
    return RoutedJacobian(a, g, owner, expert, n, experts, transposed, budget)


def summed(k, n, budget):
    return SumJacobian((outer_product(k, n, budget), outer_product(k, n, budget, transposed=True)))


KINDS = {
    "product": outer_product,
    "transposed product": lambda k, n, budget: outer_product(k, n, budget, transposed=True),
    "product in groups": lambda k, n, budget: outer_product(k, n, budget, groups=2),
    "convolution": convolution,
    "embedding": embedding,
    "tied": tied,
    "routed": routed,
    "transposed routed": lambda k, n, budget: routed(k, n, budget, transposed=True),
    "sum": summed,
    "dense": lambda k, n, budget: DenseJacobian(torch.randn(k, n, OUTPUTS * INPUTS)),
    "network": lambda k, n, budget: NetworkJacobian(
        (DenseJacobian(torch.randn(k, n, 12)), EmbeddingJacobian(table_index(3, n, 2), torch.randn(k, n, 2, 4), 3))
    ),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def expected(one, two):
    return torch.einsum("knp,lmp->knlm", one.to_dense(), two.to_dense())


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_every_class_with_every_class(first, second):
    """Of random numbers of columns, examples and positions, in pieces of one example and all at once."""
    for budget, _ in itertools.product(BUDGETS, range(3)):
        one = KINDS[first](random(1, 3), random(1, 5), budget)
        two = KINDS[second](random(1, 3), random(1, 5), budget)
        close(one.gram(two), expected(one, two))


@pytest.mark.parametrize("kind", KINDS)
def test_with_itself(kind):
    """The half that is mirrored, and the same Jacobian taken for another."""
    for budget, _ in itertools.product(BUDGETS, range(3)):
        one = KINDS[kind](random(1, 3), random(1, 5), budget)
        close(one.gram(), expected(one, one))
        close(one.gram(one), expected(one, one))
        close(one.gram(one.select(slice(None))), expected(one, one))
        close(one.gram().permute(2, 3, 0, 1), one.gram())


@pytest.mark.parametrize("kind", KINDS)
def test_selected_examples(kind):
    """Those of a subset with all: curvature of some examples and gradients of all."""
    one = KINDS[kind](2, 5, 2**28)
    for part in (slice(1, 3), slice(0, 5, 2), slice(4, 5)):
        close(one.select(part).to_dense(), one.to_dense()[:, part])
        close(one.select(part).gram(one), expected(one, one)[:, part])


@pytest.mark.parametrize("kind", KINDS)
def test_many_vectors(kind):
    for budget, vectors in itertools.product(BUDGETS, (1, 5)):
        one = KINDS[kind](random(1, 3), random(1, 5), budget)
        directions, cotangents = torch.randn(one.shape[2], vectors), torch.randn(*one.shape[:2], vectors)
        close(one.project(directions), torch.einsum("knp,pr->knr", one.to_dense(), directions))
        close(one.pull_back_all(cotangents), torch.einsum("knp,knr->pr", one.to_dense(), cotangents))


@pytest.mark.parametrize("way", ["_gram_of_pairs", "_gram_of_rows"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_both_ways_of_a_product(way, groups, budget):
    for _ in range(5):
        one, two = (outer_product(random(1, 3), random(1, 5), budget, groups) for _ in range(2))
        close(getattr(one, way)(two), expected(one, two))


def refuse(*_):
    raise AssertionError("Taken.")


def test_one_position_is_not_expanded(monkeypatch):
    """Two products of small matrices, and nothing of the size of the weights."""
    for name in ("to_dense", "_gram_of_pairs", "_gram_of_rows"):
        monkeypatch.setattr(OuterProduct, name, refuse)
    (a, g), (b, h) = ((torch.randn(n, 1, 1, 50), torch.randn(k, n, 1, 1, 40)) for k, n in ((2, 3), (1, 4)))
    gram = OuterProduct(a, g).gram(OuterProduct(b, h))
    close(gram, torch.einsum("kntgo,lmtgo,ntgi,mtgi->knlm", g, h, a, b))


@pytest.mark.parametrize(("positions", "width", "other"), [(2, 40, "_gram_of_rows"), (20, 2, "_gram_of_pairs")])
def test_the_way_with_fewer_multiplications(positions, width, other, monkeypatch):
    monkeypatch.setattr(OuterProduct, other, refuse)
    one, two = (
        OuterProduct(torch.randn(n, positions + n, 2, width), torch.randn(3, n, positions + n, 2, width))
        for n in (2, 3)
    )
    close(one.gram(two), expected(one, two))


@pytest.mark.parametrize(("rows", "positions", "way"), [(60, 1, "pairs"), (3, 30, "rows")])
def test_the_way_of_an_embedding(rows, positions, way, monkeypatch):
    """Few tokens of a large table by pairs of positions, many tokens of a small one row by row."""
    if way == "pairs":
        monkeypatch.setattr(EmbeddingJacobian, "_gram_of_rows", refuse)
    else:
        monkeypatch.setattr("lapkit.curvature.jacobians.embedding.over_pairs", refuse)
    make = lambda k, n, t: EmbeddingJacobian(table_index(rows, n, t), torch.randn(k, n, t, 5), rows)  # noqa: E731
    one, two = make(2, 40, positions), make(1, 50, positions + 1)
    close(one.gram(two), expected(one, two))
    close(one.gram(), expected(one, one))


def test_embeddings_that_share_no_row():
    one = EmbeddingJacobian(torch.tensor([[1, 2]]), torch.randn(1, 1, 2, 3), 9)
    two = EmbeddingJacobian(torch.tensor([[3, 4]]), torch.randn(1, 1, 2, 3), 9)
    assert not one.gram(two).any()


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("columns", [None, 2, 7])
def test_blocks_are_put_in_place(step, columns):
    values = torch.randn(5, 3)
    other = values if columns is None else torch.randn(columns, 3)
    calls = []

    def block(one, two):
        calls.append((one.start, two.start))
        return (values[one] @ other[two].T)[None, :, None]

    close(filled(block, 5, columns, step)[0, :, 0], values @ other.T)
    assert len(calls) == len(set(calls))
    if columns is None:
        assert all(two <= one for one, two in calls)


def test_other_weights_are_refused():
    one, two = DenseJacobian(torch.randn(1, 2, 3)), DenseJacobian(torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match="same weights, got 3 and 4"):
        one.gram(two)


def jacobian_of(model, x, columns=None) -> Jacobian:
    """Unit columns, or those of a likelihood."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        backprop = Engine(model, parameters)(x)
        if columns is None:
            return backprop.jacobian()
        f = backprop.output.detach()
        sent, parts = columns(f), {}
        backprop(sent, parts.__setitem__, backprop.plan(len(sent)), whole=True)
        named = zip(parameters.names, parameters.tensors, strict=True)
        zeros = {n: DenseJacobian(f.new_zeros(len(sent), len(f), t.numel())) for n, t in named}
        return NetworkJacobian(tuple(parts.get(n, zeros[n]) for n in parameters.names))


def roots(f):
    y = torch.arange(f[..., 0].numel()).reshape(f.shape[:-1]) % f.shape[-1]
    return GGN()(Categorical(), f, y)[:2]


def random_columns(f):
    return torch.randn(3, *f.shape)


def test_every_network(network):
    """Two batches and two kinds of columns."""
    model, inputs = network
    one, two = jacobian_of(model, inputs(3)), jacobian_of(model, inputs(2), random_columns)
    close(one.gram(two), expected(one, two))
    close(one.gram(), expected(one, one))
    close(one.select(slice(1, 3)).gram(two), expected(one, two)[:, 1:])


class Sentences(nn.Module):
    """Tied embedding, attention-like mixing and a product at each position, for sequences of any length."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        h = self.table(tokens)
        h = h + self.mix(h.cumsum(1)).tanh()
        return (h @ self.table.weight.T).sum(1)


def test_batches_of_other_lengths():
    model = Sentences()
    one = jacobian_of(model, torch.randint(7, (3, 5)))
    two = jacobian_of(model, torch.randint(7, (2, 8)), random_columns)
    assert isinstance(one.parts[0], TiedJacobian)
    close(one.gram(two), expected(one, two))


def test_images_of_other_sizes():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    one = jacobian_of(model, torch.randn(3, 2, 6, 6), roots)
    two = jacobian_of(model, torch.randn(2, 2, 5, 8))
    assert one.shape[0] == 2
    close(one.gram(two), expected(one, two))
