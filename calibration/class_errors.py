"""Calibration errors over all classes: classwise, debiased, adaptive and thresholded."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from lapkit.calibration.binning import Binning
from lapkit.calibration.classwise import ClasswiseEqualMass, Curves, classwise_reliability_curves
from lapkit.calibration.inputs import Array

Reduction: TypeAlias = Literal["mean", "sum"]


def classwise_calibration_error(
    probabilities: Array,
    labels: Array,
    *,
    order: float = 1,
    bins: int = 15,
    binning: Binning = "equal_width",
    reduction: Reduction = "mean",
) -> float:
    """Calibration error over all classes: of order 1 the classwise ECE (static calibration error).

        ( 1/C sum_k sum_m w_km |acc_km - conf_km|^q )^(1/q)

    With many classes nearly all probabilities are nearly zero, and the mean hides the error: `reduction="sum"` leaves
    out the 1/C. Of order 2 it is Kumar's marginal calibration error.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        order: the order q, finite and at least 1.
        bins: number of bins M.
        binning: "equal_width" or "equal_mass".
        reduction: "mean" or "sum" over the classes.

    Returns:
        The error; of the mean in [0, 1].

    Raises:
        ValueError: the order or the reduction is unknown.

    Reference:
        Nixon et al. (2019), Measuring calibration in deep learning, equation 4 (SCE); Kull et al. (2019), Beyond
        temperature scaling (classwise ECE); Kumar, Liang and Ma (2019), definition 2.4.
    """
    if not 1 <= order < float("inf"):
        raise ValueError(f"order is {order}, expected a finite one of at least 1. For maxima take each curve's mce.")
    curves = classwise_reliability_curves(probabilities, labels, bins=bins, binning=binning)
    powers = [curve.calibration_error(order) ** order for curve in curves]
    return _reduced(powers, reduction) ** (1 / order)


def debiased_classwise_calibration_error(
    probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_mass"
) -> float:
    """The marginal calibration error of order 2, less what chance adds to it.

        sqrt( 1/C sum_k max(0, sum_m w_km ( (acc_km - conf_km)^2 - acc_km (1 - acc_km) / (n_km - 1) )) )

    Each class is cut off at zero by itself, as in the authors' code, which leaves a little bias where classes are many.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        binning: "equal_mass" or "equal_width".

    Returns:
        The error, in [0, 1].

    Reference:
        Kumar, Liang and Ma (2019), Verified uncertainty calibration, definitions 2.4 and 5.1.
    """
    curves = classwise_reliability_curves(probabilities, labels, bins=bins, binning=binning)
    return _reduced([max(0.0, curve.debiased_squared_error) for curve in curves], "mean") ** 0.5


def adaptive_calibration_error(probabilities: Array, labels: Array, *, bins: int = 15) -> float:
    """Adaptive calibration error (ACE): the mean gap over classes and bins of equal count.

        1/(C M) sum_k sum_m |acc_km - conf_km|

    Bins that stay empty do not count; equal probabilities share a bin. The average calibration error of the same
    initials is `ReliabilityCurve.average_calibration_error`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.

    Returns:
        The error, in [0, 1].

    Reference:
        Nixon et al. (2019), Measuring calibration in deep learning, equation 5.
    """
    return _mean_gap(ClasswiseEqualMass(bins)(probabilities, labels))


def thresholded_adaptive_calibration_error(
    probabilities: Array, labels: Array, *, bins: int = 15, threshold: float = 1e-3
) -> float:
    """Thresholded adaptive calibration error (TACE): ACE of the probabilities above a threshold.

    Of each class the probabilities above it are put into bins of equal count; classes that have none do not count.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        bins: number of bins M.
        threshold: in [0, 1).

    Returns:
        The error, in [0, 1].

    Raises:
        ValueError: the threshold is outside [0, 1), or no probability is above it.

    Reference:
        Nixon et al. (2019), Measuring calibration in deep learning, section 3.3.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}, expected one from 0 to less than 1, such as 0.001.")
    curves = ClasswiseEqualMass(bins, threshold)(probabilities, labels)
    if not curves:
        raise ValueError(f"threshold is {threshold}, and no probability is above it. Take a smaller one.")
    return _mean_gap(curves)


def _mean_gap(curves: Curves) -> float:
    gaps = [(curve.accuracy - curve.confidence).abs()[curve.count > 0] for curve in curves]
    return torch.cat(gaps).mean().item()


def _reduced(values: list[float], reduction: Reduction) -> float:
    scales = {"mean": len(values), "sum": 1}
    if reduction not in scales:
        raise ValueError(f"reduction is {reduction!r}, expected 'mean' or 'sum'.")
    return sum(values) / scales[reduction]
