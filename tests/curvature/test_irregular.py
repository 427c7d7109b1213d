"""Examples in no regular order: experts, graphs of any size, packed sequences, against one example at a time."""

import oracles
import pytest
import torch
from fitting import fit
from irregular_cases import CASES, call, cut_rows, slow
from networks.registry import Model
from networks.routed import idle_experts, top_1
from torch import nn

from lapkit.curvature import Engine, GGNBlocks, GGNDense, GGNDiagonal, GGNKronecker, Parameters, borrowed


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("case", CASES)
def test_jacobians_of_batches_that_route_differently(case, order):
    build, batches, cut = CASES[case]
    model = build()
    parameters = Parameters.of(model)
    given = batches() if order == "forwards" else batches()[::-1]
    with borrowed(model, parameters):
        engine = Engine(model, parameters, forward_fn=call)
        for batch in given:
            f, jacobian = engine.jacobian(batch)
            outputs, expected = slow(model, batch, cut)
            close(f, outputs)
            close(jacobian.to_dense().transpose(0, 1), expected)


def data_of(case):
    build, batches, cut = CASES[case]
    model = build()
    pairs = []
    for batch in batches():
        with torch.no_grad():
            pairs.append((batch, torch.randint(2, (len(model(batch)),))))
    return model, pairs, cut


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_sums_over_batches_that_route_differently(case, budget):
    model, data, cut = data_of(case)
    total = 0
    for batch, _ in data:
        f, J = slow(model, batch, cut)
        p = f.softmax(-1)
        total = total + oracles.ggn(J, torch.diag_embed(p) - p[:, :, None] * p[:, None])
    diagonal, blocks, dense = fit(model, data, GGNDiagonal, GGNBlocks, GGNDense, memory_budget=budget, forward_fn=call)
    sizes = Parameters.of(model).sizes
    close(diagonal.operator().values, total.diagonal())
    close(dense.operator().to_dense(), total)
    pieces = [rows.split(sizes, 1)[i] for i, rows in enumerate(total.split(sizes))]
    close(blocks.operator().to_dense(), torch.block_diag(*pieces))


def loss_root(f):
    """Columns `(C, C)` with `sum_k s_k s_k^T` the Hessian of the cross-entropy at the outputs `(C,)` of one example."""
    p = f.detach().softmax(-1)
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    return (vectors * values.clamp_min(0).sqrt()).T


def linear_factors(model, data, cut):
    """Kronecker factors of every linear layer, one example at a time: rows that went in, what came back to rows."""
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen = {}
    handles = [
        m.register_forward_hook(lambda _, a, out, name=name: seen.setdefault(name, []).append((a[0].detach(), out)))
        for name, m in layers.items()
    ]
    sums = {}
    for batch, y in data:
        for n in range(len(y)):
            seen.clear()
            f = model(cut(batch, n))[0]
            for name, calls in seen.items():
                for a, out in calls:
                    if out.requires_grad:  # the gate of some is frozen
                        add_factors(sums, name, f, a, out)
    for handle in handles:
        handle.remove()
    return {name: (B, A / count) for name, (B, A, count) in sums.items()}


def add_factors(sums, name, f, a, out):
    """Add what the rows `(R, I)` and `(R, O)` of one example give."""
    a, size = a.flatten(0, -2), out.shape[-1]
    cotangents = [torch.autograd.grad(f, out, s, retain_graph=True)[0].reshape(-1, size) for s in loss_root(f)]
    before = sums.get(name, (0, 0, 0))
    B = sum(g.T @ g for g in cotangents)
    sums[name] = (before[0] + B, before[1] + a.T @ a, before[2] + len(a))


LINEAR = [
    *(
        "top-1 experts",
        "routed tokens",
        "experts that are run only where asked",
        "graphs, nodes in order",
        "graphs, nodes in any order",
        "graphs in a tuple",
    ),
    *("an empty graph", "graphs split by size", "graphs of rectified nodes", "joined sequences"),
]


