"""The reference's loss of classes for grid searches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class RunningNLLMetric:
    """The mean negative log likelihood over batches, with the methods of a metric of torchmetrics.

    Args:
        ignore_index: targets that do not count.

    Example:
        >>> import torch
        >>> metric = RunningNLLMetric()
        >>> float(metric(torch.tensor([[0.5, 0.5]]), torch.tensor([1])))
        0.6931471824645996
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.nll_sum, self.n_valid_labels = torch.zeros(()), torch.zeros(())

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """See a batch.

        Args:
            probs: probabilities `(*, C)`.
            targets: classes `(*)`.
        """
        log_p, y = probs.flatten(0, -2).log(), targets.flatten()
        self.nll_sum = self.nll_sum.to(log_p) + F.nll_loss(log_p, y, ignore_index=self.ignore_index, reduction="sum")
        self.n_valid_labels = self.n_valid_labels.to(log_p) + (y != self.ignore_index).sum()

    def compute(self) -> Tensor:
        """The mean over all batches since the last `reset`."""
        return self.nll_sum / self.n_valid_labels

    def __call__(self, probs: Tensor, targets: Tensor) -> Tensor:
        """The mean of this batch, which is seen as by `update`."""
        of_batch = type(self)(self.ignore_index)
        of_batch.update(probs, targets)
        self.update(probs, targets)
        return of_batch.compute()
