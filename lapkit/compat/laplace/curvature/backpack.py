"""The reference's names of BackPACK's curvatures, where scripts import them from."""

from lapkit.compat.laplace.curvature.interface import BackPackEF, BackPackGGN, BackPackInterface

__all__ = ["BackPackEF", "BackPackGGN", "BackPackInterface"]
