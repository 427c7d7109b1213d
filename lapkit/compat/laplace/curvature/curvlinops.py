"""The reference's names of curvlinops' curvatures, where scripts import them from."""

from lapkit.compat.laplace.curvature.interface import (
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    CurvlinopsInterface,
)

__all__ = ["CurvlinopsEF", "CurvlinopsGGN", "CurvlinopsHessian", "CurvlinopsInterface"]
