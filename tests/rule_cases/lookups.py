"""Tables that are looked up, weights whose rows the data chooses, and what has no closed form."""

import torch
from networks.registry import Model, gaussian
from rule_cases.registry import case, head, parameter
from torch import nn
from torch.nn import functional as F


def tokens(*shape, size=7):
    return lambda n: torch.randint(size, (n, *shape))


@case(Embedding=1)
def embedding():
    return head(nn.Embedding(7, 4), features=20), tokens(5)


@case(Embedding=1)
def embedding_of_one_token_and_of_a_grid():
    return Model(lambda m, x: m.table(x).tanh().sum((1, 2)), table=nn.Embedding(7, 3)), tokens(2, 3)


@case(Embedding=1)
def embedding_with_padding():
    return head(nn.Embedding(4, 3, padding_idx=1), features=15), tokens(5, size=4)


@case(Embedding=1)
def embedding_time_major():
    return Model(lambda m, x: m.table(x.T).tanh().sum(0), table=nn.Embedding(4, 3)), tokens(5, size=4)


@case(Embedding=2)
def embedding_read_twice():
    return Model(lambda m, x: m.table(x).tanh().sum(1) * m.table(x[:, :2]).sum(1), table=nn.Embedding(4, 3)), tokens(
        5, size=4
    )


@case(Embedding=2, Add=1)
def embeddings_of_tokens_types_and_positions():
    def forward(m, x):
        positions = torch.arange(x.shape[1])[None]
        return (m.tokens(x) + m.types(x % 2) + m.positions(positions)).tanh().sum(1)

    tables = {"tokens": nn.Embedding(7, 3), "types": nn.Embedding(2, 3), "positions": nn.Embedding(9, 3, padding_idx=2)}
    return Model(forward, **tables), tokens(5)


@case(Add=1)
def relative_positions_of_a_padded_embedding():
    """One bias for each head and distance, moved to the front and added to a mask before the scores."""
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    mask = torch.arange(16.0).view(4, 4) / 8 - 1

    def forward(m, x):
        bias = m.table(distance).permute(2, 0, 1)[None] + mask
        bias = torch.where(mask > -0.5, bias, -1.0).masked_fill(mask > 0.5, -2.0)
        return torch.softmax(x[:, None] @ x[:, None].mT + bias, -1).square().sum((2, 3))

    return Model(forward, table=nn.Embedding(4, 3, padding_idx=1)), gaussian(4, 3)


@case()
def positions_scaled_on_their_way():
    """A constant plus twice the parameter is no view of it."""
    return Model(
        lambda m, x: (x + torch.add(torch.ones(4, 3), m.position, alpha=2)).sin().sum(1), position=parameter(4, 3)
    ), gaussian(4, 3)


@case(Embedding=1, Mm=1)
def tied_embedding():
    """A language model whose last layer is its embedding, read for the next token."""

    def forward(m, x):
        return F.linear(m.table(x).tanh().cumsum(1), m.table.weight)[:, -1]

    return Model(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


@case(Embedding=1, Mm=1)
def tied_embedding_with_padding_at_all_positions():
    def forward(m, x):
        return F.linear(m.table(x).tanh().cumsum(1), m.table.weight).sin().sum(1)

    return Model(forward, table=nn.Embedding(6, 4, padding_idx=0)), tokens(5, size=6)


@case(Embedding=1, Mm=1)
def tied_to_a_product_whose_inputs_are_the_rows():
    def forward(m, x):
        return (m.table(x).tanh().sum(1).repeat(1, 2)[:, :6].sin() @ m.table.weight).cos()

    return Model(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


@case(Embedding=1, Mm=2)
def tied_three_ways():
    """A table, a head and a map in the other direction: the general sum."""

    def forward(m, x):
        h = F.linear(m.table(x).tanh().sum(1), m.table.weight)
        return (h.sin() @ m.table.weight).cos()

    return Model(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


# Routed by the data


@case(GroupedMm=2)
def experts_of_sorted_tokens():
    """Rows sorted by expert, so that an example's rows stand anywhere."""

    def forward(m, x):
        tokens = x.flatten(0, 1)
        order = (tokens.sum(1) > 0).long().argsort(stable=True)
        ends = (tokens.sum(1) > 0).long().bincount(minlength=2).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(tokens[order], m.up, offs=ends).tanh()
        h = torch._grouped_mm(h, m.down.transpose(1, 2), offs=ends)
        return torch.zeros_like(h).index_copy(0, order, h).view_as(x)[..., :3].sum(1)

    return Model(
        forward, **{n: nn.Parameter(0.3 * torch.randn(2, 16, 16, dtype=torch.float32)) for n in ("up", "down")}
    ), lambda n: torch.randn(n, 5, 16, dtype=torch.float32)


@case(Addmm=4)
def experts_of_picked_tokens():
    def forward(m, x):
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(m.experts):
            rows = ((tokens[:, 0] > 0).long() == e).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(tokens[rows]))
        return out.view_as(x).sum(1)

    return Model(forward, experts=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])), gaussian(4, 3)


# By the exact local path


@case()
def bilinear():
    return head(Model(lambda m, x: m.two(x, x.sin()), two=nn.Bilinear(3, 3, 2, bias=False)), features=2), gaussian(3)


@case(Addmm=3)
def made_of_a_parameter():
    """A weight that is no view of its parameter has no closed form; what else there is keeps its own."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return Model(lambda m, x: m.one(m.two(x).tanh()), one=model, two=nn.Linear(4, 4)), gaussian(4)
