"""Curvature of a network's loss in its weights: `H = sum_n J_n^T S_n S_n^T J_n`.

Which curvature is a choice of columns `S`, which structure a choice of quantity, which weights a choice of parameters.
"""

from lapkit.curvature.accumulate import Totals, accumulate
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.tape import last_layer
from lapkit.curvature.columns.columns import (
    GGN,
    Columns,
    ColumnSet,
    CustomColumns,
    EmpiricalFisher,
    LossGradient,
)
from lapkit.curvature.columns.random_columns import MonteCarloGGN, RandomSignGGN
from lapkit.curvature.columns.sampling import Draws, example_keys, seed_from
from lapkit.curvature.compute import Results, compute
from lapkit.curvature.hessian.hbp import hessian_blocks
from lapkit.curvature.hessian.hbp_blocks import CurvatureBlocks
from lapkit.curvature.hessian.hbp_chain import Residual
from lapkit.curvature.hessian.hbp_products import BlockProduct, BlockProducts, hessian_products
from lapkit.curvature.hessian.hbp_step import Solution, conjugate_gradients, newton_step
from lapkit.curvature.hessian.hessian_diagonal import HessianDiagonal, hessian_diagonal
from lapkit.curvature.hessian.kfra import AveragedFactors, kfra
from lapkit.curvature.inspection import Inspection, inspect, inspection
from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.jacobians.jacobian import DenseJacobian, Jacobian, LayerJacobian
from lapkit.curvature.jacobians.network import NetworkJacobian
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.jacobians.routed import RoutedJacobian
from lapkit.curvature.jacobians.sum_jacobian import SumJacobian
from lapkit.curvature.jacobians.tied import TiedJacobian
from lapkit.curvature.likelihoods.binary import Bernoulli
from lapkit.curvature.likelihoods.classification import Categorical
from lapkit.curvature.likelihoods.counts import GammaPoisson, Poisson
from lapkit.curvature.likelihoods.custom import FromLogProb
from lapkit.curvature.likelihoods.likelihood import DiagonalLikelihood, Likelihood
from lapkit.curvature.likelihoods.preference import BradleyTerry
from lapkit.curvature.likelihoods.regression import Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.factored import Factored
from lapkit.curvature.operators.kronecker import Kronecker
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.operators.low_rank import LowRank
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.operators.principal import principal
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.data_product import DataProduct
from lapkit.curvature.products.estimators import (
    Estimate,
    diagpp_diagonal,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    squared_norm,
)
from lapkit.curvature.products.low_rank_products import LowRankApproximation, low_rank_from_products
from lapkit.curvature.products.matrix_free import MatrixFree
from lapkit.curvature.products.products import EmpiricalFisherProduct, FisherProduct, GGNProduct, HessianProduct
from lapkit.curvature.products.quadrature import SpectralDensity, spectral_density
from lapkit.curvature.products.spectrum import Eigenpairs, largest_eigenpairs, smallest_eigenpairs
from lapkit.curvature.products.views import linear_operator_view, scipy_view
from lapkit.curvature.quantities.clipping import ClippedGradients, ClippedTotal
from lapkit.curvature.quantities.dense import BlockSum, DenseSum, GGNBlocks, GGNDense
from lapkit.curvature.quantities.diagonal import DiagonalSum, GGNDiagonal
from lapkit.curvature.quantities.ekfac import EigenvalueSum, EKFACCorrection, ekfac
from lapkit.curvature.quantities.factored_ggn import FactoredGGN, FactoredSum, LowRankGGN
from lapkit.curvature.quantities.first_order import (
    CovarianceSum,
    GradientCovariance,
    GradientMoments,
    GradientSum,
    GradientTotal,
    MomentSum,
)
from lapkit.curvature.quantities.gradient_products import ExampleDots, GradientDots, GradientGram, GramMatrix, MeanDots
from lapkit.curvature.quantities.kfac import GGNKronecker, KroneckerSum
from lapkit.curvature.quantities.per_example import (
    ExampleNorms,
    ExampleValues,
    GGNDiagonals,
    GGNTraces,
    GradientNorms,
    Gradients,
)
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import CurvatureSum, PerExample, Result, Sum
from lapkit.curvature.quantities.sqrt_ggn import LowRankSum, SqrtGGN
from lapkit.curvature.spectra.analysis import ViViT
from lapkit.curvature.spectra.batch import vivit
from lapkit.curvature.spectra.comparison import eigenvalue_accuracy, magnitude_error
from lapkit.curvature.spectra.damping import NoiseAwareDamping
from lapkit.curvature.spectra.directions import Directions
from lapkit.curvature.spectra.overlap import eigenspace_overlap
from lapkit.curvature.spectra.plots import plot_overlaps, plot_snr, plot_spectrum
from lapkit.curvature.spectra.spectrum import Spectrum
from lapkit.curvature.subnetwork import Subnetwork, SubnetworkEngine
from lapkit.curvature.usage import ParameterUse
from lapkit.curvature.verification import Verification, verify

