"""Every closed form: that it is taken, and that it equals the exact local path and plain autograd.

A further rule is one more decorated function below: it returns a network, its inputs, and the nodes whose closed form
must have been taken, with how often. All other uses of a parameter must then have gone by the local path.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import DenseJacobian, EmbeddingJacobian, Engine, OuterProduct, Parameters, TiedJacobian, borrowed
from lapkit.curvature.capture.layout import Layout
from lapkit.curvature.capture.tape import Use
from lapkit.curvature.rules.site import Site
from lapkit.curvature.rules.table import RULES

CASES = {}
N = 3


class Lambda(nn.Module):
    """A function of the inputs and of modules or parameters that are registered under their names."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def gaussian(*shape):
    return lambda n: torch.randn(n, *shape)


def case(**taken):
    """A network, and how many uses at nodes `NAMEBackward0` take a closed form."""

    def add(build):
        CASES[build.__name__] = build, Counter({f"{name}Backward0": count for name, count in taken.items()})
        return build

    return add


def randomised(model):
    """Scales and shifts start at one and zero, where mistakes hide."""
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def head(*body, features):
    """Layers and a frozen linear map that mixes what they return."""
    last = nn.Linear(features, 3)
    last.requires_grad_(False)
    return randomised(nn.Sequential(*body, nn.Flatten(), last))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


# Matrix products


@case(Addmm=2)
def linear():
    return head(nn.Linear(4, 5), features=5), gaussian(4)


@case(Addmm=2)
def addmm_with_the_weight_on_the_left_and_factors():
    return Lambda(
        lambda m, x: torch.addmm(m.b, m.w, x.T, beta=0.5, alpha=3).T, b=parameter(3, 1), w=parameter(3, 4)
    ), gaussian(4)


@case(Mm=3)
def slices_of_a_packed_weight():
    def forward(m, x):
        q, kv = m.w.split([2, 4])
        k, v = kv.chunk(2)
        return F.linear(x, q) + F.linear(x, k).tanh() * F.linear(x.sin(), v)

    return Lambda(forward, w=parameter(6, 4)), gaussian(4)


@case(Mm=3)
def columns_and_entries_of_a_stack_of_weights():
    return Lambda(
        lambda m, x: x @ m.stack[1] + x[:, :2] @ m.wide[:, 2:5].T[:2].mT.T + (x @ m.stack.unbind(0)[0]).tanh(),
        stack=parameter(2, 4, 3),
        wide=parameter(3, 7),
    ), gaussian(4)


@case(Mm=1)
def kernel_of_one_pixel_as_a_matrix():
    return Lambda(lambda m, x: F.linear(x, m.w[:, :, 0, 0]), w=parameter(3, 4, 1, 1)), gaussian(4)


@case(Addmm=4)
def low_rank_adapter():
    """LoRA: a frozen map and two thin ones beside it."""
    frozen = nn.Linear(4, 3).requires_grad_(False)
    return Lambda(
        lambda m, x: m.frozen(x) + 2.0 * m.up(m.down(x)), frozen=frozen, down=nn.Linear(4, 2), up=nn.Linear(2, 3)
    ), gaussian(4)


@case(Mv=2)
def matrix_times_vector():
    return Lambda(lambda m, x: torch.stack([x[:, 0] @ m.w, (x @ m.w).tanh().sum(1)], 1), w=parameter(4)), gaussian(2, 4)


@case(Bmm=2)
def a_weight_for_each_expert():
    def forward(m, x):
        h = torch.einsum("nti,eio->neto", x, m.one).tanh()
        return torch.einsum("neto,eoc->nc", h, m.two)

    return Lambda(forward, one=parameter(4, 3, 2), two=parameter(4, 2, 3)), gaussian(5, 3)


@case(Bmm=1)
def a_weight_for_each_expert_stored_the_other_way():
    return Lambda(lambda m, x: torch.bmm(x.transpose(0, 1), m.w.mT).sum(0), w=parameter(2, 3, 4)), gaussian(2, 4)


@case(Bmm=1)
def a_weight_for_each_expert_from_the_left():
    return Lambda(lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).sum(0).T, w=parameter(2, 3, 4)), gaussian(2, 4)


@case(Bmm=1)
def one_weight_for_the_whole_batch_of_products():
    return Lambda(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)).tanh().sum(1), w=parameter(4, 3)), gaussian(
        2, 4
    )


