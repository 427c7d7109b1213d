"""The most uncertain examples on a page: small pictures, or rows of features."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_tensor
from lapkit.calibration.report_page import image, table

# Features of an example that a page shows at most.
FEATURES = 12


def are_pictures(inputs: Tensor) -> bool:
    """Whether inputs are `(N, H, W)` or `(N, 1 or 3, H, W)`."""
    return inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[1] in (1, 3))


def examples(
    inputs: Array,
    places: Sequence[int],
    captions: Sequence[Sequence[str]],
    heads: Sequence[str],
    wrong: Sequence[bool],
    names: Sequence[str] | None = None,
) -> str:
    """Examples with what is said about each.

    Args:
        inputs: `(N, H, W)` or `(N, 1 or 3, H, W)` pictures, or features `(N, *)`.
        places: of the examples to show.
        captions: of each, what is said about it.
        heads: what each of these is.
        wrong: which ones are to stand out.
        names: of the features.

    Returns:
        HTML.

    Raises:
        ValueError: if the names are not as many as the features.
    """
    given = as_tensor(inputs).cpu()
    if are_pictures(given):
        tiles = (
            f"<figure>{image(_png(given[place]), 'png', f'example {place}')}<figcaption{_marked(bad)}>"
            f"{'<br>'.join(escape(f'{head}: {word}') for head, word in zip(heads, words, strict=True))}"
            "</figcaption></figure>"
            for place, words, bad in zip(places, captions, wrong, strict=True)
        )
        return f'<div class="tiles">{"".join(tiles)}</div>'
    rows = given.reshape(len(given), -1)[:, :FEATURES]
    if names is not None and len(names) != given[0].numel():
        raise ValueError(f"There are {len(names)} feature_names, expected one for each of {given[0].numel()} features.")
    named = [f"feature {i}" for i in range(given[0].numel())] if names is None else list(names)
    top = ["<th>example</th>", *(f"<th>{escape(head)}</th>" for head in (*heads, *named[:FEATURES]))]
    body = [
        [
            f'<th scope="row">{place}</th>',
            *(f"<td{_marked(bad)}>{escape(word)}</td>" for word in words),
            *(f"<td>{float(value):.4g}</td>" for value in rows[place]),
        ]
        for place, words, bad in zip(places, captions, wrong, strict=True)
    ]
    left_out = given[0].numel() - FEATURES
    return table(top, body) + (
        f'<p class="caption">{left_out} more features are not shown.</p>' if left_out > 0 else ""
    )


def _marked(bad: bool) -> str:
    return ' class="wrong"' if bad else ""


def _png(picture: Tensor) -> bytes:
    """A picture stretched to the range of its pixels."""
    from matplotlib import image as mpl_image  # optional, for pages alone

    pixels = picture.double()
    pixels = pixels.movedim(0, -1).squeeze(-1) if pixels.ndim == 3 else pixels
    low, high = pixels.aminmax()
    scaled = (pixels - low) / (high - low).clamp(min=torch.finfo(pixels.dtype).tiny)
    file = io.BytesIO()
    mpl_image.imsave(file, scaled.numpy(), cmap="gray_r", vmin=0, vmax=1, format="png")
    return file.getvalue()
