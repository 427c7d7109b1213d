"""Laplace approximations for PyTorch: a trained network in, uncertainty, evidence and a pruned network out."""

from lapkit.curvature import inspect, verify
from lapkit.laplace import Laplace
from lapkit.version import __version__

__all__ = ["Laplace", "__version__", "inspect", "verify"]