__all__ = [
    "GGN",
    "AveragedFactors",
    "Bernoulli",
    "BlockDiagonal",
    "BlockProduct",
    "BlockProducts",
    "BlockSum",
    "BradleyTerry",
    "Categorical",
    "ClippedGradients",
    "ClippedTotal",
    "ColumnSet",
    "Columns",
    "CovarianceSum",
    "CurvatureBlocks",
    "CurvatureSum",
    "CustomColumns",
    "DataProduct",
    "Dense",
    "DenseJacobian",
    "DenseSum",
    "Diagonal",
    "DiagonalLikelihood",
    "DiagonalSum",
    "Directions",
    "Draws",
    "EKFACCorrection",
    "Eigenpairs",
    "EigenvalueSum",
    "EmbeddingJacobian",
    "EmpiricalFisher",
    "EmpiricalFisherProduct",
    "Engine",
    "Estimate",
    "ExampleDots",
    "ExampleNorms",
    "ExampleValues",
    "Factored",
    "FactoredGGN",
    "FactoredSum",
    "FisherProduct",
    "FromLogProb",
    "GGNBlocks",
    "GGNDense",
    "GGNDiagonal",
    "GGNDiagonals",
    "GGNKronecker",
    "GGNProduct",
    "GGNTraces",
    "GammaPoisson",
    "Gaussian",
    "GradientCovariance",
    "GradientDots",
    "GradientGram",
    "GradientMoments",
    "GradientNorms",
    "GradientSum",
    "GradientTotal",
    "Gradients",
    "GramMatrix",
    "HessianDiagonal",
    "HessianProduct",
    "HeteroscedasticGaussian",
    "Inspection",
    "Jacobian",
    "Kronecker",
    "KroneckerProduct",
    "KroneckerSum",
    "LayerJacobian",
    "Likelihood",
    "LossGradient",
    "LowRank",
    "LowRankApproximation",
    "LowRankGGN",
    "LowRankSum",
    "MatrixFree",
    "MeanDots",
    "MomentSum",
    "MonteCarloGGN",
    "NetworkJacobian",
    "NoiseAwareDamping",
    "OuterProduct",
    "ParameterUse",
    "Parameters",
    "PerExample",
    "PerOutputGaussian",
    "Poisson",
    "Quantity",
    "RandomSignGGN",
    "Residual",
    "Result",
    "Results",
    "RoutedJacobian",
    "Solution",
    "SpectralDensity",
    "Spectrum",
    "SqrtGGN",
    "Subnetwork",
    "SubnetworkEngine",
    "Sum",
    "SumJacobian",
    "SymmetricOperator",
    "TiedJacobian",
    "Totals",
    "Verification",
    "ViViT",
    "accumulate",
    "borrowed",
    "compute",
    "conjugate_gradients",
    "diagpp_diagonal",
    "eigenspace_overlap",
    "eigenvalue_accuracy",
    "ekfac",
    "example_keys",
    "hessian_blocks",
    "hessian_diagonal",
    "hessian_products",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "inspect",
    "inspection",
    "kfra",
    "largest_eigenpairs",
    "last_layer",
    "linear_operator_view",
    "low_rank_from_products",
    "magnitude_error",
    "newton_step",
    "plot_overlaps",
    "plot_snr",
    "plot_spectrum",
    "principal",
    "scipy_view",
    "seed_from",
    "smallest_eigenpairs",
    "spectral_density",
    "squared_norm",
    "verify",
    "vivit",
]