@case(Bmm=1)
def one_weight_for_the_whole_batch_of_products_from_the_left():
    return Lambda(lambda m, x: torch.bmm(m.w.t().expand(len(x), -1, -1), x).tanh().sum(2), w=parameter(4, 3)), gaussian(
        4, 2
    )


@case(Bmm=4)
def axes_of_einsum_in_any_order():
    """Experts that share their inputs, experts that add up to the same outputs, both stored in two ways."""

    def forward(m, x):
        h = torch.einsum("nti,eio->nteo", x, m.a).sin()
        h = torch.einsum("nteo,epo->ntep", h, m.b).sin() + torch.einsum("nti,epi->ntep", x, m.c)
        return torch.einsum("ntep,ecp->nc", h.cos(), m.d)

    return Lambda(
        forward, a=parameter(2, 3, 4), b=parameter(2, 5, 4), c=parameter(2, 5, 3), d=parameter(2, 3, 5)
    ), gaussian(4, 3)


@case(Bmm=3)
def a_weight_for_each_head():
    """Broadcast over examples by `matmul`, which repeats the weight for each."""
    return Lambda(
        lambda m, x: ((m.left @ (x @ m.w).tanh()).sin() @ m.other.mT).sum((1, 2)),
        w=parameter(2, 3, 4),
        left=parameter(2, 6, 5),
        other=parameter(2, 3, 4),
    ), gaussian(2, 5, 3)


@case(Bmm=1)
def a_weight_for_each_head_at_several_places():
    return Lambda(lambda m, x: (x @ m.w).tanh().sum((1, 2, 3)), w=parameter(2, 3, 4)), gaussian(3, 2, 5, 3)


@case()
def a_weight_for_each_head_with_examples_inside():
    """Repeated within the heads, not across them: left to the local path."""
    return Lambda(lambda m, x: (x.transpose(0, 1) @ m.w[:, None]).sin().sum((0, 2)), w=parameter(2, 3, 4)), gaussian(
        2, 5, 3
    )


@case()
def a_weight_for_each_head_with_positions_inside():
    return Lambda(
        lambda m, x: (x.permute(1, 2, 0, 3) @ m.w[:, None]).sin().sum((0, 1)), w=parameter(2, 3, 4)
    ), gaussian(2, 5, 3)


@case()
def some_rows_of_each_expert():
    return Lambda(lambda m, x: torch.einsum("nei,eio->no", x, m.w[:, :3]), w=parameter(2, 4, 3)), gaussian(2, 3)


@case(Baddbmm=2)
def batched_product_with_a_shift():
    return Lambda(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w, beta=0.5, alpha=2).sum(0),
        b=parameter(2, 1, 3),
        w=parameter(2, 4, 3),
    ), gaussian(2, 4)


@case(Addmm=2, Mm=1, Add=1)
def attention_with_a_packed_projection():
    return Lambda(
        lambda m, x: m.mix(x, x, x, need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, batch_first=True)),
    ), gaussian(5, 4)


@case(Addmm=2, Mm=3, Add=3)
def attention_across():
    """Queries from one sequence, keys and values from another: two pieces of the packed projection."""
    return Lambda(
        lambda m, x: m.mix(x[:, :2], x[:, 2:], x[:, 2:], need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, batch_first=True)),
    ), gaussian(5, 4)


@case(Addmm=2, Mm=3, Add=3)
def attention_with_three_projections():
    return Lambda(
        lambda m, x: m.mix(x, x[:, 1:, :3], x[:, 1:, :2], need_weights=False)[0].mean(1),
        mix=randomised(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)),
    ), gaussian(5, 4)


# Convolutions


def convolution(name, layer, *shape, features):
    CASES[name] = (lambda: (head(layer(), features=features), gaussian(*shape))), Counter(ConvolutionBackward0=2)


