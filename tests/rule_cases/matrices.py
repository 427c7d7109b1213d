"""Matrix products: plain, batched, sliced, in attention."""

import torch
from networks.registry import Model, gaussian
from rule_cases.registry import case, head, parameter, randomised
from torch import nn
from torch.nn import functional as F


@case(Addmm=2)
def linear():
    return head(nn.Linear(4, 5), features=5), gaussian(4)


@case(Addmm=2)
def addmm_with_the_weight_on_the_left_and_factors():
    return Model(
        lambda m, x: torch.addmm(m.b, m.w, x.T, beta=0.5, alpha=3).T, b=parameter(3, 1), w=parameter(3, 4)
    ), gaussian(4)


@case(Mm=3)
def slices_of_a_packed_weight():
    def forward(m, x):
        q, kv = m.w.split([2, 4])
        k, v = kv.chunk(2)
        return F.linear(x, q) + F.linear(x, k).tanh() * F.linear(x.sin(), v)

    return Model(forward, w=parameter(6, 4)), gaussian(4)


@case(Mm=3)
def columns_and_entries_of_a_stack_of_weights():
    return Model(
        lambda m, x: x @ m.stack[1] + x[:, :2] @ m.wide[:, 2:5].T[:2].mT.T + (x @ m.stack.unbind(0)[0]).tanh(),
        stack=parameter(2, 4, 3),
        wide=parameter(3, 7),
    ), gaussian(4)


@case(Mm=1)
def kernel_of_one_pixel_as_a_matrix():
    return Model(lambda m, x: F.linear(x, m.w[:, :, 0, 0]), w=parameter(3, 4, 1, 1)), gaussian(4)


@case(Addmm=4)
def low_rank_adapter():
    """LoRA: a frozen map and two thin ones beside it."""
    frozen = nn.Linear(4, 3).requires_grad_(False)
    return Model(
        lambda m, x: m.frozen(x) + 2.0 * m.up(m.down(x)), frozen=frozen, down=nn.Linear(4, 2), up=nn.Linear(2, 3)
    ), gaussian(4)


@case(Mv=2)
def matrix_times_vector():
    return Model(lambda m, x: torch.stack([x[:, 0] @ m.w, (x @ m.w).tanh().sum(1)], 1), w=parameter(4)), gaussian(2, 4)


@case(Bmm=2)
def a_weight_for_each_expert():
    def forward(m, x):
        h = torch.einsum("nti,eio->neto", x, m.one).tanh()
        return torch.einsum("neto,eoc->nc", h, m.two)

    return Model(forward, one=parameter(4, 3, 2), two=parameter(4, 2, 3)), gaussian(5, 3)


@case(Bmm=1)
def a_weight_for_each_expert_stored_the_other_way():
    return Model(lambda m, x: torch.bmm(x.transpose(0, 1), m.w.mT).sum(0), w=parameter(2, 3, 4)), gaussian(2, 4)


@case(Bmm=1)
def a_weight_for_each_expert_from_the_left():
    return Model(lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).sum(0).T, w=parameter(2, 3, 4)), gaussian(2, 4)


@case(Bmm=1)
def one_weight_for_the_whole_batch_of_products():
    return Model(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)).tanh().sum(1), w=parameter(4, 3)), gaussian(2, 4)


@case(Bmm=1)
def one_weight_for_the_whole_batch_of_products_from_the_left():
    return Model(lambda m, x: torch.bmm(m.w.t().expand(len(x), -1, -1), x).tanh().sum(2), w=parameter(4, 3)), gaussian(
        4, 2
    )


@case(Bmm=4)
def axes_of_einsum_in_any_order():
    """Experts that share their inputs, experts that add up to the same outputs, both stored in two ways."""

    def forward(m, x):
        h = torch.einsum("nti,eio->nteo", x, m.a).sin()
        h = torch.einsum("nteo,epo->ntep", h, m.b).sin() + torch.einsum("nti,epi->ntep", x, m.c)
        return torch.einsum("ntep,ecp->nc", h.cos(), m.d)

    return Model(
        forward, a=parameter(2, 3, 4), b=parameter(2, 5, 4), c=parameter(2, 5, 3), d=parameter(2, 3, 5)
    ), gaussian(4, 3)


@case(Bmm=3)
def a_weight_for_each_head():
    """Broadcast over examples by `matmul`, which repeats the weight for each."""
    return Model(
        lambda m, x: ((m.left @ (x @ m.w).tanh()).sin() @ m.other.mT).sum((1, 2)),
        w=parameter(2, 3, 4),
        left=parameter(2, 6, 5),
        other=parameter(2, 3, 4),
    ), gaussian(2, 5, 3)


@case(Bmm=1)
def a_weight_for_each_head_at_several_places():
    return Model(lambda m, x: (x @ m.w).tanh().sum((1, 2, 3)), w=parameter(2, 3, 4)), gaussian(3, 2, 5, 3)


@case()
def a_weight_for_each_head_with_examples_inside():
    """Repeated within the heads, not across them: left to the local path."""
    return Model(lambda m, x: (x.transpose(0, 1) @ m.w[:, None]).sin().sum((0, 2)), w=parameter(2, 3, 4)), gaussian(
        2, 5, 3
    )


@case()
def a_weight_for_each_head_with_positions_inside():
    return Model(lambda m, x: (x.permute(1, 2, 0, 3) @ m.w[:, None]).sin().sum((0, 1)), w=parameter(2, 3, 4)), gaussian(
        2, 5, 3
    )


@case()
def some_rows_of_each_expert():
    return Model(lambda m, x: torch.einsum("nei,eio->no", x, m.w[:, :3]), w=parameter(2, 4, 3)), gaussian(2, 3)


@case(Baddbmm=2)
def batched_product_with_a_shift():
    return Model(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w, beta=0.5, alpha=2).sum(0),
        b=parameter(2, 1, 3),
        w=parameter(2, 4, 3),
    ), gaussian(2, 4)


@case(Addmm=2, Mm=1, Add=1)
def attention_with_a_packed_projection():
    return Model(
        lambda m, x: m.mix(x, x, x, need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, batch_first=True)),
    ), gaussian(5, 4)


@case(Addmm=2, Mm=3, Add=3)
def attention_across():
    """Queries from one sequence, keys and values from another: two pieces of the packed projection."""
    return Model(
        lambda m, x: m.mix(x[:, :2], x[:, 2:], x[:, 2:], need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, batch_first=True)),
    ), gaussian(5, 4)


@case(Addmm=2, Mm=3, Add=3)
def attention_with_three_projections():
    return Model(
        lambda m, x: m.mix(x, x[:, 1:, :3], x[:, 1:, :2], need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)),
    ), gaussian(5, 4)
