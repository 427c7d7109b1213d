"""Who computes the curvature of a fit: lapkit's own engine, or another library, to check one by the other."""

from lapkit.backends.backend import Backend, OwnEngine
from lapkit.backends.backpack import BACKPACK
from lapkit.backends.curvlinops import CURVLINOPS

BACKENDS: dict[str, Backend] = {"lapkit": OwnEngine(), "backpack": BACKPACK, "curvlinops": CURVLINOPS}

__all__ = ["BACKENDS", "Backend"]