convolution("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 7, features=12)
convolution("conv2d", lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), 4, 5, 5, features=36)
convolution("conv3d", lambda: nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1)), 2, 3, 3, 2, features=36)
convolution("conv2d_depthwise", lambda: nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3, features=24)
convolution("transposed1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), 2, 4, features=30)
convolution(
    "transposed2d",
    lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2),
    *(4, 3, 2),
    features=252,
)
convolution(
    "transposed2d_dilated",
    lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1, output_padding=2, dilation=3),
    *(2, 3, 3),
    features=192,
)
convolution("transposed2d_depthwise", lambda: nn.ConvTranspose2d(3, 6, 3, padding=1, groups=3), 3, 3, 3, features=54)
convolution("transposed3d", lambda: nn.ConvTranspose3d(2, 2, (2, 1, 2), stride=(1, 2, 2)), 2, 2, 2, 2, features=72)


# Normalisations


@case(NativeLayerNorm=2)
def layer_norm():
    return head(nn.LayerNorm(4), features=4), gaussian(4)


@case(NativeLayerNorm=2)
def layer_norm_over_two_axes_of_a_sequence():
    return head(nn.LayerNorm((3, 4)), features=24), gaussian(2, 3, 4)


@case(NativeLayerNorm=2)
def layer_norm_time_major():
    return Lambda(lambda m, x: m.norm(x.transpose(0, 1)).tanh().sum(0), norm=randomised(nn.LayerNorm(4))), gaussian(
        5, 4
    )


@case(NativeLayerNorm=1)
def layer_norm_without_shift():
    return head(nn.LayerNorm(4, bias=False), features=8), gaussian(2, 4)


@case(Mul=1)
def rms_norm_composed():
    return head(nn.RMSNorm(4), features=8), gaussian(2, 4)


@case(Mul=1)
def rms_norm_by_hand():
    return Lambda(
        lambda m, x: (m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))).sin().sum(1), w=parameter(4)
    ), gaussian(3, 4)


@case(NativeGroupNorm=2)
def group_norm():
    return head(nn.GroupNorm(2, 4), features=24), gaussian(4, 3, 2)


@case(NativeGroupNorm=2)
def group_norm_of_vectors():
    return head(nn.GroupNorm(2, 4), features=4), gaussian(4)


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@case(NativeBatchNorm=2)
def batch_norm_1d():
    return head(with_statistics(nn.BatchNorm1d(4)), features=4), gaussian(4)


@case(NativeBatchNorm=2)
def batch_norm_3d():
    return head(with_statistics(nn.BatchNorm3d(2)), features=24), gaussian(2, 2, 3, 2)


@case(Repeat=2)
def instance_norm():
    return head(nn.InstanceNorm2d(2, affine=True), features=12), gaussian(2, 3, 2)


@case(Repeat=2)
def instance_norm_with_running_statistics():
    return head(with_statistics(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), features=6), gaussian(
        2, 3
    )


# Entry by entry


@case(Mul=3, Sub=1, Add=1)
def scales_and_shifts():
    return Lambda(
        lambda m, x: (m.a * (x * m.b - m.c).tanh() * m.d + m.e).sum(1),
        **{name: parameter(*shape) for name, shape in zip("abcde", [(3,), (2, 1), (1, 2, 3), (), (2, 3)], strict=True)},
    ), gaussian(2, 3)


@case(Div=2)
def quotients():
    return Lambda(
        lambda m, x: (m.a / (x.square() + 1)).sum(1) + (x / m.b).sum(1), a=parameter(3), b=parameter(2, 1)
    ), gaussian(2, 3)


@case(Addcmul=3)
def product_added_to_a_shift():
    return Lambda(
        lambda m, x: torch.addcmul(m.a, m.b, x, value=0.5) + torch.addcmul(x, x, m.c, value=2),
        **{name: parameter(3) for name in "abc"},
    ), gaussian(3)


@case(Where=2)
def masked():
    def forward(m, x):
        return torch.where(x.sum(-1, keepdim=True) > 0, m.token, x).tanh().sum(1) + torch.where(x > 0, x, m.other).sum(
            1
        )

    return Lambda(forward, token=parameter(3), other=parameter(1, 1, 3)), gaussian(4, 3)


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

    return Lambda(
        lambda m, x: forward(m, x), token=parameter(1, 1, 3), position=parameter(1, 9, 3), last=parameter(1, 1, 3),
        scale=nn.Parameter(torch.randn(3), requires_grad=False),
    ), gaussian(4, 3)  # fmt: skip


@case(Cat=1)
def token_behind_the_data():
    return Lambda(
        lambda m, x: torch.cat([x, m.token.expand(len(x), 2, -1)], 1).sin().sum(1), token=parameter(1, 2, 3)
    ), gaussian(4, 3)


