"""Stacks of expert matrices, used as libraries use them, against one example and one expert at a time."""

import itertools

import oracles
import pytest
import torch
from fitting import fit
from networks import brute_force
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    Categorical,
    Engine,
    GGNBlocks,
    GGNDiagonal,
    GGNKronecker,
    KroneckerProduct,
    Parameters,
    borrowed,
    ekfac,
)
from lapkit.curvature.jacobians.routed import RoutedJacobian

EXPERTS, WIDTH, HIDDEN, TOP = 5, 3, 4, 2


def selected(up, down, tokens, chosen):
    """A matrix for each expert that was hit, by its number."""
    out = torch.zeros(*chosen.shape, WIDTH)
    for e in chosen.unique().tolist():
        row, slot = (chosen == e).nonzero(as_tuple=True)
        values = F.linear(F.linear(tokens[row], up[e]).tanh(), down[e].T)
        out = out.index_put((row, slot), values)
    return out


def from_the_left(up, down, tokens, chosen):
    """The same with `W x`, rows as columns."""
    out = torch.zeros(*chosen.shape, WIDTH)
    for e in chosen.unique().tolist():
        row, slot = (chosen == e).nonzero(as_tuple=True)
        values = (down[e].T @ (up[e] @ tokens[row].T).tanh()).T
        out = out.index_put((row, slot), values)
    return out


def batched(up, down, tokens, chosen):
    """Copies of the matrices for every token, `W x`."""
    x = tokens.repeat_interleave(TOP, 0)[..., None]
    h = torch.bmm(up[chosen.flatten()], x).tanh()
    return torch.bmm(down[chosen.flatten()].transpose(1, 2), h).view(*chosen.shape, WIDTH)


def batched_rows(up, down, tokens, chosen):
    """The same, `x W`, looked up by two axes of indices and by `index_select`, scaled."""
    x = tokens.repeat_interleave(TOP, 0)[:, None]
    h = torch.bmm(x, up[chosen].flatten(0, 1).mT).tanh()
    weights = down.index_select(0, chosen.flatten())
    return torch.baddbmm(torch.zeros(()), h, weights, beta=0, alpha=1.0).view(*chosen.shape, WIDTH)


def shared(up, down, tokens, chosen):
    """All experts on all tokens by batched products with one matrix, of which only some are kept."""
    every = [torch.bmm(tokens[:, None], w.T.expand(len(tokens), WIDTH, HIDDEN)).tanh() for w in up]
    every = [torch.bmm(h, w.expand(len(tokens), HIDDEN, WIDTH))[:, 0] for h, w in zip(every, down, strict=True)]
    every = torch.stack(every)
    return every[chosen, torch.arange(len(tokens))[:, None]]


WAYS = {way.__name__: way for way in (selected, from_the_left, batched, batched_rows, shared)}


class Experts(nn.Module):
    """Sequences `(N, T, 3)` whose tokens go to two of five experts each, summed with weights over the sequence.

    The fifth expert is never chosen.
    """

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.gate = nn.Linear(WIDTH, EXPERTS - 1, bias=False).requires_grad_(False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))  # inputs x outputs
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        share, chosen = self.gate(tokens).softmax(-1).topk(TOP, -1)
        out = (WAYS[self.way](self.up, self.down, tokens, chosen) * share[..., None]).sum(1)
        return self.head(out.view_as(x).sum(1).tanh())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=WAYS)
def model(request):
    return Experts(request.param)


def batch(examples, positions=4):
    return torch.randn(examples, positions, WIDTH), torch.arange(examples) % 3


def factors(model, x, y, setting):
    """Each expert's sums of outer products and its count of rows, from tokens one at a time."""
    sums = {
        "up": (torch.zeros(EXPERTS, HIDDEN, HIDDEN), torch.zeros(EXPERTS, WIDTH, WIDTH), torch.zeros(EXPERTS)),
        "down": (torch.zeros(EXPERTS, WIDTH, WIDTH), torch.zeros(EXPERTS, HIDDEN, HIDDEN), torch.zeros(EXPERTS)),
    }
    for one, label in zip(x, y, strict=True):
        total, calls = 0, []
        for token in one:
            share, chosen = model.gate(token).softmax(-1).topk(TOP)
            for s, e in zip(share, chosen.tolist(), strict=True):
                before = model.up[e] @ token
                after = model.down[e].T @ before.tanh()
                calls += [("up", e, token, before), ("down", e, before.tanh().detach(), after)]
                total = total + s * after
        f = model.head(total.tanh())
        hessian = oracles.output_hessian(lambda f, y: F.cross_entropy(f[None], y[None]), f[None], label[None])[0]
        values, vectors = torch.linalg.eigh(hessian)
        columns = (vectors * values.clamp_min(0).sqrt()).T
        seen = {}
        for name, e, a, out in calls:
            g = torch.stack([torch.autograd.grad(f, out, c, retain_graph=True)[0] for c in columns])
            seen.setdefault((name, e), []).append((a, g))
        for (name, e), rows in seen.items():
            if setting == "reduce":
                rows = [(torch.stack([a for a, _ in rows]).mean(0), sum(g for _, g in rows))]
            b, a_sum, count = sums[name]
            for a, g in rows:
                b[e] += g.T @ g
                a_sum[e] += torch.outer(a, a)
                count[e] += 1
    return sums


