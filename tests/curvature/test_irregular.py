"""Examples in no regular order: experts, graphs of any size, packed sequences, against one example at a time."""

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lapkit.curvature import (
    GGN,
    Categorical,
    Engine,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
    borrowed,
)
from lapkit.curvature.capture.irregular import BASE, IrregularLayout, digit_factors, digits, irregular_layout

EXAMPLES = (3, 8, 9, 70)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


class Model(nn.Module):
    """A forward pass written as a function of the module and the batch, which it takes whole."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, batch):
        return self.function(self, batch)


# The layout by itself


def scrambled(examples, seed=0):
    """Owners of positions in random order, some examples without any, some positions that nothing reaches."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (examples,), generator=generator)
    counts[0], counts[-1] = 2, 0
    owner = torch.arange(examples).repeat_interleave(counts)
    owner = torch.cat([owner, torch.full((3,), -1)])
    return owner[torch.randperm(len(owner), generator=generator)]


def cotangents(owner, examples, shape=(4,), axis=0):
    """A cotangent `(L, *shape)`, its axis of examples moved, and the same for every digit of the examples' numbers."""
    one = torch.randn(len(owner), *shape)
    one[owner < 0] = 0
    tail = [1] * len(shape)
    scaled = [
        one * digit_factors(examples, digit, one)[owner.clamp_min(0)].reshape(-1, *tail)
        for digit in range(digits(examples))
    ]
    return one.movedim(0, axis), [s.movedim(0, axis) for s in scaled]


def agree(found, owner):
    """Where nothing arrives any example will do: it is a row of what went in, but of no cotangent."""
    return torch.equal(torch.where(owner < 0, 0, found), owner.clamp_min(0)) and bool((found >= 0).all())


@pytest.mark.parametrize("examples", [1, 2, *EXAMPLES, 64, 65, 512, 513])
def test_digits_spell_the_numbers_of_the_examples(examples):
    like = torch.zeros(())
    powers = [digit_factors(examples, d, like).log2() + BASE // 2 for d in range(digits(examples))]
    assert all(((p >= 0) & (p < BASE) & (p == p.round())).all() for p in powers)
    number = sum(p.long() * BASE**d for d, p in enumerate(powers))
    assert torch.equal(number, torch.arange(examples))
    assert digits(examples) == 1 or BASE ** (digits(examples) - 1) < examples


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_owners_are_read_off(examples, axis):
    owner = scrambled(examples)
    one, scaled = cotangents(owner, examples, (2, 3), axis)
    layout = irregular_layout(one, scaled, examples)
    assert layout.axis == axis
    assert agree(layout.owners(len(owner), examples), owner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_owners_are_read_off_in_lower_precision(dtype):
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    layout = irregular_layout(one.to(dtype), [s.to(dtype) for s in scaled], 9)
    assert agree(layout.owner, owner)


def test_rounding_and_zeros_within_a_row_do_not_matter():
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    one[:, 1], scaled[0][:, 1], scaled[1][:, 1] = 0, 0, 0
    scaled = [s * (1 + 1e-14 * torch.randn(s.shape)) for s in scaled]
    assert agree(irregular_layout(one, scaled, 9).owner, owner)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_mixed_rows_have_no_layout(examples):
    owner = scrambled(examples)
    one, scaled = cotangents(owner, examples)
    first, second = (owner == 0).nonzero()[0, 0], (owner > 0).nonzero()[0, 0]
    for tensor in (one, *scaled):
        tensor[first] += tensor[second]
    assert irregular_layout(one, scaled, examples) is None


def test_one_mixed_entry_is_enough():
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    first, second = (owner == 0).nonzero()[0, 0], (owner > 0).nonzero()[0, 0]
    for tensor in (one, *scaled):
        tensor[first, 1] = tensor[second, 1]
    assert irregular_layout(one, scaled, 9) is None


def test_a_factor_that_is_no_example_has_no_layout():
    """Powers of two, but of numbers beyond the last example, or below the first."""
    one = torch.randn(5, 2)
    for power in (3, -5):
        assert irregular_layout(one, [one * 2.0**power], 3) is None


@pytest.mark.parametrize("examples", EXAMPLES)
def test_canonical_form_gathers_each_example_and_pads_with_zeros(examples):
    owner = scrambled(examples).clamp_min(0)
    tensor = torch.randn(2, 3, len(owner), 4)
    actual = IrregularLayout(1, owner).canonical(tensor, examples)
    positions = int(torch.bincount(owner).max())
    assert actual.shape == (2, examples, positions, 3, 4)
    for n in range(examples):
        mine = tensor[:, :, owner == n].movedim(2, 1)
        close(actual[:, n, : mine.shape[1]], mine)
        assert not actual[:, n, mine.shape[1] :].any()


# Models that send rows where the data say


def select_and_add(m, x):
    """Each row goes to one of four experts, by `index_select` and `index_add`."""
    gate = m.gate(x).softmax(-1)
    choice, out = gate.argmax(-1), x.new_zeros(len(x), 3)
    for number, expert in enumerate(m.experts):
        rows = (choice == number).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x.index_select(0, rows)) * gate[rows, number, None])
    return m.head(out)


