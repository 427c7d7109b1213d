"""The networks and batches of the benchmarks, and one gradient pass, the unit of their times."""

import torch
from torch import nn


def conv_net():
    """3c3d of DeepOBS: 895,210 weights for images 3 x 32 x 32."""
    pool = lambda: (nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), *pool(), nn.Conv2d(64, 96, 3), *pool(), nn.ZeroPad2d(1), nn.Conv2d(96, 128, 3), *pool()),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


class Transformer(nn.Module):
    def __init__(self, width=128, layers=6, classes=10):
        super().__init__()
        make = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)  # noqa: E731
        self.blocks = nn.Sequential(*(make() for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


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