@pytest.mark.parametrize("examples", [1, 3, 11])
def test_jacobian(model, examples):
    x, _ = batch(examples)
    with borrowed(model, Parameters.of(model)):
        engine = Engine(model, Parameters.of(model))
        backprop = engine(x)
        assert all(rule is not None for rule in backprop.rules.values())
        jacobian = backprop.jacobian()
    assert [isinstance(part, RoutedJacobian) for part in jacobian.parts] == [True, True, False, False]
    close(jacobian.to_dense().transpose(0, 1), brute_force.jacobian(model, x, examples, lambda m, x: m(x))[1])


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_each_expert_has_a_block_over_its_own_rows(model, setting):
    if model.way == "shared":
        pytest.skip("every expert sees every token")
    x, y = batch(5)
    (result,) = fit(model, [(x, y)], lambda p: GGNKronecker(p, setting))
    for name, (b, a, count) in factors(model, x, y, setting).items():
        close(result.tensors[f"positions/{name}"], count)
        assert count[-1] == 0 < count[:-1].min()
        a = a / count.clamp_min(1)[:, None, None]
        left, right = result.factors(name)
        close(left, a if name == "down" else b)
        close(right, b if name == "down" else a)
        assert not b[-1].any()
    blocks = result.operator().blocks
    assert isinstance(blocks[0], KroneckerProduct)
    assert torch.isfinite(result.operator().to_dense()).all()


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_factors_do_not_depend_on_how_the_data_is_cut(model, setting):
    x, y = batch(6, positions=1)
    make = lambda p: GGNKronecker(p, setting)  # noqa: E731
    (once,) = fit(model, [(x, y)], make)
    for cuts in ([1] * 6, [1, 2, 3], [5, 1]):
        batches = list(zip(x.split(cuts), y.split(cuts), strict=True))
        for budget in (None, 1):
            (again,) = fit(model, batches, make, memory_budget=budget)
            assert once.tensors.keys() == again.tensors.keys()
            for key, value in once.tensors.items():
                close(again.tensors[key], value)
        apart = [fit(model, [one], make)[0] for one in batches]
        merged = sum(apart[1:], start=apart[0])
        for key, value in once.tensors.items():
            close(merged.tensors[key], value)


def test_weights_of_examples_count_as_copies(model):
    x, y = batch(3)
    twice = [torch.cat([t, t[1:2]]) for t in (x, y)]
    (weighted,) = fit(model, [(x, y, torch.tensor([1.0, 2.0, 1.0]))], GGNKronecker)
    (copied,) = fit(model, [tuple(twice)], GGNKronecker)
    for key, value in copied.tensors.items():
        close(weighted.tensors[key], value)


def test_every_way_gives_the_same_factors():
    """But for the one that computes all experts for all tokens, so that more rows go in."""
    x, y = batch(4)
    first = Experts("selected")
    (expected,) = fit(first, [(x, y)], GGNKronecker)
    for way in ("from_the_left", "batched", "batched_rows"):
        other = Experts(way)
        other.load_state_dict(first.state_dict())
        (found,) = fit(other, [(x, y)], GGNKronecker)
        for key, value in expected.tensors.items():
            close(found.tensors[key], value)


def test_sums_and_corrected_eigenvalues(model):
    x, y = batch(5)
    jacobian = brute_force.jacobian(model, x, 5, lambda m, x: m(x))[1]
    hessian = oracles.output_hessian(lambda f, y: F.cross_entropy(f[None], y[None]), model(x), y)
    expected = oracles.ggn(jacobian, hessian)
    diagonal, blocks = fit(model, [(x[:2], y[:2]), (x[2:], y[2:])], GGNDiagonal, GGNBlocks)
    close(diagonal.operator().diagonal(), expected.diagonal())
    size = model.up.numel()
    close(blocks.operator().blocks[0].to_dense(), expected[:size, :size])
    corrected = ekfac(model, Categorical(), [(x, y)]).operator()
    close(corrected.blocks[0].to_dense().trace(), expected[:size, :size].trace())


