"""Recurrent layers of torch: their weights have closed forms, and factors as a loop over steps defines them."""

import itertools

import oracles
import pytest
import torch
from fitting import fit
from networks import brute_force
from networks.recurrent import Recurrent
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lapkit.curvature import DenseJacobian, Engine, GGNDiagonal, GGNKronecker, Parameters, borrowed
from lapkit.curvature.capture.forward import recurrence_on_tape
from lapkit.curvature.capture.irregular import digit_factors
from lapkit.curvature.capture.layout import _layout

WIDTH, HIDDEN = 3, 4
CELLS = {
    "lstm": lambda: nn.LSTM(WIDTH, HIDDEN, batch_first=True),
    "lstm, two layers": lambda: nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True),
    "lstm, both directions": lambda: nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(WIDTH, HIDDEN, proj_size=2, batch_first=True),
    "lstm, all at once": lambda: nn.LSTM(WIDTH, HIDDEN, 2, proj_size=2, bidirectional=True),
    "lstm without biases": lambda: nn.LSTM(WIDTH, HIDDEN, bias=False),
    "gru": lambda: nn.GRU(WIDTH, HIDDEN, batch_first=True),
    "gru, all at once": lambda: nn.GRU(WIDTH, HIDDEN, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(WIDTH, HIDDEN, 2, nonlinearity="relu", batch_first=True),
}
# Their brute force runs the fused path, which says that it has no projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
# Single precision is where the fused kernel of oneDNN would be taken.
PRECISION = {torch.float64: 1e-9, torch.float32: 2e-5}