@case(Cat=1, Mul=1)
def token_behind_what_has_a_gradient():
    return Lambda(
        lambda m, x: torch.cat([x * m.scale, m.token.expand(len(x), 1, -1)], 1).sin().cumsum(1)[:, -1],
        scale=parameter(3),
        token=parameter(1, 1, 3),
    ), gaussian(4, 3)


@case(Repeat=1)
def repeated():
    return Lambda(lambda m, x: (m.w.repeat(len(x), 2, 1) * x).sin().sum(1), w=parameter(2, 3)), gaussian(4, 3)


@case(Add=1, Mul=1)
def selected_entries():
    return Lambda(lambda m, x: (x * m.table[1] + m.table.t()[:, 2]).sum(1), table=parameter(3, 3)), gaussian(2, 3)


@case(Add=1)
def relative_positions():
    """A small table read through an index, as in window attention."""
    distance = torch.arange(4)[:, None] - torch.arange(4) + 3

    def forward(m, x):
        bias = m.table[distance.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        return torch.softmax(x[:, None] @ x[:, None].mT + bias[None], -1).square().sum((2, 3))

    return Lambda(forward, table=parameter(7, 2)), gaussian(4, 3)


@case(Addmm=2, Mul=1)
def half_precision_inside():
    """Under autocast weights are converted on their way to the product."""

    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, m.w, m.b).float() * m.s

    return Lambda(
        forward,
        **{n: nn.Parameter(torch.randn(*s, dtype=torch.float32)) for n, s in (("w", (3, 4)), ("b", (3,)), ("s", (3,)))},
    ), lambda n: torch.randn(n, 4, dtype=torch.float32)


# Embeddings


def tokens(*shape, size=7):
    return lambda n: torch.randint(size, (n, *shape))


@case(Embedding=1)
def embedding():
    return head(nn.Embedding(7, 4), features=20), tokens(5)


@case(Embedding=1)
def embedding_of_one_token_and_of_a_grid():
    return Lambda(lambda m, x: m.table(x).tanh().sum((1, 2)), table=nn.Embedding(7, 3)), tokens(2, 3)


@case(Embedding=1)
def embedding_with_padding():
    return head(nn.Embedding(4, 3, padding_idx=1), features=15), tokens(5, size=4)


@case(Embedding=1)
def embedding_time_major():
    return Lambda(lambda m, x: m.table(x.T).tanh().sum(0), table=nn.Embedding(4, 3)), tokens(5, size=4)


@case(Embedding=2)
def embedding_read_twice():
    return Lambda(lambda m, x: m.table(x).tanh().sum(1) * m.table(x[:, :2]).sum(1), table=nn.Embedding(4, 3)), tokens(
        5, size=4
    )


@case(Embedding=2, Add=1)
def embeddings_of_tokens_types_and_positions():
    def forward(m, x):
        positions = torch.arange(x.shape[1])[None]
        return (m.tokens(x) + m.types(x % 2) + m.positions(positions)).tanh().sum(1)

    tables = {"tokens": nn.Embedding(7, 3), "types": nn.Embedding(2, 3), "positions": nn.Embedding(9, 3, padding_idx=2)}
    return Lambda(forward, **tables), tokens(5)


@case(Add=1)
def relative_positions_of_a_padded_embedding():
    """One bias for each head and distance, moved to the front and added to a mask before the scores."""
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    mask = torch.arange(16.0).view(4, 4) / 8 - 1

    def forward(m, x):
        bias = m.table(distance).permute(2, 0, 1)[None] + mask
        bias = torch.where(mask > -0.5, bias, -1.0).masked_fill(mask > 0.5, -2.0)
        return torch.softmax(x[:, None] @ x[:, None].mT + bias, -1).square().sum((2, 3))

    return Lambda(forward, table=nn.Embedding(4, 3, padding_idx=1)), gaussian(4, 3)


@case()
def positions_scaled_on_their_way():
    """A constant plus twice the parameter is no view of it."""
    return Lambda(
        lambda m, x: (x + torch.add(torch.ones(4, 3), m.position, alpha=2)).sin().sum(1), position=parameter(4, 3)
    ), gaussian(4, 3)


