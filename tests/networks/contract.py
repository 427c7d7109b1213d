"""The networks of the contract tests.

A further one is one more decorated function: it returns the module and a function from a number of examples to inputs.
All are small, because every one is compared with Jacobians computed one example at a time.
"""

import torch
from networks.registry import Model, gaussian
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

NETWORKS = {}


def add(build):
    NETWORKS[build.__name__] = build
    return build


@add
def linear():
    return nn.Linear(4, 3), gaussian(4)


@add
def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), gaussian(4)


@add
def identity_inputs_as_many_as_features():
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)), lambda n: torch.eye(5)[:n]


@add
def in_place_relu():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), gaussian(4)


@add
def dead_relu_layer():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(net[2].bias, -100.0)
    return net, gaussian(4)


@add
def residual():
    return Model(
        lambda m, x: m.head(x + m.skip(m.one(x).tanh()) - 0.5 * m.shift),
        one=nn.Linear(4, 5),
        skip=nn.Linear(5, 4),
        shift=nn.Parameter(torch.randn(4)),
        head=nn.Linear(4, 3),
    ), gaussian(4)


@add
def functional_linear():
    return Model(
        lambda m, x: F.linear(m.one(x).sigmoid(), m.two.weight), one=nn.Linear(4, 5), two=nn.Linear(5, 3, bias=False)
    ), gaussian(4)


@add
def raw_parameters():
    """`x @ W`, and `W @ x` on columns of examples."""
    return Model(
        lambda m, x: (m.left @ (x @ m.right + m.shift).tanh().T).T * m.scale,
        right=nn.Parameter(torch.randn(4, 5)),
        shift=nn.Parameter(torch.randn(5)),
        left=nn.Parameter(torch.randn(3, 5)),
        scale=nn.Parameter(torch.randn(3)),
    ), gaussian(4)


@add
def alpha_and_beta():
    """Scaled sums, in which the factors belong to the operation and not to a tensor."""
    return Model(
        lambda m, x: torch.addmm(torch.add(m.b, m.c, alpha=2), x, m.w, beta=0.5, alpha=3) - m.d.mul(2),
        w=nn.Parameter(torch.randn(4, 3)),
        b=nn.Parameter(torch.randn(3)),
        c=nn.Parameter(torch.randn(3)),
        d=nn.Parameter(torch.randn(())),
    ), gaussian(4)


@add
def alpha_and_beta_beside_parameters():
    """The same where the parameter itself is the operand."""

    def forward(m, x):
        h = torch.addmm(m.b, x, m.w, beta=0.5)
        return torch.sub(torch.add(h, m.c, alpha=2).tanh(), m.d, alpha=3) + torch.sub(m.e, h, alpha=0.5)

    shifts = {name: nn.Parameter(torch.randn(3)) for name in "bcde"}
    return Model(forward, w=nn.Parameter(torch.randn(4, 3)), **shifts), gaussian(4)


@add
def transposed_views():
    """All ways to write a transpose, and two that are none."""

    def forward(m, x):
        one = x @ m.t.t() + x @ m.a.transpose(0, 1) + x @ m.b.transpose(-1, -2) + x @ m.c.mT + x @ m.d.permute(1, 0)
        return one + x @ m.e.permute(0, 1) + x @ m.f.transpose(1, -1) + (m.g.transpose(0, 1) @ x.T).T

    return Model(forward, **{name: nn.Parameter(torch.randn(4, 4)) for name in "tabcdefg"}), gaussian(4)


@add
def conv1d():
    return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), gaussian(
        2, 7
    )


@add
def conv2d_stride_dilation_groups():
    return nn.Sequential(
        nn.Conv2d(4, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0), groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ), gaussian(4, 6, 6)


@add
def conv2d_depthwise_same():
    return nn.Sequential(
        nn.Conv2d(3, 6, (1, 3), padding="same", groups=3, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ), gaussian(3, 4, 4)


@add
def conv2d_circular():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    ), gaussian(2, 4, 4)


@add
def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
    ), gaussian(2, 3, 4, 3)


@add
def conv_transposed():
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    ), gaussian(2, 2, 2)


@add
def batch_norm():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    )
    for norm in (net[1], net[5]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return net, gaussian(2, 4, 4)


@add
def layer_and_group_norm_prelu():
    return nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
        nn.PReLU(),
    ), gaussian(2, 3, 3)