@pytest.mark.parametrize("case", LINEAR)
def test_kronecker_factors_count_real_rows_only(case):
    """Rows of all examples are averaged, whatever the padding of the engine's own and however the batches are cut."""
    model, data, cut = data_of(case)
    (kronecker,) = fit(model, data, GGNKronecker, forward_fn=call)
    for name, (B, A) in linear_factors(model, data, cut).items():
        left, right = kronecker.factors(name)
        close(left, B[None])
        close(right, A[None])


def unrolled(model, z):
    """The recurrent network above for one sequence `(T, 2)`: outputs, and rows in and out of both weights."""
    cell, weights, hidden = model.cell, dict(model.cell.named_parameters()), []
    h = c = z.new_zeros(3)
    used = {"cell.weight_ih_l0": [], "cell.weight_hh_l0": []}
    for x in z:
        one, two = weights["weight_ih_l0"] @ x, weights["weight_hh_l0"] @ h
        used["cell.weight_ih_l0"].append((x.detach(), one))
        used["cell.weight_hh_l0"].append((h.detach(), two))
        i, f, g, o = (one + two + weights["bias_ih_l0"] + weights["bias_hh_l0"]).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
    assert cell.num_layers == 1
    return model.head(torch.stack(hidden).sum(0).tanh() + h), used


@pytest.mark.parametrize("case", ["packed sequences", "packed sequences, sorted"])
def test_kronecker_factors_of_packed_sequences(case):
    model, data, cut = data_of(case)
    (kronecker,) = fit(model, data, GGNKronecker, forward_fn=call)
    sums = {}
    for batch, y in data:
        for n in range(len(y)):
            f, used = unrolled(model, cut(batch, n)[0][0])
            close(f, model(cut(batch, n))[0])
            for name, calls in used.items():
                for a, out in calls:
                    add_factors(sums, name, f, a[None], out)
    for name, (B, A, count) in sums.items():
        left, right = kronecker.factors(name)
        close(left, B[None])
        close(right, A[None] / count)


def sorted_rows(m, x):
    order = x[:, 0].argsort()
    return m.two(m.one(x[order]).tanh())[order.argsort()]


@pytest.mark.parametrize(("examples", "one", "two"), [(40, 29, 37), (40, 37, 39), (70, 1, 65), (9, 0, 8), (9, 7, 8)])
def test_two_of_many_examples_that_change_places_are_told_apart(examples, one, two):
    """Also where one digit of their numbers, which a single backward pass would see, is the same."""
    model, x = Model(sorted_rows, one=nn.Linear(2, 3), two=nn.Linear(3, 2)), torch.randn(examples, 2)
    x[:, 0] = torch.linspace(-1, 1, examples)
    x[[one, two]] = x[[two, one]]
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        actual = Engine(model, parameters).jacobian(x)[1].to_dense().transpose(0, 1)
    close(actual, slow(model, x, cut_rows)[1])


def test_an_expert_without_rows_in_some_batches_adds_nothing():
    model = top_1()
    with torch.no_grad():
        chosen = model.gate(torch.randn(60, 2)).argmax(-1)
    x = torch.randn(60, 2)
    with torch.no_grad():
        chosen = model.gate(x).argmax(-1)
    everybody = (x, torch.randint(2, (60,)))
    only = x[chosen == int(chosen.mode().values)][:4]
    others = (only, torch.randint(2, (len(only),)))
    for data in ([everybody, others], [others, everybody]):
        (kronecker,) = fit(model, data, GGNKronecker, forward_fn=call)
        for name, (B, A) in linear_factors(model, data, cut_rows).items():
            left, right = kronecker.factors(name)
            close(left, B[None])
            close(right, A[None])


def test_an_expert_that_no_example_reaches_is_refused_at_the_end():
    model, x = idle_experts(), torch.randn(5, 2)
    with torch.no_grad():
        model.gate.bias.copy_(torch.tensor([9.0, 9.0, 9.0, -99.0]))
    with pytest.raises(ValueError, match=r"never uses .*experts\.3\.0\.weight"):
        fit(model, [(x, torch.randint(2, (5,)))] * 2, GGNDiagonal)
