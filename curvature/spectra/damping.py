"""How far to trust a step along each eigenvector: damping that is constant, given, or follows the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.spectra.directions import Directions

Damping = float | Tensor | Callable[[Directions], Tensor]


@dataclass(frozen=True)
class NoiseAwareDamping:
    """Less of a step where the mean gradient is mostly noise: `delta_k = delta + (lambda_k + delta) / (N SNR_k)`.

    The mean of N gradients `gamma_nk` has the variance `var_k / N`. The multiple `a` of it that is nearest to the true
    slope in mean square is the fraction of signal in it, `a_k = gamma_k^2 / (gamma_k^2 + var_k / N)`, with the
    estimates of both put in; and `a_k gamma_k / (lambda_k + delta)` is a step damped by `delta_k`. For ever more
    examples it is that of constant damping. This is lapkit's own: ViViT leaves the damping to its user.

    Args:
        base: the constant delta that is left where there is no noise.

    Raises:
        ValueError: if it is not positive.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0], [3.0]])  # mean 2, variance 2: a = 4 / (4 + 1)
        >>> NoiseAwareDamping(1.0)(Directions(torch.tensor([3.0]), gradients, gradients))
        tensor([2.])
    """

    base: float

    def __post_init__(self) -> None:
        positive(self.base)

    def __call__(self, directions: Directions) -> Tensor:
        """The damping of each direction, `(K,)`; infinite along one without any gradient but noise.

        Raises:
            ValueError: if there is a single example, or there are no gradients.
        """
        signal = len(directions.each_gradient) * directions.gradient_snr()
        return self.base + (directions.eigenvalues + self.base) / signal


def positive(damping: float) -> float:
    """A single damping.

    Raises:
        ValueError: if it is not a positive number.
    """
    value = float(damping)
    if not 0 < value < math.inf:
        raise ValueError(f"Damping is a positive number, got {damping}.")
    return value


def resolved(damping: Damping, directions: Directions) -> Tensor:
    """The damping of each of K directions, `(K,)`.

    Args:
        damping: one number, one for each direction, or a function that makes them.
        directions: K of them.

    Returns:
        Positive numbers; an infinite one leaves its direction out.

    Raises:
        TypeError: if it is none of these, or the function returns nothing.
        ValueError: if one is not positive, or their number is another.
    """
    given = damping
    if callable(damping) and not isinstance(damping, type):
        given = damping(directions)
    if isinstance(given, (str, type)) or given is None:
        raise TypeError(
            f"Expected damping that is a positive number, one for each direction, or a function of Directions that "
            f"returns them, such as NoiseAwareDamping(1e-3); got {given!r}"
            f"{' from the function' if given is not damping else ''}."
        )
    like = directions.eigenvalues
    values = torch.as_tensor(given, dtype=like.dtype, device=like.device)
    if values.ndim and values.shape != like.shape:
        raise ValueError(
            f"Expected one damping, or {len(directions)} for as many directions; got shape {tuple(values.shape)}."
        )
    if not (values > 0).all():
        raise ValueError(f"Damping must be positive, got {values.tolist()}.")
    return values.detach().expand(len(directions))
