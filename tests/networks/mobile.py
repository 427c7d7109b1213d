"""ConvNeXt and the mobile networks: depthwise convolutions, gates, norms over channels."""

import torch
from networks.vision import conv_norm
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `(N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: a wide depthwise convolution, then a two-layer perceptron over channels, scaled by gamma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.mlp(out)).permute(0, 3, 1, 2)


def convnext(width: int = 4, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4),
        ChannelNorm(width),
        ConvNeXtBlock(width),
        ChannelNorm(width),
        nn.Conv2d(width, 2 * width, 2, 2),
        ConvNeXtBlock(2 * width),
        nn.AdaptiveAvgPool2d(1),
        ChannelNorm(2 * width),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class SqueezeExcite(nn.Module):
    """Hu et al. 2017: channels scaled by a gate computed from their means."""

    def __init__(self, width: int, hidden: int, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.inner, self.gate = inner, gate

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(self.inner(self.reduce(pooled))))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: widen, filter each channel, squeeze and excite, narrow; a skip where the shape stays."""

    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, activation: nn.Module, excite: nn.Module):
        super().__init__()
        self.expand = nn.Sequential(conv_norm(inputs, wide, 1), activation)
        self.depthwise = nn.Sequential(conv_norm(wide, wide, 3, stride, groups=wide), activation)
        self.excite, self.project = excite, conv_norm(wide, outputs, 1)
        self.drop_path = nn.Dropout(0.2)  # the identity in eval mode, like stochastic depth
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + self.drop_path(out) if self.skip else out


def mobilenet_v3(width: int = 4, classes: int = 3) -> nn.Sequential:
    """Howard et al. 2019: hard swish, hard sigmoid gates, a ReLU block first."""

    def block(inputs: int, outputs: int, stride: int, activation: nn.Module) -> InvertedResidual:
        wide = 2 * inputs
        excite = SqueezeExcite(wide, max(2, wide // 4), nn.ReLU(inplace=True), nn.Hardsigmoid())
        return InvertedResidual(inputs, wide, outputs, stride, activation, excite)

    swish = nn.Hardswish(inplace=True)
    return nn.Sequential(
        conv_norm(3, width, 3, 2),
        swish,
        block(width, width, 1, nn.ReLU(inplace=True)),
        block(width, 2 * width, 2, swish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3 * width),
        swish,
        nn.Dropout(0.2),
        nn.Linear(3 * width, classes),
    )


def efficientnet(width: int = 4, classes: int = 3) -> nn.Sequential:
    """Tan and Le 2019: mobile blocks with SiLU and sigmoid gates."""

    def block(inputs: int, outputs: int, stride: int) -> InvertedResidual:
        excite = SqueezeExcite(3 * inputs, max(1, inputs // 4), nn.SiLU(), nn.Sigmoid())
        return InvertedResidual(inputs, 3 * inputs, outputs, stride, nn.SiLU(inplace=True), excite)

    return nn.Sequential(
        conv_norm(3, width, 3, 2),
        nn.SiLU(inplace=True),
        block(width, width, 1),
        block(width, 2 * width, 2),
        conv_norm(2 * width, 3 * width, 1),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3 * width, classes),
    )