@case(Embedding=1, Mm=1)
def tied_embedding():
    """A language model whose last layer is its embedding, read for the next token."""

    def forward(m, x):
        return F.linear(m.table(x).tanh().cumsum(1), m.table.weight)[:, -1]

    return Lambda(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


@case(Embedding=1, Mm=1)
def tied_embedding_with_padding_at_all_positions():
    def forward(m, x):
        return F.linear(m.table(x).tanh().cumsum(1), m.table.weight).sin().sum(1)

    return Lambda(forward, table=nn.Embedding(6, 4, padding_idx=0)), tokens(5, size=6)


@case(Embedding=1, Mm=1)
def tied_to_a_product_whose_inputs_are_the_rows():
    def forward(m, x):
        return (m.table(x).tanh().sum(1).repeat(1, 2)[:, :6].sin() @ m.table.weight).cos()

    return Lambda(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


@case(Embedding=1, Mm=2)
def tied_three_ways():
    """A table, a head and a map in the other direction: the general sum."""

    def forward(m, x):
        h = F.linear(m.table(x).tanh().sum(1), m.table.weight)
        return (h.sin() @ m.table.weight).cos()

    return Lambda(forward, table=nn.Embedding(6, 4)), tokens(5, size=6)


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

    return Lambda(
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

    return Lambda(forward, experts=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])), gaussian(4, 3)


# By the exact local path


@case()
def bilinear():
    return head(Lambda(lambda m, x: m.two(x, x.sin()), two=nn.Bilinear(3, 3, 2, bias=False)), features=2), gaussian(3)


@case(Addmm=3)
def made_of_a_parameter():
    """A weight that is no view of its parameter has no closed form; what else there is keeps its own."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return Lambda(lambda m, x: m.one(m.two(x).tanh()), one=model, two=nn.Linear(4, 4)), gaussian(4)


# Operations that the CPU has in float32 or bfloat16 only: tolerances against autograd and the local path.
COARSE = {"half_precision_inside": (3e-2, 3e-2), "experts_of_sorted_tokens": (1e-4, 1e-4)}


def of(name):
    build, taken = CASES[name]
    torch.manual_seed(0)
    model, inputs = build()
    return model.eval(), inputs(N), +taken


def both_ways(model, x):
    """The names of the nodes with closed forms, and the Jacobian with and without them."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        backprop = Engine(model, parameters)(x)
        taken = Counter(use.node.name() for use, rule in backprop.rules.items() if rule is not None)
        closed = backprop.jacobian()
        backprop.rules = dict.fromkeys(backprop.rules)
        return taken, closed, backprop.jacobian()


@pytest.mark.parametrize("name", CASES)
def test_closed_form(name, slow_jacobian):
    model, x, taken = of(name)
    found, closed, local = both_ways(model, x)
    assert found == taken
    close, closest = COARSE.get(name, (1e-8, 1e-12))
    torch.testing.assert_close(closed.to_dense(), local.to_dense(), rtol=closest, atol=closest)
    slow = slow_jacobian(model, x).movedim(1, 0)
    torch.testing.assert_close(closed.to_dense(), slow, rtol=close, atol=close)


@pytest.mark.parametrize("name", sorted({*CASES} - {*COARSE}))
@pytest.mark.parametrize("budget", [1, 2**28])
def test_algebra_of_what_the_rules_return(name, budget):
    """Each method of each parameter's Jacobian against the expanded form."""
    model, x, _ = of(name)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        _, jacobian = Engine(model, parameters, memory_budget=budget).jacobian(x)
    for part in jacobian.parts:
        dense = DenseJacobian(part.to_dense())
        columns, examples, size = part.shape
        weights, vectors, cotangent = torch.randn(size), torch.randn(size, 2), torch.randn(columns, examples)
        for method, *arguments in (
            ("square_sum",),
            ("square_norms",),
            ("squares",),
            ("weighted_gram", weights),
            ("gram",),
            ("project", vectors),
            ("pull_back", cotangent),
            ("block",),
        ):
            actual, expected = (getattr(j, method)(*arguments) for j in (part, dense))
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        (whole,) = part.split([size])
        torch.testing.assert_close(whole.to_dense(), dense.values)


def embedding_jacobian(columns=2, examples=3, positions=5, rows=4, width=2, padding=False):
    index = torch.randint(-1 if padding else 0, rows, (examples, positions))
    return EmbeddingJacobian(index, torch.randn(columns, examples, positions, width), rows)


def one_hot(table):
    """The same as a product with unit vectors."""
    unit = torch.cat([torch.eye(table.rows), torch.zeros(1, table.rows)])  # -1 is the last
    return OuterProduct(unit[table.index].unsqueeze(2), table.g.unsqueeze(3), transposed=True)


def tied_jacobian():
    table = embedding_jacobian(padding=True)
    return TiedJacobian(table, OuterProduct(torch.randn(3, 2, 1, 2), torch.randn(2, 3, 2, 1, 4)))


@pytest.mark.parametrize("padding", [False, True])
def test_an_embedding_is_a_product_with_unit_vectors(padding):
    table = embedding_jacobian(padding=padding)
    product = one_hot(table)
    torch.testing.assert_close(table.to_dense(), product.to_dense())
    kept = (table.index >= 0)[..., None]
    torch.testing.assert_close(table.output_moment(), one_hot_moment(table.g * kept))
    counts, number = table.input_moment()
    expected, _ = product.input_moment()
    torch.testing.assert_close(torch.diag_embed(counts), expected)
    assert number == int(kept.sum())


def one_hot_moment(g):
    return torch.einsum("kntd,knte->de", g, g)[None]


@pytest.mark.parametrize("make", [embedding_jacobian, tied_jacobian])
def test_columns_of_a_table_are_rotated(make):
    jacobian = make()
    basis = torch.randn(1, 2, 2)
    rotated = jacobian.rotate(None, basis)
    assert type(rotated) is type(jacobian)
    expected = jacobian.to_dense() @ torch.kron(torch.eye(4), basis[0])
    torch.testing.assert_close(rotated.to_dense(), expected)


def test_no_vocabulary_squared():
    """A table of a million entries, tied to the head: nothing of V x V or (K, N, V D) is made."""
    rows, width = 2**17, 8
    index = torch.randint(rows, (2, 3))
    table = EmbeddingJacobian(index, torch.randn(1, 2, 3, width), rows)
    tied = TiedJacobian(table, OuterProduct(torch.randn(2, 1, 1, width), torch.randn(1, 2, 1, 1, rows)))
    for jacobian in (table, tied):
        product = jacobian.rotate(None, torch.eye(width)[None])
        assert product.weighted_gram(torch.ones(rows * width)).shape == (2, 1, 1)
        assert jacobian.square_sum().shape == (rows * width,)
        assert jacobian.gram().shape == (1, 2, 1, 2)
        assert jacobian.output_moment().numel() <= rows + width**2
        assert jacobian.input_moment()[0].shape == (1, rows)


def test_tied_block_keeps_the_trace_of_both_uses():
    """With one position for each use and none in common, row sums and the trace are those of the exact block."""
    table = EmbeddingJacobian(torch.tensor([[0], [1], [3]]), torch.randn(2, 3, 1, 2), 4)
    product = OuterProduct(torch.randn(3, 1, 1, 2), torch.randn(2, 3, 1, 1, 4))
    product.g[:, torch.arange(3), 0, 0, table.index[:, 0]] = 0  # no row in common
    tied = TiedJacobian(table, product)
    packed = tied.output_moment()[0]
    exact = tied.block().view(4, 2, 4, 2)
    torch.testing.assert_close(packed[:4].view(2, 2), torch.einsum("vdve->de", exact))
    torch.testing.assert_close(packed[4:], torch.einsum("vdvd->v", exact))


def test_frequencies_are_refused():
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 3))
    parameters = Parameters.of(model)
    with borrowed(model, parameters), pytest.raises(ValueError, match="scale_grad_by_freq"):
        Engine(model, parameters)(torch.tensor([[0, 1], [1, 1], [2, 0]]))


