"""Parameters that meet the data entry by entry: scales, shifts, tokens, positions."""

import torch
from networks.registry import Model, gaussian
from rule_cases.registry import case, head, parameter
from torch import nn
from torch.nn import functional as F


@case(Mul=3, Sub=1, Add=1)
def scales_and_shifts():
    return Model(
        lambda m, x: (m.a * (x * m.b - m.c).tanh() * m.d + m.e).sum(1),
        **{name: parameter(*shape) for name, shape in zip("abcde", [(3,), (2, 1), (1, 2, 3), (), (2, 3)], strict=True)},
    ), gaussian(2, 3)


@case(Div=2)
def quotients():
    return Model(
        lambda m, x: (m.a / (x.square() + 1)).sum(1) + (x / m.b).sum(1), a=parameter(3), b=parameter(2, 1)
    ), gaussian(2, 3)


@case(Addcmul=3)
def product_added_to_a_shift():
    return Model(
        lambda m, x: torch.addcmul(m.a, m.b, x, value=0.5) + torch.addcmul(x, x, m.c, value=2),
        **{name: parameter(3) for name in "abc"},
    ), gaussian(3)


@case(Where=2)
def masked():
    def forward(m, x):
        return torch.where(x.sum(-1, keepdim=True) > 0, m.token, x).tanh().sum(1) + torch.where(x > 0, x, m.other).sum(
            1
        )

    return Model(forward, token=parameter(3), other=parameter(1, 1, 3)), gaussian(4, 3)


@case(PreluKernel=2)
def parametric_relu():
    return head(nn.PReLU(4), nn.Flatten(), nn.PReLU(), features=8), gaussian(4, 2)


@case(Cat=1, Repeat=1, Add=1)
def class_token_and_positions():
    def forward(m, x):
        tokens = torch.cat(
            [m.token.expand(len(x), -1, -1), x.tanh() * m.scale.detach(), m.last.repeat(len(x), 1, 1)], 1
        )
        return (tokens + m.position[:, : tokens.shape[1]]).sin().sum(1)

    return Model(
        lambda m, x: forward(m, x), token=parameter(1, 1, 3), position=parameter(1, 9, 3), last=parameter(1, 1, 3),
        scale=nn.Parameter(torch.randn(3), requires_grad=False),
    ), gaussian(4, 3)  # fmt: skip


@case(Cat=1)
def token_behind_the_data():
    return Model(
        lambda m, x: torch.cat([x, m.token.expand(len(x), 2, -1)], 1).sin().sum(1), token=parameter(1, 2, 3)
    ), gaussian(4, 3)


@case(Cat=1, Mul=1)
def token_behind_what_has_a_gradient():
    return Model(
        lambda m, x: torch.cat([x * m.scale, m.token.expand(len(x), 1, -1)], 1).sin().cumsum(1)[:, -1],
        scale=parameter(3),
        token=parameter(1, 1, 3),
    ), gaussian(4, 3)


@case(Repeat=1)
def repeated():
    return Model(lambda m, x: (m.w.repeat(len(x), 2, 1) * x).sin().sum(1), w=parameter(2, 3)), gaussian(4, 3)


@case(Add=1, Mul=1)
def selected_entries():
    return Model(lambda m, x: (x * m.table[1] + m.table.t()[:, 2]).sum(1), table=parameter(3, 3)), gaussian(2, 3)


@case(Add=1)
def relative_positions():
    """A small table read through an index, as in window attention."""
    distance = torch.arange(4)[:, None] - torch.arange(4) + 3

    def forward(m, x):
        bias = m.table[distance.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        return torch.softmax(x[:, None] @ x[:, None].mT + bias[None], -1).square().sum((2, 3))

    return Model(forward, table=parameter(7, 2)), gaussian(4, 3)


@case(Addmm=2, Mul=1)
def half_precision_inside():
    """Under autocast weights are converted on their way to the product."""

    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, m.w, m.b).float() * m.s

    return Model(
        forward,
        **{n: nn.Parameter(torch.randn(*s, dtype=torch.float32)) for n, s in (("w", (3, 4)), ("b", (3,)), ("s", (3,)))},
    ), lambda n: torch.randn(n, 4, dtype=torch.float32)