@add
def sequence_pooled():
    return Model(lambda m, x: m.head(m.one(x).tanh().mean(1)), one=nn.Linear(3, 4), head=nn.Linear(4, 3)), gaussian(
        5, 3
    )


@add
def time_major():
    """Examples are interleaved: row t N + n belongs to example n."""
    return Model(
        lambda m, x: m.head(m.one(x.transpose(0, 1)).tanh().sum(0)), one=nn.Linear(3, 4), head=nn.Linear(4, 3)
    ), gaussian(5, 3)


@add
def examples_in_the_middle():
    """Rows of the flattened (S, N, T) are blocks of each example, several times over."""
    return Model(
        lambda m, x: m.head(m.one(x.transpose(0, 1)).tanh().sum((0, 2))), one=nn.Linear(3, 4), head=nn.Linear(4, 3)
    ), gaussian(2, 3, 3)


@add
def weight_used_twice():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)), gaussian(4)


@add
def tied_autoencoder():
    return Model(
        lambda m, x: F.linear(m.one(x).tanh(), m.one.weight.t(), m.shift),
        one=nn.Linear(3, 5),
        shift=nn.Parameter(torch.randn(3)),
    ), gaussian(3)


@add
def embedding_and_attention():
    return Model(
        lambda m, x: m.head(m.mix(*[m.embed(x)] * 3, need_weights=False)[0].mean(1)),
        embed=nn.Embedding(7, 4),
        mix=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    ), lambda n: torch.randint(7, (n, 5))


@add
def attention_weights_asked_for():
    """The path without a fused kernel, time first."""
    return Model(
        lambda m, x: m.head(m.mix(*[x.transpose(0, 1)] * 3)[0].mean(0)),
        mix=nn.MultiheadAttention(4, 2),
        head=nn.Linear(4, 3),
    ), gaussian(5, 4)


@add
def scaled_dot_product():
    def attend(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return m.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    return Model(attend, qkv=nn.Linear(3, 12), head=nn.Linear(4, 3)), gaussian(4, 3)


@add
def transformer_layer():
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    return Model(lambda m, x: m.head(m.layer(x)[:, 0]), layer=layer, head=nn.Linear(4, 3)), gaussian(3, 4)


@add
def tied_embedding_and_head():
    embed = nn.Embedding(5, 4)
    return Model(
        lambda m, x: m.one(m.embed(x).mean(1)).tanh() @ m.embed.weight.T, embed=embed, one=nn.Linear(4, 4)
    ), lambda n: torch.randint(5, (n, 3))


@add
def weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), gaussian(4)


@add
def orthogonal():
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)), gaussian(4)


@add
def merged_low_rank():
    return Model(
        lambda m, x: m.head(F.linear(x, m.w + m.b @ m.a).tanh()),
        w=nn.Parameter(torch.randn(5, 4)),
        b=nn.Parameter(torch.randn(5, 2)),
        a=nn.Parameter(torch.randn(2, 4)),
        head=nn.Linear(5, 3),
    ), gaussian(4)


@add
def lstm():
    return Model(
        lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 3)
    ), gaussian(3, 2)


@add
def lstm_state():
    """Read through a state, which is not the first output of a fused kernel."""
    return Model(
        lambda m, x: m.head(m.cell(x)[1][1][0]), cell=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 3)
    ), gaussian(3, 2)


@add
def gru():
    return Model(
        lambda m, x: m.head(m.cell(x)[0].mean(1)),
        cell=nn.GRU(2, 3, batch_first=True, bidirectional=True),
        head=nn.Linear(6, 3),
    ), gaussian(3, 2)


@add
def single_output_vector():
    """Outputs (N,) count as (N, 1)."""
    return Model(lambda m, x: m.head(m.one(x).tanh())[:, 0], one=nn.Linear(4, 5), head=nn.Linear(5, 1)), gaussian(4)


@add
def bilinear_and_einsum():
    return Model(
        lambda m, x: torch.einsum("ni,oij,nj->no", x, m.w, x) + m.two(x, x),
        w=nn.Parameter(torch.randn(3, 2, 2)),
        two=nn.Bilinear(2, 2, 3),
    ), gaussian(2)