class Stored:
    """A node of another device: a name, what it saved, what is below it."""

    def __init__(node, name, shape, leaf_at, leaf, /, **saved):
        node.name = lambda: f"{name}Backward0"
        node._input_metadata = [torch.empty(shape)]
        node.next_functions = tuple((leaf, 0) if slot == leaf_at else (None, 0) for slot in range(3))
        for key, value in saved.items():
            setattr(node, f"_saved_{key}", value)


def statistics(x):
    return {"running_mean": x.mean((0, 2)), "running_var": x.var((0, 2)), "training": False, "weight": None}


def elsewhere(name):
    """A node that the CPU does not have, its parameter at slot 1, and the same function in operations that it has."""
    x, w = torch.randn(N, 4, 5), torch.randn(4)
    if name == "Linear":
        x, w = torch.randn(N, 2, 4), torch.randn(5, 4)
        return w, (N, 2, 5), {"input": x, "weight": w}, lambda w: F.linear(x, w)
    if name == "FusedRmsNorm":
        x = torch.randn(N, 2, 4)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return w, x.shape, {"input": x, "result1": scale, "weight": w}, lambda w: F.rms_norm(x, [4], w, 1e-5)
    if name == "ConvolutionOverrideable":
        kernel = torch.randn(3, 4, 2)
        kept = {"stride": (1,), "padding": (0,), "dilation": (1,), "transposed": False, "groups": 1}
        return kernel, (N, 3, 4), {"input": x, **kept}, lambda w: F.conv1d(x, w)
    kept = statistics(x)
    mean, var = kept["running_mean"], kept["running_var"]
    return w, x.shape, {"input": x, "epsilon": 1e-3, **kept}, lambda w: F.batch_norm(x, mean, var, w, eps=1e-3)


