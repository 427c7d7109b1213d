"""Curvature of a network's loss in its weights: `H = sum_n J_n^T S_n S_n^T J_n`.

Which curvature is a choice of columns `S`, which structure a choice of quantity, which weights a choice of parameters.
"""

from lapkit.curvature.accumulate import Totals, accumulate
from lapkit.curvature.binary import Bernoulli
from lapkit.curvature.block_diagonal import BlockDiagonal
from lapkit.curvature.classification import Categorical
from lapkit.curvature.clipping import ClippedGradients
from lapkit.curvature.columns import (
    GGN,
    Columns,
    ColumnSet,
    CustomColumns,
    EmpiricalFisher,
    LossGradient,
)
from lapkit.curvature.compute import Results, compute
from lapkit.curvature.counts import GammaPoisson, Poisson
from lapkit.curvature.custom import FromLogProb
from lapkit.curvature.dense import Dense
from lapkit.curvature.diagonal import Diagonal
from lapkit.curvature.ekfac import EigenvalueSum, EKFACCorrection, ekfac
from lapkit.curvature.embedding import EmbeddingJacobian
from lapkit.curvature.engine import Engine
from lapkit.curvature.estimators import (
    Estimate,
    diagpp_diagonal,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    squared_norm,
)
from lapkit.curvature.first_order import GradientCovariance, GradientMoments, GradientSum
from lapkit.curvature.gradient_products import GradientDots, GradientGram
from lapkit.curvature.hbp import hessian_blocks
from lapkit.curvature.hbp_blocks import CurvatureBlocks
from lapkit.curvature.hbp_chain import Residual
from lapkit.curvature.hbp_products import BlockProduct, BlockProducts, hessian_products
from lapkit.curvature.hbp_step import Solution, conjugate_gradients, newton_step
from lapkit.curvature.hessian_diagonal import HessianDiagonal, hessian_diagonal
from lapkit.curvature.inspection import Inspection, ParameterUse, inspect, inspection
from lapkit.curvature.jacobians import DenseJacobian, Jacobian, LayerJacobian, NetworkJacobian
from lapkit.curvature.kfac import GGNKronecker, KroneckerSum
from lapkit.curvature.kfra import kfra
from lapkit.curvature.kronecker import Kronecker
from lapkit.curvature.kronecker_product import KroneckerProduct
from lapkit.curvature.likelihoods import DiagonalLikelihood, Likelihood
from lapkit.curvature.low_rank import LowRank
from lapkit.curvature.matrix_free import MatrixFree
from lapkit.curvature.operator import SymmetricOperator
from lapkit.curvature.outer_product import OuterProduct
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.per_example import GGNDiagonals, GGNTraces, GradientNorms, Gradients
from lapkit.curvature.products import EmpiricalFisherProduct, FisherProduct, GGNProduct, HessianProduct
from lapkit.curvature.quadrature import SpectralDensity, spectral_density
from lapkit.curvature.quantities import GGNBlocks, GGNDense, GGNDiagonal, Quantity
from lapkit.curvature.random_columns import MonteCarloGGN, RandomSignGGN
from lapkit.curvature.regression import Gaussian, HeteroscedasticGaussian, PerOutputGaussian
from lapkit.curvature.results import CurvatureSum, PerExample, Result, Sum
from lapkit.curvature.sampling import Draws, example_keys, seed_from
from lapkit.curvature.spectrum import Eigenpairs, largest_eigenpairs, smallest_eigenpairs
from lapkit.curvature.sqrt_ggn import LowRankSum, SqrtGGN
from lapkit.curvature.sum_jacobian import SumJacobian
from lapkit.curvature.tape import last_layer
from lapkit.curvature.tied import TiedJacobian
from lapkit.curvature.verification import Verification, verify
from lapkit.curvature.views import linear_operator_view, scipy_view

__all__ = [
    "GGN",
    "Bernoulli",
    "BlockDiagonal",
    "BlockProduct",
    "BlockProducts",
    "Categorical",
    "ClippedGradients",
    "ColumnSet",
    "Columns",
    "CurvatureBlocks",
    "CurvatureSum",
    "CustomColumns",
    "Dense",
    "DenseJacobian",
    "Diagonal",
    "DiagonalLikelihood",
    "Draws",
    "EKFACCorrection",
    "Eigenpairs",
    "EigenvalueSum",
    "EmbeddingJacobian",
    "EmpiricalFisher",
    "EmpiricalFisherProduct",
    "Engine",
    "Estimate",
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
    "Gradients",
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
    "LowRankSum",
    "MatrixFree",
    "MonteCarloGGN",
    "NetworkJacobian",
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
    "Solution",
    "SpectralDensity",
    "SqrtGGN",
    "Sum",
    "SumJacobian",
    "SymmetricOperator",
    "TiedJacobian",
    "Totals",
    "Verification",
    "accumulate",
    "borrowed",
    "compute",
    "conjugate_gradients",
    "diagpp_diagonal",
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
    "newton_step",
    "scipy_view",
    "seed_from",
    "smallest_eigenpairs",
    "spectral_density",
    "squared_norm",
    "verify",
]
