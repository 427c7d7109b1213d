"""Is a predictive distribution as sure as it should be? Predictions and targets in, numbers and curves out.

Scores (accuracy, negative log-likelihood, Brier score and its decompositions), reliability (calibration errors by bins
or kernels, with what chance adds to them), detection (does the uncertainty tell data from outside the training
distribution apart?), selective prediction, uncertainty from samples, regression, recalibration. Every metric goes
through data in batches as well, by `Streaming`. The folder knows nothing of Laplace approximations: the predictions of
any model will do, as torch tensors or numpy arrays. Everything is computed in float64 on the device of the predictions.
"""

from lapkit.calibration.affine_scaling import PlattScaling, VectorScaling
from lapkit.calibration.binned_recalibration import HistogramBinning, IsotonicRecalibration
from lapkit.calibration.class_errors import (
    adaptive_calibration_error,
    classwise_calibration_error,
    debiased_classwise_calibration_error,
    thresholded_adaptive_calibration_error,
)
from lapkit.calibration.classwise import ClasswiseEqualMass, ClasswiseReliability, classwise_reliability_curves
from lapkit.calibration.conformal import ConformalSets
from lapkit.calibration.conformal_intervals import ConformalBounds, ConformalIntervals
from lapkit.calibration.corp import (
    ClasswiseCorp,
    Corp,
    ScoreDecomposition,
    brier_decomposition,
    event_score_decomposition,
)
from lapkit.calibration.curves import ReliabilityCurve
from lapkit.calibration.debiased import debiased_calibration_error, sweep_calibration_error, swept_error
from lapkit.calibration.detection import AveragePrecision, FalsePositiveRate, aupr, auroc, fpr_at_tpr, ranked_auroc
from lapkit.calibration.forecasts import Samples
from lapkit.calibration.intervals import BootstrapInterval, ConsistencyTest, bootstrap_interval, consistency_test
from lapkit.calibration.metrics import Mean, Metric, RowMetric, SumMetric
from lapkit.calibration.murphy import Murphy, MurphyDecomposition, murphy_decomposition
from lapkit.calibration.pairs import Ranked, event, flagged, top_label
from lapkit.calibration.per_example import TopKCorrect, brier_scores, correct, log_losses, log_losses_from_logits
from lapkit.calibration.pit import PITCounts, PITDistance, PITHistogram, pit, pit_distance, pit_histogram
from lapkit.calibration.prediction_intervals import (
    IntervalScores,
    central_interval,
    covered,
    interval_coverage,
    interval_score,
    interval_width,
)
from lapkit.calibration.quantile_calibration import (
    CalibrationCounts,
    CalibrationCurve,
    VarianceCalibration,
    calibration_curve,
    quantile_calibration_error,
    variance_calibration_error,
)
from lapkit.calibration.recalibration import Recalibration, load_recalibration
from lapkit.calibration.regression import (
    PinballLosses,
    absolute_errors,
    crps,
    crps_scores,
    density_losses,
    mae,
    mean_squared_z,
    pinball_loss,
    predictive_nll,
    quantiles,
    rmse,
    sharpness,
    squared_errors,
    squared_z_scores,
)
from lapkit.calibration.regression_recalibration import QuantileRecalibration, SigmaScaling
from lapkit.calibration.reliability import (
    EqualMass,
    EqualWidthReliability,
    event_reliability_curve,
    expected_calibration_error,
    reliability_curve,
    reliability_metric,
)
from lapkit.calibration.report import report
from lapkit.calibration.report_table import Report
from lapkit.calibration.scaling import TemperatureScaling
from lapkit.calibration.scores import accuracy, brier, nll, nll_from_logits, top_k_accuracy
from lapkit.calibration.selective import RiskCoverageCurve, ranked_risks, risk_coverage_curve
from lapkit.calibration.smooth import SmoothCalibrationError, smooth_calibration_error
from lapkit.calibration.streaming import Streaming
from lapkit.calibration.uncertainty import (
    UncertaintySplit,
    disagreement_with_mean,
    entropy,
    entropy_split,
    expected_pairwise_kl,
    variance_split,
    variation_ratio,
)

__all__ = [
    "AveragePrecision",
    "BootstrapInterval",
    "CalibrationCounts",
    "CalibrationCurve",
    "ClasswiseCorp",
    "ClasswiseEqualMass",
    "ClasswiseReliability",
    "ConformalBounds",
    "ConformalIntervals",
    "ConformalSets",
    "ConsistencyTest",
    "Corp",
    "EqualMass",
    "EqualWidthReliability",
    "FalsePositiveRate",
    "HistogramBinning",
    "IntervalScores",
    "IsotonicRecalibration",
    "Mean",
    "Metric",
    "Murphy",
    "MurphyDecomposition",
    "PITCounts",
    "PITDistance",
    "PITHistogram",
    "PinballLosses",
    "PlattScaling",
    "QuantileRecalibration",
    "Ranked",
    "Recalibration",
    "ReliabilityCurve",
    "Report",
    "RiskCoverageCurve",
    "RowMetric",
    "Samples",
    "ScoreDecomposition",
    "SigmaScaling",
    "SmoothCalibrationError",
    "Streaming",
    "SumMetric",
    "TemperatureScaling",
    "TopKCorrect",
    "UncertaintySplit",
    "VarianceCalibration",
    "VectorScaling",
    "absolute_errors",
    "accuracy",
    "adaptive_calibration_error",
    "aupr",
    "auroc",
    "bootstrap_interval",
    "brier",
    "brier_decomposition",
    "brier_scores",
    "calibration_curve",
    "central_interval",
    "classwise_calibration_error",
    "classwise_reliability_curves",
    "consistency_test",
    "correct",
    "covered",
    "crps",
    "crps_scores",
    "debiased_calibration_error",
    "debiased_classwise_calibration_error",
    "density_losses",
    "disagreement_with_mean",
    "entropy",
    "entropy_split",
    "event",
    "event_reliability_curve",
    "event_score_decomposition",
    "expected_calibration_error",
    "expected_pairwise_kl",
    "flagged",
    "fpr_at_tpr",
    "interval_coverage",
    "interval_score",
    "interval_width",
    "load_recalibration",
    "log_losses",
    "log_losses_from_logits",
    "mae",
    "mean_squared_z",
    "murphy_decomposition",
    "nll",
    "nll_from_logits",
    "pinball_loss",
    "pit",
    "pit_distance",
    "pit_histogram",
    "predictive_nll",
    "quantile_calibration_error",
    "quantiles",
    "ranked_auroc",
    "ranked_risks",
    "reliability_curve",
    "reliability_metric",
    "report",
    "risk_coverage_curve",
    "rmse",
    "sharpness",
    "smooth_calibration_error",
    "squared_errors",
    "squared_z_scores",
    "sweep_calibration_error",
    "swept_error",
    "thresholded_adaptive_calibration_error",
    "top_k_accuracy",
    "top_label",
    "variance_calibration_error",
    "variance_split",
    "variation_ratio",
]
