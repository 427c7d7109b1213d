"""Vision transformers and mixers: tokens of images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention, queries, keys and values from one packed weight; by the fused kernel or by hand."""

    def __init__(self, width: int, heads: int, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (N, T, D), scores + bias
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            out = (scores if bias is None else scores + bias).softmax(-1) @ v
        return self.project(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norm first: `x + attention(norm(x))`, `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int, *, fused: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused=fused)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020: patches, a class token, learned positions."""

    def __init__(self, width: int = 8, classes: int = 3, size: int = 8, patch: int = 4, *, fused: bool = True) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, 2, fused=fused) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def windows(x: Tensor, side: int) -> Tensor:
    """`(N, H, W, D)` to `(N windows, side^2, D)`: the windows of an example become examples of a batch."""
    n, h, w, d = x.shape
    return x.view(n, h // side, side, w // side, side, d).transpose(2, 3).reshape(-1, side * side, d)


def images(x: Tensor, side: int, h: int, w: int) -> Tensor:
    """The inverse of `windows`."""
    return x.view(-1, h // side, w // side, side, side, x.shape[-1]).transpose(2, 3).reshape(-1, h, w, x.shape[-1])


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each relative position and a mask where windows wrap."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        row, column = place[:, :, None] - place[:, None, :] + side - 1
        self.register_buffer("index", row * (2 * side - 1) + column)

    def mask(self, h: int, w: int) -> Tensor:
        """`(windows, side^2, side^2)`, minus a hundred between regions that only the roll made neighbours."""
        region = torch.zeros(1, h, w, 1)
        cuts = (slice(0, -self.side), slice(-self.side, -self.shift), slice(-self.shift, None))
        for i, rows in enumerate(cuts):
            for j, columns in enumerate(cuts):
                region[:, rows, columns] = 3 * i + j
        region = windows(region, self.side)[..., 0]
        return -100.0 * (region[:, :, None] != region[:, None, :])

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, D)
        h, w = x.shape[1:3]
        x = windows(torch.roll(x, (-self.shift, -self.shift), (1, 2)), self.side)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N windows, heads, side^2, side^2)
        scores = scores + self.bias_table[self.index.flatten()].view(*self.index.shape, -1).permute(2, 0, 1)[None]
        if self.shift:
            mask = self.mask(h, w)
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        x = self.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return torch.roll(images(x, self.side, h, w), (self.shift, self.shift), (1, 2))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, side, shift)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """Liu et al. 2021: attention in windows, shifted in every second block."""

    def __init__(self, width: int = 4, classes: int = 3, side: int = 2) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(2 * width)
        self.body = nn.Sequential(
            SwinBlock(width, 2, side, 0),
            SwinBlock(width, 2, side, side // 2),
            PatchMerging(width),
            SwinBlock(2 * width, 2, side, 0),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.embed(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class MixerBlock(nn.Module):
    """Tolstikhin et al. 2021: one perceptron over the tokens, one over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 6, classes: int = 3, size: int = 8, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*[MixerBlock((size // patch) ** 2, width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))