def stacked(m, x):
    """Each row goes to two of four experts, whose weights are one parameter."""
    weight, choice = m.gate(x).softmax(-1).topk(2, -1)
    out = x.new_zeros(len(x), 3)
    for number in range(4):
        rows, slot = (choice == number).nonzero(as_tuple=True)
        h = F.linear(F.linear(x[rows], m.up[number]).tanh(), m.down[number])
        out = out.index_add(0, rows, h * weight[rows, slot, None])
    return m.head(out)


def tokens(m, x):
    """Sequences whose tokens are routed: several rows an example, unequally many for each expert."""
    flat = x.flatten(0, 1)
    gate = m.gate(flat).softmax(-1)
    choice, out = gate.argmax(-1), flat.new_zeros(len(flat), 3)
    for number, expert in enumerate(m.experts):
        rows = (choice == number).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(flat[rows]) * gate[rows, number, None])
    return m.head(out.unflatten(0, x.shape[:2]).sum(1).tanh())


class Picture(nn.Module):
    """An expert of convolutions and norms."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.ConvTranspose1d(4, 2, 2)
        self.scale, self.three, self.slope = nn.Parameter(torch.randn(6)), nn.BatchNorm1d(6), nn.PReLU(6)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.three.weight)

    def forward(self, x):
        h = self.two(self.norm(self.one(x)).tanh().sum(3)).sum(1).repeat(1, 2)
        return self.slope(self.three(h * self.scale))[:, :4]


class Words(nn.Module):
    """An expert of words, attention and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix, self.cell = nn.MultiheadAttention(4, 2, batch_first=True), nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        h = self.norm(self.embed(x))
        return self.cell(h + self.mix(h, h, h, need_weights=False)[0])[0].mean(1)


def routed_by_sum(m, x):
    choice, out = (2 * x.flatten(1).sum(1)).long().abs() % len(m.experts), torch.zeros(len(x), 4)
    for number, expert in enumerate(m.experts):
        rows = (choice == number).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x[rows]))
    return m.head(out.tanh())


def only_where_asked(m, x):
    """Experts that get no row are not run at all, so that the output does not depend on them."""
    choice, out = m.gate(x).argmax(-1), x.new_zeros(len(x), 3)
    for number in choice.unique().tolist():
        rows = (choice == number).nonzero()[:, 0]
        out = out.index_add(0, rows, m.experts[number](x[rows]))
    return m.head(out)


def idle_experts():
    return Model(only_where_asked, gate=nn.Linear(2, 4).requires_grad_(False), experts=experts(), head=nn.Linear(3, 2))


def experts_of(kind):
    return lambda: Model(routed_by_sum, experts=nn.ModuleList(kind() for _ in range(2)), head=nn.Linear(4, 2)).eval()


def experts():
    return nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(4))


def top_1():
    return Model(select_and_add, gate=nn.Linear(2, 4), experts=experts(), head=nn.Linear(3, 2))


def top_2():
    weights = {"up": nn.Parameter(torch.randn(4, 5, 2)), "down": nn.Parameter(torch.randn(4, 3, 5))}
    return Model(stacked, gate=nn.Linear(2, 4), head=nn.Linear(3, 2), **weights)


def routed_tokens():
    return Model(tokens, gate=nn.Linear(2, 4), experts=experts(), head=nn.Linear(3, 2))


def pooled_by_index(m, batch):
    nodes, graph, count = (batch["nodes"], batch["graph"], batch["count"]) if isinstance(batch, dict) else batch
    h = m.two(m.one(nodes).tanh()).tanh()
    return m.head(h.new_zeros(len(count), h.shape[1]).index_add(0, graph, h))


