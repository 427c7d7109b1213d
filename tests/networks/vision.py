"""Image classifiers of the literature, narrowed to some thousand weights but with every kind of layer they have.

All are written for a width, so that the same function gives a test's network and a real one.
"""

import torch
from torch import Tensor, nn


def net_3c3d(width: int = 1, classes: int = 3) -> nn.Sequential:
    """DeepOBS's 3c3d for images 3 x 32 x 32; the original has width 32, 16 hidden units per width, 10 classes."""
    one, two, three = 2 * width, 3 * width, 4 * width
    return nn.Sequential(
        nn.Conv2d(3, one, 5),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(one, two, 3),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.MaxPool2d(3, 2),
        nn.ZeroPad2d((1, 1, 1, 1)),
        nn.Conv2d(two, three, 3),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(9 * three, 16 * width),
        nn.ReLU(),
        nn.Linear(16 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )


def all_cnn_c(width: int = 3, classes: int = 3) -> nn.Sequential:
    """Springenberg et al. 2014: nine convolutions, strides in place of pooling; the original has width 96."""
    plan = [
        (3, width, 3, 1),
        (width, width, 3, 1),
        (width, width, 3, 2),
        (width, 2 * width, 3, 1),
        (2 * width, 2 * width, 3, 1),
        (2 * width, 2 * width, 3, 2),
        (2 * width, 2 * width, 3, 1),
        (2 * width, 2 * width, 1, 1),
        (2 * width, classes, 1, 1),
    ]
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in plan:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.ReLU()]
    for conv in layers[::2]:  # torch's own initialisation would leave the last ReLU of so narrow a network at zero
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.constant_(conv.bias, 0.2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """`relu(body(x) + skip(x))`, He et al. 2015; the skip is a projection where the shape changes."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.skip = (
            nn.Identity() if (inputs, stride) == (outputs, 1) else conv_norm(inputs, outputs, kernel=1, stride=stride)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.skip(x)  # in place, as the reference implementation does
        return self.relu(out)


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(conv_norm(inputs, width, 3, stride), nn.ReLU(inplace=True), conv_norm(width, width))
    return Residual(body, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(
        conv_norm(inputs, width, 1),
        nn.ReLU(inplace=True),
        conv_norm(width, width, 3, stride),
        nn.ReLU(inplace=True),
        conv_norm(width, 4 * width, 1),
    )
    return Residual(body, inputs, 4 * width, stride)


def resnet(width: int = 4, classes: int = 3, *, deep: bool = False) -> nn.Sequential:
    """Two stages of residual blocks, of two or (`deep`) three convolutions each."""
    block, expansion = (bottleneck, 4) if deep else (basic_block, 1)
    return nn.Sequential(
        conv_norm(3, width, 7 if deep else 3, 2 if deep else 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        block(width, width, 1),
        block(width * expansion, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width * expansion, classes),
    )


class DenseBlock(nn.Module):
    """Huang et al. 2017: every layer sees the features of all before it."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(inputs + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet(width: int = 3, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 2 * width, 3, stride=2, padding=1, bias=False),
        DenseBlock(2 * width, width, 2),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.Conv2d(4 * width, 2 * width, 1, bias=False),
        nn.AvgPool2d(2),
        DenseBlock(2 * width, width, 2),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
