"""Detection: does the uncertainty tell inputs from outside the training distribution from those inside?"""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_probabilities, as_scores


def auroc(in_distribution: Array, out_of_distribution: Array) -> float:
    """Area under the ROC curve; out-of-distribution examples are the positive class and should score higher.

        P(s_out > s_in) + 1/2 P(s_out = s_in)

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        in_distribution: `(N,)` scores of examples from the training distribution; higher means more
            out-of-distribution, as do `entropy` and one minus the top probability.
        out_of_distribution: `(M,)` scores of examples from outside.

    Returns:
        The area: 1 for perfect separation, 1/2 for chance, 0 for perfect separation the wrong way round.

    Example:
        >>> auroc(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.5, 0.9]))
        0.9167

    Reference:
        Hanley and McNeil (1982), The meaning and use of the area under a ROC curve; as an out-of-distribution
        score: Hendrycks and Gimpel (2017), A baseline for detecting misclassified and out-of-distribution
        examples.
    """
    # Half a second of imports, for this function alone.
    from sklearn.metrics import roc_auc_score

    inside = as_scores(in_distribution, "in_distribution").cpu()
    outside = as_scores(out_of_distribution, "out_of_distribution").cpu()
    is_outside = torch.cat((torch.zeros(len(inside)), torch.ones(len(outside))))
    return float(roc_auc_score(is_outside.numpy(), torch.cat((inside, outside)).numpy()))


def entropy(probabilities: Array) -> Tensor:
    """Entropy of each example's class probabilities, in nats.

        H_n = -sum_k p_nk log p_nk,    0 log 0 = 0

    Of a posterior mean of probabilities it is the total uncertainty, aleatoric and epistemic together.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.

    Returns:
        The entropies `(N,)` in nats, between 0 and log C, float64.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931], dtype=torch.float64)

    Reference:
        C. E. Shannon (1948), A mathematical theory of communication, section 6.
    """
    return torch.special.entr(as_probabilities(probabilities)).sum(dim=1)
