"""All networks with closed forms; importing the modules fills the registry."""

from rule_cases import entries, layers, lookups, matrices
from rule_cases.registry import CASES

__all__ = ["CASES", "entries", "layers", "lookups", "matrices"]
