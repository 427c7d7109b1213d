"""Mixtures of experts that send each row where the data says."""

import torch
from networks.registry import Model
from torch import nn
from torch.nn import functional as F


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