@pytest.mark.parametrize(
    "name", ["Linear", "FusedRmsNorm", "ConvolutionOverrideable", "CudnnBatchNorm", "MiopenBatchNorm"]
)
def test_nodes_of_other_devices(name):
    weight, shape, kept, function = elsewhere(name)
    leaf = Stored("Leaf", weight.shape, None, None)
    node = Stored(name, shape, 1, leaf, **kept)
    site = Site(Use("w", node, 1), Layout(0), N, weight, leaf, 2**28)
    cotangents = torch.randn(2, *shape)
    found = RULES[f"{name}Backward0", 1](site)(cotangents).to_dense()
    for k, n in itertools.product(range(2), range(N)):
        (row,) = torch.func.vjp(lambda w: function(w)[n], weight)[1](cotangents[k, n])  # noqa: B023
        torch.testing.assert_close(found[k, n], row.flatten(), rtol=1e-10, atol=1e-10)


def test_a_value_for_each_example_is_declined():
    """There is nothing to sum over where examples meet parameters of their own."""
    parameter = torch.randn(N, 4)
    leaf = Stored("Leaf", parameter.shape, None, None)
    for name, slot in (("Add", 0), ("Mul", 1)):
        node = Stored(name, (N, 4), slot, leaf, self=torch.randn(N, 4))
        assert RULES[f"{name}Backward0", slot](Site(Use("w", node, slot), Layout(0), N, parameter, leaf, 1)) is None


def test_statistics_of_the_batch_are_declined():
    weight, shape, kept, _ = elsewhere("CudnnBatchNorm")
    leaf = Stored("Leaf", weight.shape, None, None)
    node = Stored("CudnnBatchNorm", shape, 1, leaf, **{**kept, "training": True})
    assert RULES["CudnnBatchNormBackward0", 1](Site(Use("w", node, 1), Layout(0), N, weight, leaf, 1)) is None


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))
    other = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    other.load_state_dict(model.state_dict())
    x = torch.randint(5, (N, 2))
    found = []
    for m in (model, other):
        parameters = Parameters.of(m)
        with borrowed(m, parameters):
            found.append(Engine(m, parameters).jacobian(x)[1].to_dense())
    torch.testing.assert_close(*found)


# The few uses whose derivative is the cotangent itself, whatever the node saved.
NOTHING_NEEDED = {
    *(("AddBackward0", 0), ("SubBackward0", 0), ("LinearBackward0", 2), ("AddcmulBackward0", 0)),
    *(("ConvolutionBackward0", 2), ("ConvolutionOverrideableBackward0", 2)),
}


@pytest.mark.parametrize("use", sorted({*RULES} - NOTHING_NEEDED))
def test_a_missing_operand_is_declined(use):
    """A torch that does not show what a node saved costs speed, not correctness."""
    (name, slot), parameter = use, torch.randn(4)
    leaf = Stored("Leaf", parameter.shape, None, None)
    node = Stored(name.removesuffix("Backward0"), (N, 4), max(slot, 0), leaf)
    assert RULES[use](Site(Use("w", node, max(slot, 0)), Layout(0), N, parameter, leaf, 2**28)) is None