def rectified(m, batch):
    """Some nodes have no active unit, so that nothing comes back to them; they went in all the same."""
    h = m.two(m.one(batch["nodes"]).relu()).relu()
    return m.head(h.new_zeros(len(batch["count"]), 3).index_add(0, batch["graph"], h))


def pooled_by_split(m, batch):
    h = m.two(m.one(batch["nodes"]).tanh()).tanh()
    return m.head(torch.stack([part.sum(0) for part in h.split(batch["count"].tolist())]))


def pooled_by_matrix(m, batch):
    h = m.two(m.one(batch["nodes"]).tanh()).tanh()
    return m.head(batch["member"] @ h)


def graph_network(function):
    return lambda: Model(function, one=nn.Linear(2, 3), two=nn.Linear(3, 3), head=nn.Linear(3, 2))


def graphs(*sizes, seed=0):
    """Nodes of graphs of these sizes, as a dictionary; the order of the nodes is random where `graph` says whose."""
    torch.manual_seed(seed)
    count = torch.tensor(sizes)
    graph = torch.arange(len(sizes)).repeat_interleave(count)
    return {"nodes": torch.randn(len(graph), 2), "graph": graph, "count": count}


def shuffled(batch):
    order = torch.randperm(len(batch["graph"]))
    return {**batch, "nodes": batch["nodes"][order], "graph": batch["graph"][order]}


def with_matrix(batch):
    count = len(batch["count"])
    return {"nodes": batch["nodes"], "member": (batch["graph"] == torch.arange(count)[:, None]).to(torch.float64)}


def cut_graph(batch, n):
    """Graph n by itself."""
    if isinstance(batch, tuple):
        return tuple(cut_graph(dict(zip(("nodes", "graph", "count"), batch, strict=True)), n).values())
    mine = batch["member"][n] > 0 if "member" in batch else batch["graph"] == n
    if "member" in batch:
        return {"nodes": batch["nodes"][mine], "member": batch["member"][n : n + 1, mine]}
    return {"nodes": batch["nodes"][mine], "graph": batch["graph"][mine] * 0, "count": batch["count"][n : n + 1]}


SIZES = ((3, 3), (2, 4), (4, 1, 1), (5, 1, 2), (2,) * 9, (1, 3, 2, 2) * 3, (4, 2), (7,))


def packed(m, batch):
    """A recurrent layer over sequences without their padding, read at the end and everywhere."""
    z, lengths = batch
    z = m.embed(z) if z.ndim == 2 else z
    rows = pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=m.ordered)
    out, (last, _) = m.cell(rows)
    return m.head(pad_packed_sequence(out, batch_first=True)[0].sum(1).tanh() + last[-1])


def recurrent(*, ordered, layers=1, embed=False):
    def build():
        before = {"embed": nn.Embedding(5, 2)} if embed else {}
        cell = nn.LSTM(2, 3, layers, batch_first=True)
        return Model(packed, ordered=ordered, cell=cell, head=nn.Linear(3, 2), **before)

    return build


def sequences(*lengths, words=False):
    """Always padded to four positions, so that batches differ in nothing but the lengths."""
    shape = (len(lengths), 4)
    return torch.randint(5, shape) if words else torch.randn(*shape, 2), torch.tensor(lengths)


def cut_sequence(batch, n):
    """Sequence n by itself, without its padding."""
    return batch[0][n : n + 1, : int(batch[1][n])], batch[1][n : n + 1]


def joined(m, batch):
    """Padded sequences whose rows are put one after the other, and taken apart again."""
    z, lengths = batch
    rows = torch.cat([one[:length] for one, length in zip(z, lengths.tolist(), strict=True)])
    return m.head(torch.stack([part.sum(0) for part in m.one(rows).tanh().split(lengths.tolist())]))


LENGTHS = ((2, 2), (3, 1), (1, 3), (4, 2, 1), (1, 4, 2, 3, 1, 2, 4, 4, 2, 1))
SORTED = ((3, 3), (4, 3, 1), (4, 2, 2), (4, 4, 4), (4, 4, 3, 3, 2, 2, 2, 1, 1, 1))


def call(model, batch):
    """A tuple is not spread."""
    return model(batch)


def cut_rows(batch, n):
    return batch[n : n + 1]


def rows(*counts):
    return [torch.randn(n, 2) for n in counts]


