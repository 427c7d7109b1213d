"""The one place where gpytorch is imported; it is an optional dependency."""

from __future__ import annotations

INSTALL = "Gaussian processes need gpytorch 1.15.2 or newer. Install it with: pip install 'lapkit[gp]'"

try:
    import gpytorch
    from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
except ImportError as error:
    raise ImportError(INSTALL) from error

if "_get_test_prior_mean_and_covariances" not in vars(gpytorch.models.ExactGP):  # what LaplaceGP puts its own in for
    raise ImportError(f"{INSTALL} (found {gpytorch.__version__}).")

__all__ = ["DefaultPredictionStrategy", "gpytorch"]
