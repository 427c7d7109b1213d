"""Gradients and curvatures of single examples along eigenvectors, and how much noise there is in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Directions:
    """What the loss does along K eigenvectors, example by example; plain numbers, free of the model.

    The signs of gradients follow the eigenvectors, which have none of their own.

    Args:
        eigenvalues: `lambda_k`, of the mean curvature, `(K,)`.
        curvatures: `lambda_nk = e_k^T G_n e_k` of the examples with curvature, `(N_c, K)`; their means are
            `lambda_k`.
        gradients: `gamma_nk = e_k^T g_n` of all examples, `(N, K)`; None where they were not wanted.

    Example:
        >>> import torch
        >>> curvatures = torch.tensor([[1.0], [3.0]])
        >>> Directions(torch.tensor([2.0]), curvatures, None).curvature_snr()
        tensor([2.])

    Reference:
        Dangel et al., ViViT, 2022, equation (8) and appendix B.6.
    """

    eigenvalues: Tensor
    curvatures: Tensor
    gradients: Tensor | None

    def __len__(self) -> int:
        return len(self.eigenvalues)

    @property
    def each_gradient(self) -> Tensor:
        """`gamma_nk`, `(N, K)`.

        Raises:
            ValueError: if the analysis was made without gradients.
        """
        if self.gradients is None:
            raise ValueError("The analysis was made with gradients=False. Call vivit with gradients=True.")
        return self.gradients

    @property
    def gradient(self) -> Tensor:
        """The mean gradient along each direction, `gamma_k = e_k^T g`, `(K,)`.

        Raises:
            ValueError: if the analysis was made without gradients.
        """
        return self.each_gradient.mean(0)

    def gradient_snr(self) -> Tensor:
        """Squared mean over sample variance of the gradients, `(K,)`.

        Raises:
            ValueError: if there is a single example, or there are no gradients.
        """
        return signal_to_noise(self.each_gradient)

    def curvature_snr(self) -> Tensor:
        """Squared mean over sample variance of the curvatures, `(K,)`.

        Raises:
            ValueError: if there is a single example with curvature.
        """
        return signal_to_noise(self.curvatures)


def signal_to_noise(samples: Tensor) -> Tensor:
    """`mean^2 / variance` over the first axis, with the unbiased variance; infinite where all agree, 0 where all are 0.

    Args:
        samples: `(N, K)`.

    Returns:
        `(K,)`.

    Raises:
        ValueError: if there are fewer than two samples.

    Reference:
        Dangel et al., ViViT, 2022, appendix B.6.
    """
    if len(samples) < 2:
        raise ValueError(f"A signal-to-noise ratio needs the spread of at least two examples, got {len(samples)}.")
    signal = samples.mean(0).square()
    return torch.where(signal > 0, signal / samples.var(0), 0)
