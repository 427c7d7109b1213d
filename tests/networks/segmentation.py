"""A class for each pixel."""

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(2, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=2, dilation=2, bias=False),
            nn.GroupNorm(2, outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015: down, up by transposed convolutions, with skips; a class for each pixel."""

    def __init__(self, width: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.enter, self.down = DoubleConv(1, width), DoubleConv(width, 2 * width)
        self.bottom, self.pool = DoubleConv(2 * width, 4 * width), nn.MaxPool2d(2)
        self.rise = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([DoubleConv(4 * width, 2 * width), DoubleConv(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, H, W) -> (N, classes, H, W)
        high = self.enter(x)
        low = self.down(self.pool(high))
        x = self.bottom(self.pool(low))
        for skip, rise, up in zip((low, high), self.rise, self.up, strict=True):
            x = up(torch.cat([skip, rise(x)], 1))
        return self.head(x)