CASES = {  # name: (model, batches one after the other, how to cut out one example)
    "top-1 experts": (top_1, lambda: rows(3, 8, 9, 70, 1, 5), cut_rows),
    "top-2 experts": (top_2, lambda: rows(3, 8, 9, 70, 1, 5), cut_rows),
    "routed tokens": (routed_tokens, lambda: [torch.randn(n, 5, 2) for n in (3, 9, 3, 1)], cut_rows),
    "experts that are run only where asked": (idle_experts, lambda: rows(3, 1, 9, 70, 1, 2), cut_rows),
    "experts for pictures": (
        experts_of(Picture),
        lambda: [torch.randn(n, 2, 3, 3) for n in (9, 4, 1, 12)],
        cut_rows,
    ),
    "experts for words": (
        experts_of(Words),
        lambda: [torch.randint(5, (n, 4)) for n in (9, 4, 1, 12)],
        cut_rows,
    ),
    "graphs, nodes in order": (
        graph_network(pooled_by_index),
        lambda: [graphs(*s) for s in SIZES],
        cut_graph,
    ),
    "graphs, nodes in any order": (
        graph_network(pooled_by_index),
        lambda: [shuffled(graphs(*s)) for s in SIZES],
        cut_graph,
    ),
    "graphs of rectified nodes": (
        graph_network(rectified),
        lambda: [shuffled(graphs(*s)) for s in SIZES],
        cut_graph,
    ),
    "graphs in a tuple": (
        graph_network(pooled_by_index),
        lambda: [tuple(shuffled(graphs(*s)).values()) for s in SIZES],
        cut_graph,
    ),
    "an empty graph": (
        graph_network(pooled_by_index),
        lambda: [shuffled(graphs(*s)) for s in ((3, 0, 2), (4, 0), (0, 0, 4, 1))],
        cut_graph,
    ),
    "graphs split by size": (graph_network(pooled_by_split), lambda: [graphs(*s) for s in SIZES], cut_graph),
    "graphs pooled by a matrix": (
        graph_network(pooled_by_matrix),
        lambda: [with_matrix(graphs(*s)) for s in SIZES],
        cut_graph,
    ),
    "packed sequences": (recurrent(ordered=False), lambda: [sequences(*s) for s in LENGTHS], cut_sequence),
    "packed sequences, two layers": (
        recurrent(ordered=False, layers=2),
        lambda: [sequences(*s) for s in LENGTHS],
        cut_sequence,
    ),
    "packed words": (
        recurrent(ordered=False, embed=True),
        lambda: [sequences(*s, words=True) for s in LENGTHS],
        cut_sequence,
    ),
    "packed sequences, sorted": (recurrent(ordered=True), lambda: [sequences(*s) for s in SORTED], cut_sequence),
    "joined sequences": (
        lambda: Model(joined, one=nn.Linear(2, 3), head=nn.Linear(3, 2)),
        lambda: [sequences(*s) for s in LENGTHS],
        cut_sequence,
    ),
}


def slow(model, batch, cut):
    """Outputs `(N, C)` and Jacobian `(N, C, P)`, one example and one output at a time."""
    with torch.no_grad():
        examples = len(model(batch))
    weights, outputs, rows = [p for p in model.parameters() if p.requires_grad], [], []
    for n in range(examples):
        f = model(cut(batch, n))[0]
        gradients = [torch.autograd.grad(c, weights, retain_graph=True, materialize_grads=True) for c in f]
        outputs.append(f.detach())
        rows.append(torch.stack([torch.cat([part.flatten() for part in g]) for g in gradients]))
    return torch.stack(outputs), torch.stack(rows)


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


def fit(model, data, *kinds, **arguments):
    parameters = Parameters.of(model)
    quantities = [kind(parameters) for kind in kinds]
    accumulate(model, parameters, Categorical(), GGN(), data, quantities, forward_fn=call, **arguments)
    return [q.result() for q in quantities]


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_sums_over_batches_that_route_differently(case, budget):
    model, data, cut = data_of(case)
    total = 0
    for batch, _ in data:
        f, J = slow(model, batch, cut)
        p = f.softmax(-1)
        total = total + oracles.ggn(J, torch.diag_embed(p) - p[:, :, None] * p[:, None])
    diagonal, blocks, dense = fit(model, data, GGNDiagonal, GGNBlocks, GGNDense, memory_budget=budget)
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
    (kronecker,) = fit(model, data, GGNKronecker)
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
    (kronecker,) = fit(model, data, GGNKronecker)
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
        (kronecker,) = fit(model, data, GGNKronecker)
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
