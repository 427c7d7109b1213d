"""Closed forms of normalisations: the cotangent times the normalised input for a scale, itself for a shift.

The nodes keep the input and its statistics, from which the normalised input is made again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.rules.elementwise import entrywise, times
from lapkit.curvature.rules.site import FromCotangent, Site

WEIGHT = 1  # operands of these nodes: input, weight, bias


def layer_norm(site: Site) -> FromCotangent | None:
    """Statistics of each position, over the last axes."""
    x, mean, scale = (site.saved(n) for n in ("input", "result1", "result2"))
    if None in (x, mean, scale):
        return None
    return _scale_or_shift(site, lambda: (summable(x) - mean) * scale)


def rms_norm(site: Site) -> FromCotangent | None:
    """The same about zero."""
    x, scale = site.saved("input"), site.saved("result1")
    return None if x is None or scale is None else _scale_or_shift(site, lambda: summable(x) * scale)


def group_norm(site: Site) -> FromCotangent | None:
    """Statistics of each example and group of channels."""
    x, mean, scale = (site.saved(n) for n in ("input", "result1", "result2"))
    if None in (x, mean, scale):
        return None

    def normalised() -> Tensor:
        grouped = summable(x).reshape(*mean.shape, -1)  # (N, G, *)
        return ((grouped - mean[..., None]) * scale[..., None]).view(x.shape)

    return _scale_or_shift(site, normalised, channels=True)


def batch_norm(site: Site) -> FromCotangent | None:
    """Running statistics of each channel; an instance norm, which has others, repeats its weights first."""
    x, mean, variance = (site.saved(n) for n in ("input", "running_mean", "running_var"))
    epsilon = site.saved("eps") if site.saved("epsilon") is None else site.saved("epsilon")
    if None in (x, mean, variance, epsilon) or site.saved("training") is not False:
        return None
    scale = (variance + float(epsilon)).rsqrt()

    def normalised() -> Tensor:
        mean_, scale_ = (t.reshape(-1, *[1] * (x.ndim - 2)) for t in (mean, scale))
        return (summable(x) - mean_) * scale_

    return _scale_or_shift(site, normalised, channels=True)


def _scale_or_shift(site: Site, normalised: Callable[[], Tensor], *, channels: bool = False) -> FromCotangent | None:
    """Either operand, which stands beside the last axes or, for channels, beside the second."""
    if not site.whole:
        return None
    shape = (1, *site.operand_shape, *[1] * (len(site.shape) - 2)) if channels else None
    return entrywise(site, times(normalised()) if site.use.slot == WEIGHT else lambda c: c, shape=shape)
