"""The reference's names of curvatures of any library, where scripts import them from."""

from lapkit.compat.laplace.curvature.interface import CurvatureInterface, EFInterface, GGNInterface

__all__ = ["CurvatureInterface", "EFInterface", "GGNInterface"]
