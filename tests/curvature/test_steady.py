"""What was learned from one batch is used for the next only where it holds there: examples that the data moves."""

import pytest
import torch
from one_by_one import Net, check
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import Categorical, Engine, Gradients, compute


@pytest.fixture
def studies(monkeypatch):
    """The sizes of the batches whose pass was read and verified."""
    sizes, study = [], Engine._study

    def counted(engine, x, output, *rest):
        sizes.append(len(output))
        return study(engine, x, output, *rest)

    monkeypatch.setattr(Engine, "_study", counted)
    return sizes


def labelled(inputs):
    return inputs, torch.arange(len(inputs)) % 3


def ordered_first():
    """A batch in order of the first feature, which no model below moves, and others, which they do."""
    x = torch.randn(6, 4)
    x = x[x[:, 0].argsort()]
    return [labelled(x), labelled(x.flip(0)), labelled(torch.randn(6, 4)), labelled(torch.randn(4, 4))]


def in_order_at_first():
    """One batch whose first eight examples stand in order."""
    x = torch.randn(20, 4)
    return [labelled(torch.cat([x[:8][x[:8, 0].argsort()], x[8:]]))]


# Ways to sort a batch and to put the results back. What the first group does shows in the graph's signature.


def order(x):
    return x[:, 0].argsort()


def selected(m, x):
    h = m.layers(x[order(x)])
    return torch.stack([h[i] for i in order(x).argsort().tolist()])


def sliced(m, x):
    h = m.layers(x[order(x)])
    return torch.cat([h[i : i + 1] for i in order(x).argsort().tolist()])


def unbound(m, x):
    h = m.layers(x[order(x)]).unbind()
    return torch.stack([h[i] for i in order(x).argsort().tolist()])


def grouped(m, x):
    low, high = [i for i in range(len(x)) if x[i, 0] <= 0], [i for i in range(len(x)) if x[i, 0] > 0]
    h = m.layers(torch.stack([x[i] for i in low + high]))
    return torch.stack([h[(low + high).index(i)] for i in range(len(x))])


def rolled(m, x):
    places = int(x[:, 0].argmin())
    return m.layers(x.roll(-places, 0)).roll(places, 0)


def flipped(m, x):
    axis = 1 if x[0, 0] <= x[-1, 0] else 0  # of one element, or of the examples
    return m.layers(x[:, None].flip(axis)).flip(axis)[:, 0]


def halves_exchanged(m, x):
    half = len(x) // 2
    if half == 0:
        return m.layers(x)
    start = 0 if x[0, 0] <= x[-1, 0] else half
    h = m.layers(torch.cat([x[start : start + half], x[half - start : 2 * half - start]]))
    return torch.cat([h.narrow(0, start, half), h.narrow(0, half - start, half)])


# Operands from the data, and writing in place: no signature tells.


def matrix(x):
    """The permutation `P` with `P x` in order."""
    return F.one_hot(order(x), len(x)).to(x)


def permuted(m, x):
    return matrix(x).T @ m.layers(matrix(x) @ x)


def permuted_by_einsum(m, x):
    h = m.layers(matrix(x) @ x)[:, None].expand(-1, 2, -1)
    return torch.einsum("nm,ntc->mtc", matrix(x), h).mean(1)


def permuted_by_columns(m, x):
    back, h = matrix(x).T, m.layers(matrix(x) @ x)
    return torch.stack([back @ h[:, 0], back.mv(h[:, 1]), back @ h[:, 2]], 1)


def masked_and_summed(m, x):
    return (matrix(x).T[:, :, None] * m.layers(matrix(x) @ x)[None]).sum(1)


def chosen(m, x):
    return torch.where(matrix(x).T[:, :, None] > 0, m.layers(matrix(x) @ x)[None], 0.0).sum(1)


def filled(m, x):
    return m.layers(matrix(x) @ x).expand(len(x), -1, -1).masked_fill(matrix(x).T[:, :, None] == 0, 0.0).sum(1)


def attended(m, x):
    zero, h = torch.zeros(1, len(x), 3), m.layers(matrix(x) @ x)[None]
    return F.scaled_dot_product_attention(zero, zero, h, attn_mask=matrix(x).T[None] > 0)[0]


def looked_up(m, x):
    return F.embedding(order(x).argsort(), m.layers(x[order(x)]))


def convolved(m, x):
    return F.conv1d(m.layers(matrix(x) @ x)[None], matrix(x).T[:, :, None])[0]


def solved(m, x):
    return torch.linalg.solve(matrix(x), m.layers(matrix(x) @ x))


def written(m, x):
    h, out = m.layers(x[order(x)]), torch.zeros(len(x), 3)
    for i, j in enumerate(order(x).tolist()):
        out[j] = h[i]
    return out


def added_to_slices(m, x):
    h, out = m.layers(x[order(x)]), torch.zeros(len(x), 3)
    for i, j in enumerate(order(x).tolist()):
        out[j : j + 1] += h[i : i + 1]
    return out


def copied(m, x):
    h, out = m.layers(x[order(x)]), torch.zeros(len(x), 3)
    for i, j in enumerate(order(x).tolist()):
        out.select(0, j).copy_(h[i])
    return out


class Back(torch.autograd.Function):
    """A user's own operation that takes rows in another order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, rows):
        return h[rows]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent[ctx.saved_tensors[0].argsort()], None


def own_operation(m, x):
    return Back.apply(m.layers(x[order(x)]), order(x).argsort())


SIGNED = (selected, sliced, unbound, grouped, rolled, flipped, halves_exchanged)
UNSIGNED = (
    *(permuted, permuted_by_einsum, permuted_by_columns, masked_and_summed, chosen),
    *(filled, attended, looked_up, convolved, solved, written, added_to_slices, copied, own_operation),
)


@pytest.mark.parametrize("function", SIGNED + UNSIGNED)
@pytest.mark.parametrize("data", [ordered_first, in_order_at_first])
def test_examples_put_in_another_order_by_the_data(function, data):
    check(Net(function), data())


@pytest.mark.parametrize("function", UNSIGNED)
def test_a_pass_that_may_move_examples_is_read_for_every_batch(function, studies):
    compute(Net(function), Categorical(), ordered_first(), {"gradients": Gradients})
    assert studies == [6, 6, 6, 4]


# Ordinary networks keep examples where they are, and are read once.


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Dropout(), nn.Linear(5, 3)), (4,)


def convolutional():
    features = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(4, 3)), (2, 4, 4)


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)), (3, 4)


def gated():
    """A gate, and a mask of positions, from the data."""

    def forward(m, x):
        h = (m.layers(x) * x[..., :1]).masked_fill(x[..., 1:2] > 1, 0.0)
        causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return F.scaled_dot_product_attention(h, h, h, attn_mask=causal).mean(1)

    return Net(forward), (7, 4)


def tokens():
    layers = (nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    return nn.Sequential(*layers), (3,)


def lstm():
    return Recurrent(nn.LSTM(2, 4, batch_first=True)), (3, 2)


def gru():
    return Recurrent(nn.GRU(2, 4, batch_first=True)), (3, 2)


@pytest.mark.parametrize("build", [mlp, convolutional, transformer, gated, tokens, lstm, gru])
@pytest.mark.parametrize(("sizes", "studied"), [((5, 5, 3), [5]), ((20, 12, 9), [8])])
def test_an_ordinary_network_is_read_once(build, sizes, studied, studies):
    model, shape = build()
    data = [labelled(torch.randint(10, (n, *shape)) if build is tokens else torch.randn(n, *shape)) for n in sizes]
    check(model, data)
    assert studies == studied
