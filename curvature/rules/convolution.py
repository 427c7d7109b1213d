"""Closed forms of convolutions: patches of what went in against what came back, in one to three dimensions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import DenseJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.jacobians.patches import Patches
from lapkit.curvature.rules.site import FromCotangent, Site


def convolution_weight(site: Site) -> FromCotangent | None:
    """Patches of the input against cotangents at the output positions, a group at a time; one to three dimensions."""
    x = site.saved("input")
    if x is None or site.layout.axis != 0 or not site.whole:
        return None
    if site.saved("transposed"):
        return _transposed_weight(site, x.detach())
    a = _patches(site, x.detach())

    def jacobian(c: Tensor) -> OuterProduct:
        g = site.canonical(c.flatten(3).unflatten(2, (a.groups, -1)))  # (K, N, R, G, O, L)
        return OuterProduct(a, g.permute(0, 1, 2, 5, 3, 4).flatten(2, 3), budget=site.budget)

    return jacobian


def _patches(site: Site, x: Tensor) -> Patches:
    """What a convolution sees of its input `(N R, channels, *spatial)`."""
    stride, padding, dilation = (tuple(map(int, site.saved(n))) for n in ("stride", "padding", "dilation"))
    x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    x = site.layout.canonical(x[None], site.examples)[0]
    patches = Patches(x, tuple(site.operand_shape[2:]), stride, dilation, int(site.saved("groups")))
    # Kept for all columns where that is cheap; else cut out again for each, a few examples at a time.
    return replace(patches, kept=patches.nbytes <= site.budget // 16)


def _transposed_weight(site: Site, x: Tensor) -> FromCotangent:
    """The roles are exchanged: inputs at their positions against patches of the cotangent, which they were spread over.

    The weight is stored as inputs x outputs, a patch of the cotangent being the outputs of one input position.
    """
    kernel = tuple(site.operand_shape[2:])
    stride, padding, dilation = (tuple(map(int, site.saved(n))) for n in ("stride", "padding", "dilation"))
    groups = int(site.saved("groups"))
    # What the output gained or lost at its borders is undone, so that each input position has one patch.
    around: list[int] = []
    for i, (before, length) in enumerate(zip(padding, x.shape[2:], strict=True)):
        spread = (length - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        around = [before, spread - before - site.shape[2 + i], *around]
    a = site.canonical_input(x).flatten(3).unflatten(2, (groups, -1))  # (N, R, G, I, L)
    a = a.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (N, T, G, I)

    def jacobian(c: Tensor) -> OuterProduct:
        padded = torch.nn.functional.pad(site.canonical(c), around).flatten(0, 1)  # (K N, R, channels, *spatial)
        g = Patches(padded, kernel, stride, dilation, groups)[:].unflatten(0, (len(c), -1))
        return OuterProduct(a, g, transposed=True, budget=site.budget)

    return jacobian


def convolution_bias(site: Site) -> FromCotangent | None:
    """One number a channel, summed over positions: exact, where peers also approximate the bias."""
    if site.layout.axis != 0 or not site.whole:
        return None
    return lambda c: DenseJacobian(site.canonical(c.flatten(3)).sum((2, 4)))
