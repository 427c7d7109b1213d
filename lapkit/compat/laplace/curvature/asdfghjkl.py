"""The reference's names of Asdfghjkl's curvatures, where scripts import them from."""

from lapkit.compat.laplace.curvature.interface import AsdfghjklEF, AsdfghjklGGN, AsdfghjklHessian, AsdfghjklInterface

__all__ = ["AsdfghjklEF", "AsdfghjklGGN", "AsdfghjklHessian", "AsdfghjklInterface"]
