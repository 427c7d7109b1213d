"""Is a predictive distribution as sure as it should be? Probabilities and labels in, numbers and curves out.

Scores (accuracy, negative log-likelihood, Brier), reliability (binned calibration errors and the reliability
diagram) and detection (does the uncertainty tell data from outside the training distribution apart?). The
folder knows nothing of Laplace approximations: any classifier's probabilities will do, as torch tensors or
numpy arrays. Everything is computed in float64 on the device of the probabilities.
"""

from lapkit.calibration.detection import auroc, entropy
from lapkit.calibration.reliability import (
    ReliabilityCurve,
    event_reliability_curve,
    expected_calibration_error,
    reliability_curve,
)
from lapkit.calibration.scores import accuracy, brier, nll, nll_from_logits

__all__ = [
    "ReliabilityCurve",
    "accuracy",
    "auroc",
    "brier",
    "entropy",
    "event_reliability_curve",
    "expected_calibration_error",
    "nll",
    "nll_from_logits",
    "reliability_curve",
]