class Packed(nn.Module):
    """Sequences of different lengths, zeros behind their ends; the last states of all layers and directions."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        layers = cell.num_layers * (1 + cell.bidirectional)
        self.head = nn.Linear(layers * (cell.proj_size or cell.hidden_size), 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state = self.cell(packed)[1]
        state = state[0] if isinstance(state, tuple) else state
        return self.head(state.transpose(0, 1).flatten(1))


def step(cell, weights, suffix, x, h, c, calls):
    """One step of one direction; `calls` is told each weight with the row it saw and the row it made."""

    def mapped(kind, row):
        out = weights[f"weight_{kind}_{suffix}"] @ row
        calls.append((f"cell.weight_{kind}_{suffix}", row.detach(), out))
        bias = weights.get(f"bias_{kind}_{suffix}")
        return out if bias is None else out + bias

    one, two = mapped("ih", x), mapped("hh", h)
    if isinstance(cell, nn.LSTM):
        i, f, g, o = (one + two).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (mapped("hr", h) if cell.proj_size else h), c
    if isinstance(cell, nn.GRU):
        (r, z, n), (s, t, m) = one.chunk(3), two.chunk(3)
        n = (n + (r + s).sigmoid() * m).tanh()
        return (1 - (z + t).sigmoid()) * n + (z + t).sigmoid() * h, c
    return (one + two).relu(), c


def unrolled(cell, x):
    """Outputs `(T, D)` of one sequence, last states of layers and directions, and what the weights saw and made."""
    weights, calls, last, above = dict(cell.named_parameters()), [], [], x
    for layer, backwards in itertools.product(range(cell.num_layers), range(1 + cell.bidirectional)):
        rows = x if not backwards else x.flip(0)
        h, c, states = x.new_zeros(cell.proj_size or HIDDEN), x.new_zeros(HIDDEN), []
        for row in rows:
            h, c = step(cell, weights, f"l{layer}{'_reverse' if backwards else ''}", row, h, c, calls)
            states.append(h)
        last.append(h)
        out = torch.stack(states[::-1] if backwards else states)
        above = torch.cat([above, out], 1) if backwards else out
        x = above if backwards or not cell.bidirectional else x
    return x, torch.cat(last), calls


def factors(sums, f, label, calls):
    """Add B, A and the number of rows of each weight for one example."""
    hessian = oracles.output_hessian(lambda f, y: F.cross_entropy(f[None], y[None]), f[None], label[None])[0]
    values, vectors = torch.linalg.eigh(hessian)
    for name, a, out in calls:
        columns = (vectors * values.clamp_min(0).sqrt()).T
        g = torch.stack([torch.autograd.grad(f, out, c, retain_graph=True)[0] for c in columns])
        b, moment, count = sums.get(name, (0, 0, 0))
        sums[name] = b + g.T @ g, moment + torch.outer(a, a), count + 1


def agree(result, sums, tolerance):
    for name, (b, moment, count) in sums.items():
        left, right = result.factors(name)
        for found, expected in ((left[0], b), (right[0], moment / count)):
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(params=PRECISION, ids=str)
def tolerance(request):
    torch.set_default_dtype(request.param)
    return PRECISION[request.param]


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("name", CELLS)
def test_factors_are_those_of_a_loop_over_steps(name, examples, tolerance):
    model, sums = Recurrent(CELLS[name](), read="mean"), {}
    x, y = torch.randn(examples, 4, WIDTH), torch.arange(examples) % 3
    for one, label in zip(x, y, strict=True):
        outputs, _, calls = unrolled(model.cell, one)
        f = model.head(outputs.mean(0))
        torch.testing.assert_close(f, model(one[None])[0], rtol=0, atol=100 * tolerance)
        factors(sums, f, label, calls)
    cut = min(2, examples - 1)
    batches = [(x[:cut], y[:cut]), (x[cut:], y[cut:])] if cut else [(x, y)]
    kronecker, diagonal = fit(model, batches, GGNKronecker, GGNDiagonal)
    assert sums.keys() == {n for n, _ in model.named_parameters() if n.startswith("cell.weight")}
    agree(kronecker, sums, tolerance)
    jacobian = brute_force.jacobian(model, x, examples, lambda m, x: m(x))[1]
    hessians = oracles.output_hessian(lambda f, y: F.cross_entropy(f[None], y[None]), model(x), y)
    expected = oracles.ggn(jacobian, hessians).diagonal()
    scale = float(expected.max())
    torch.testing.assert_close(diagonal.operator().diagonal(), expected, rtol=0, atol=10 * tolerance * scale)


@pytest.mark.parametrize("name", ["lstm", "lstm, all at once", "gru, all at once", "rnn"])
def test_factors_of_packed_sequences(name, tolerance):
    """Every step of every sequence counts once, whatever the order and the padding, one sequence by itself too."""
    model, sums = Packed(CELLS[name]()), {}
    lengths = torch.tensor([2, 4, 1, 3, 4])
    x = torch.randn(5, 4, WIDTH) * (torch.arange(4) < lengths[:, None])[..., None]
    y = torch.arange(5) % 3
    model.cell.batch_first = True
    for n in range(5):
        _, last, calls = unrolled(model.cell, x[n, : lengths[n]])
        f = model.head(last)
        torch.testing.assert_close(f, model(x[n : n + 1], lengths[n : n + 1])[0], rtol=0, atol=100 * tolerance)
        factors(sums, f, y[n], calls)
    for cuts in ([5], [1, 4], [2, 2, 1]):
        batches = [((a, b), c) for a, b, c in zip(x.split(cuts), lengths.split(cuts), y.split(cuts), strict=True)]
        agree(fit(model, batches, GGNKronecker)[0], sums, tolerance)


@pytest.mark.parametrize("name", CELLS)
def test_weights_have_closed_forms(name, tolerance):
    model, x = Recurrent(CELLS[name]()), torch.randn(3, 4, WIDTH)
    with borrowed(model, Parameters.of(model)):
        backprop = Engine(model, Parameters.of(model))(x)
        assert all(rule is not None for rule in backprop.rules.values())
        parts = dict(zip(backprop.parameters.names, backprop.jacobian().parts, strict=True))
    assert not [n for n, part in parts.items() if "weight" in n and isinstance(part, DenseJacobian)]


def kernels(model, x):
    """The names of all nodes below the output."""
    found, todo = set(), [model(x).grad_fn]
    while todo:
        node = todo.pop()
        found.add(node.name())
        todo += [child for child, _ in node.next_functions if child is not None]
    return found


def test_fused_kernels_are_left_out_of_recurrent_layers_only():
    torch.set_default_dtype(torch.float32)
    before = torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled
    model, x, seen = Recurrent(CELLS["lstm"]()), torch.randn(2, 4, WIDTH), []
    model.head.register_forward_hook(lambda *_: seen.append(torch._C._get_mkldnn_enabled()))
    user = model.cell.register_forward_hook(lambda *_: None)
    if torch.backends.mkldnn.is_available():
        assert "MkldnnRnnLayerBackward0" in kernels(model, x)
    with recurrence_on_tape(model), recurrence_on_tape(model):
        assert "MkldnnRnnLayerBackward0" not in kernels(model, x)
        assert torch._C._get_mkldnn_enabled() == before[0]
    with recurrence_on_tape(model):
        assert "MkldnnRnnLayerBackward0" not in kernels(model, x)
        with pytest.raises(RuntimeError, match=r"input.size"):
            model(torch.randn(2, 4, WIDTH + 1))
        assert torch._C._get_mkldnn_enabled() == before[0]
    assert (torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled) == before
    assert not model.cell._forward_pre_hooks
    assert seen == [before[0]] * len(seen)
    assert list(model.cell._forward_hooks) == [user.id]


@pytest.mark.parametrize(
    ("rows", "owners"),
    [
        ([[0, 1.0, 0, -3], [4, 0, 0, 0]], [1, 0]),
        ([[2.0, 1, 0, 0]], [1]),
        ([[0.0, 0, 0, 0], [0, 0, 3, 1], [0.0, 0, 0, 0]], [1, 1, 1]),
    ],
)
def test_columns_that_fit_by_accident_are_not_taken_for_examples(rows, owners):
    """Rectified units are often zero, so that few entries are left to tell rows of examples from columns."""
    one, factors = torch.tensor(rows), digit_factors(2, 0, torch.zeros(()))
    layout, certain = _layout(one, [one * factors[owners, None]], [factors])
    assert (layout.axis, layout.owners(len(one), 2).tolist(), certain) == (0, owners, False)
