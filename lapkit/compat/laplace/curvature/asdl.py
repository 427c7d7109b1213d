"""The reference's names of ASDL's curvatures, where scripts import them from."""

from lapkit.compat.laplace.curvature.interface import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface

__all__ = ["AsdlEF", "AsdlGGN", "AsdlHessian", "AsdlInterface"]