def test_deep_linear_experts_are_exact_with_squared_loss():
    """One expert a token, chosen by the data: then each expert is a deep linear network of its own."""
    a, g = torch.randn(7, 3), torch.randn(1, 1, 2).expand(1, 7, 2)  # a Hessian that is the same everywhere
    owner, expert = torch.arange(7), torch.tensor([0, 2, 2, 0, 0, 2, 0])
    jacobian = RoutedJacobian(a, g, owner, expert, 7, 3)
    moment, count = jacobian.input_moment()
    b = jacobian.output_moment()
    assert count.tolist() == [4, 0, 3]
    for e in (0, 2):
        rows = jacobian.to_dense().unflatten(2, (3, -1))[0, :, e]
        close(rows.T @ rows, torch.kron(b[e], moment[e] / count[e]))


# The algebra, with rows in any order and some examples and experts without any


def routed(columns, rows, transposed, budget):
    generator = torch.Generator().manual_seed(rows)
    owner = torch.randint(0, 4, (rows,), generator=generator)
    expert = torch.randint(0, 3, (rows,), generator=generator)
    return RoutedJacobian(torch.randn(rows, 3), torch.randn(columns, rows, 2), owner, expert, 5, 4, transposed, budget)


def expanded(jacobian):
    columns, examples, _ = jacobian.shape
    values = torch.zeros(columns, examples, 4, *((3, 2) if jacobian.transposed else (2, 3)))
    for k, r in itertools.product(range(columns), range(len(jacobian.a))):
        outer = torch.outer(jacobian.g[k, r], jacobian.a[r])
        values[k, jacobian.owner[r], jacobian.expert[r]] += outer.T if jacobian.transposed else outer
    return values.flatten(2)


@pytest.fixture(params=itertools.product((1, 3), (0, 1, 4, 20), (False, True), (1, 2**28)), ids=str)
def kind(request):
    jacobian = routed(*request.param)
    return jacobian, expanded(jacobian)


def test_algebra(kind):
    jacobian, values = kind
    assert jacobian.shape == values.shape
    close(jacobian.to_dense(), values)
    close(jacobian.square_sum(), values.square().sum((0, 1)))
    close(jacobian.squares(), values.square().sum(0))
    close(jacobian.square_norms(), values.square().sum(2))
    close(jacobian.gram(), torch.einsum("knp,lmp->knlm", values, values))
    close(jacobian.block(), torch.einsum("knp,knq->pq", values, values))
    vectors, cotangent = torch.randn(values.shape[2], 2), torch.randn(values.shape[:2])
    close(jacobian.project(vectors), values @ vectors)
    close(jacobian.pull_back(cotangent), torch.einsum("kn,knp->p", cotangent, values))
    for part in (slice(0, 2), slice(1, 5), slice(None), slice(3, 3)):
        close(jacobian.select(part).to_dense(), values[:, part])
    (whole,) = jacobian.split([values.shape[2]])
    assert whole is jacobian
    with pytest.raises(ValueError, match="cannot be cut"):
        list(jacobian.split([1, 2]))
    assert jacobian.single_position() is None
    assert jacobian.sole_cotangent() is None


def test_weighted_gram(kind):
    jacobian, values = kind
    weights = torch.randn(values.shape[2], requires_grad=True)
    expected = torch.einsum("knp,p,lnp->nkl", values, weights, values)
    close(jacobian.weighted_gram(weights), expected)
    probe = torch.randn(expected.shape)
    if jacobian.a.numel():
        found = torch.autograd.grad((jacobian.weighted_gram(weights) * probe).sum(), weights)
        close(found, torch.autograd.grad((expected * probe).sum(), weights))


def test_rotation(kind):
    jacobian, values = kind
    rows, columns = (3, 2) if jacobian.transposed else (2, 3)
    left, right = torch.randn(4, rows, rows), torch.randn(4, columns, columns)
    basis = torch.block_diag(*[torch.kron(one, two) for one, two in zip(left, right, strict=True)])
    close(jacobian.rotate(left, right).to_dense(), values @ basis)
    basis = torch.block_diag(*[torch.kron(torch.eye(rows), two) for two in right])
    close(jacobian.rotate(None, right).to_dense(), values @ basis)
    basis = torch.randn(1, 24, 24)
    close(jacobian.rotate(basis, torch.ones(1, 1, 1)).to_dense(), values @ basis[0])
