"""Curvature of a network's loss in its weights: `H = sum_n J_n^T S_n S_n^T J_n`.

Which curvature is a choice of columns `S`, which structure a choice of quantity, which weights a choice of parameters.
"""

from lapkit.curvature.accumulate import Totals, accumulate
from lapkit.curvature.block_diagonal import BlockDiagonal
from lapkit.curvature.classification import Bernoulli, Categorical
from lapkit.curvature.columns import GGN, Columns, EmpiricalFisher, MonteCarloGGN
from lapkit.curvature.dense import Dense
from lapkit.curvature.diagonal import Diagonal
from lapkit.curvature.engine import Engine
from lapkit.curvature.jacobians import DenseJacobian, Jacobian, LayerJacobian, NetworkJacobian
from lapkit.curvature.kronecker import Kronecker
from lapkit.curvature.kronecker_product import KroneckerProduct
from lapkit.curvature.likelihoods import Gaussian, Likelihood
from lapkit.curvature.operator import SymmetricOperator
from lapkit.curvature.outer_product import OuterProduct
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.quantities import GGNBlocks, GGNDense, GGNDiagonal, GGNKronecker, Quantity
from lapkit.curvature.tape import last_layer

__all__ = [
    "GGN",
    "Bernoulli",
    "BlockDiagonal",
    "Categorical",
    "Columns",
    "Dense",
    "DenseJacobian",
    "Diagonal",
    "EmpiricalFisher",
    "Engine",
    "GGNBlocks",
    "GGNDense",
    "GGNDiagonal",
    "GGNKronecker",
    "Gaussian",
    "Jacobian",
    "Kronecker",
    "KroneckerProduct",
    "LayerJacobian",
    "Likelihood",
    "MonteCarloGGN",
    "NetworkJacobian",
    "OuterProduct",
    "Parameters",
    "Quantity",
    "SymmetricOperator",
    "Totals",
    "accumulate",
    "borrowed",
    "last_layer",
]
