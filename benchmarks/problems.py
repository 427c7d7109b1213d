"""The networks and batches of the benchmarks, and one gradient pass, the unit of their times."""

import itertools

import torch
from torch import nn


def conv_net():
    """3c3d of DeepOBS: 895,210 weights for images 3 x 32 x 32."""
    pool = lambda: (nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), *pool(), nn.Conv2d(64, 96, 3), *pool(), nn.ZeroPad2d(1), nn.Conv2d(96, 128, 3), *pool()),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp(width=512):
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 10))


class Transformer(nn.Module):
    def __init__(self, width=128, layers=6, classes=10):
        super().__init__()
        make = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)  # noqa: E731
        self.blocks = nn.Sequential(*(make() for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


class Encoder(nn.Module):
    """A transformer's layer whose weights are all in `nn.Linear`, which is what other libraries read."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norms[0](x)
        parts = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class LinearTransformer(nn.Module):
    """A classifier of 16 tokens of 16 features: 201,000 weights."""

    def __init__(self, width=64, layers=4):
        super().__init__()
        self.embedding, self.blocks = nn.Linear(16, width), nn.Sequential(*(Encoder(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x))).mean(1))


class Residual(nn.Module):
    """The block of a ResNet for small images."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.third, self.fourth = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return (self.fourth(self.third(self.second(self.first(x)).relu())) + self.shortcut(x)).relu()


def resnet():
    """ResNet-20: 272,000 weights for images 3 x 32 x 32."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = (Residual(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(widths))
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


PROBLEMS = {
    "3c3d": (conv_net, lambda: torch.randn(128, 3, 32, 32)),
    "MLP": (mlp, lambda: torch.randn(128, 784)),
    "transformer": (Transformer, lambda: torch.randn(32, 32, 128)),
}


def make_problem(name, device="cpu"):
    """Model in eval mode, inputs and classes, the same for every call."""
    make, inputs = PROBLEMS[name]
    torch.manual_seed(0)
    model, x = make().to(device).eval(), inputs().to(device)
    return model, x, torch.randint(0, 10, (len(x),), device=device)


def gradient_pass(model, x, y, parameters=None):
    parameters = list(model.parameters()) if parameters is None else parameters
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
