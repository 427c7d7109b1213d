"""Sequential networks for Hessian backpropagation, and the dense matrices of their losses by autograd."""

import torch
from oracles import ggn, jacobian, output_hessian
from torch import nn
from torch.func import functional_call, hessian

from lapkit.curvature import Residual

MODES = ("hessian", "ggn", "pch-abs", "pch-clip")
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Bump(nn.Module):
    """A user's own elementwise function."""

    def forward(self, x):
        return x * torch.exp(-x.square() / 2)


class Named(nn.Module):
    """A container whose forward pass is the chain of its modules, with others in lists."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 4))])
        self.act = nn.Sigmoid()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for part in self.body:
            x = part(x)
        return self.head(self.act(x))


class Gate(nn.Module):
    """No chain, with weights: as one stage among others it is treated as a whole."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.one(x).tanh() * torch.sigmoid(self.two(x))


def batch_norm(features):
    norm = nn.BatchNorm1d(features)
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


# Every module acts elementwise or is piecewise linear.
ELEMENTWISE = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), (4,)),
    "own activation": lambda: (nn.Sequential(nn.Linear(4, 5), Bump(), nn.Linear(5, 3), nn.Softplus()), (4,)),
    "sigmoid at the end": lambda: (nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), Bump()), (2,)),
    "nested": lambda: (
        nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.SiLU()), nn.Sequential(nn.Sequential(nn.Linear(5, 3)))),
        (4,),
    ),
    "groups, padding, pooling": lambda: (
        nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.ELU(inplace=True), nn.ZeroPad2d(1),
            nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3),
        ),
        (4, 4, 4),
    ),
    "max pooling": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Identity(), nn.Linear(6, 3)),
        (2, 6),
    ),
    "three dimensions": lambda: (
        nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool3d((1, 2, 1)), nn.Flatten(), nn.Linear(4, 3)),
        (2, 3, 3, 3),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Sigmoid(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        (2, 2, 2),
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(4, 5), batch_norm(5), nn.Tanh(), nn.Linear(5, 3), batch_norm(3)),
        (4,),
    ),
}  # fmt: skip
PIECEWISE_LINEAR = {
    "relu": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)),
        (4,),
    ),
    "relu convolution": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)),
        (2, 4, 4),
    ),
    "hard": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(), nn.PReLU(6), nn.Linear(6, 3)), (4,)),
}
SKIPS = {
    "skip": lambda: (
        nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), Residual(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4)), nn.Linear(4, 3)
        ),
        (3,),
    ),
    "nested skips": lambda: (
        nn.Sequential(
            Residual(nn.Linear(3, 3), nn.Tanh(), Residual(nn.Linear(3, 3), Bump()), nn.Tanh()),
            Residual(nn.ELU(inplace=True)),
            nn.Linear(3, 3),
        ),
        (3,),
    ),
}
OTHERS = {
    "container": lambda: (Named(), (4,)),
    "single layer": lambda: (nn.Linear(4, 3), (4,)),
    "layer norm": lambda: (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "softmax inside": lambda: (nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 3)), (4,)),
}
WHOLE = {"gate": lambda: (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Gate(), nn.Linear(4, 3)), (4,))}
POSITIVE = {**ELEMENTWISE, **PIECEWISE_LINEAR, **SKIPS, **OTHERS}
EVERY = {**POSITIVE, **WHOLE}


def problem(build, examples=4):
    model, shape = build()
    model.eval()
    x = torch.randn(examples, *shape)
    return model, x, torch.arange(examples) % model(x).shape[1]


def diagonal_blocks(matrix, parameters):
    ends = torch.tensor(parameters.sizes).cumsum(0).tolist()
    return [matrix[b - s : b, b - s : b] for s, b in zip(parameters.sizes, ends, strict=True)]


def autograd_hessian(model, likelihood, x, y):
    """The full Hessian of the summed loss, `(P, P)`."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return likelihood.loss(functional_call(model, values, (x.clone(),)), y).sum()

    return hessian(loss)(torch.cat([p.flatten() for p in named.values()]))


def dense_ggn(model, likelihood, x, y):
    J = jacobian(model, x)
    return ggn(J, output_hessian(lambda f, t: likelihood.loss(f[None], t[None])[0], model(x), y))


def check_blocks(blocks, wanted, parameters):
    for (name, found), block in zip(blocks.blocks.items(), diagonal_blocks(wanted, parameters), strict=True):
        torch.testing.assert_close(found[0], block, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
