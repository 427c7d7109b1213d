"""What people do to networks besides choosing an architecture; importing the modules fills the registry."""

from networks import operations, reparametrised, sharing, transformations
from networks.registry import VARIANTS, Model, layers

__all__ = ["VARIANTS", "Model", "layers", "operations", "reparametrised", "sharing", "transformations"]
