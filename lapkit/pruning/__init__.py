"""Pruning by curvature: which weights the loss will not miss, what the others become, and what it costs."""

from lapkit.pruning.criteria import CRITERIA, Criterion, random_scores
from lapkit.pruning.graphs import LaplaceImportance
from lapkit.pruning.heads import HeadWeights
from lapkit.pruning.kinds import UNITS, places_of
from lapkit.pruning.masks import Scores, apply_masks, predicted_increase, pruning_masks
from lapkit.pruning.prune import prune
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.refitting import surviving
from lapkit.pruning.report import PruneReport, report
from lapkit.pruning.result import PruneResult
from lapkit.pruning.saliency import hessian_saliency, magnitude_saliency, obd_saliency, obs_saliency, saliency
from lapkit.pruning.schedules import GradualResult, cubic_schedule, make_permanent, prune_gradually
from lapkit.pruning.shrinking import Shrunk, shrink
from lapkit.pruning.units import Units
from lapkit.pruning.woodfisher import GGNChunks, woodfisher

__all__ = [
    "CRITERIA",
    "UNITS",
    "Criterion",
    "GGNChunks",
    "GradualResult",
    "HeadWeights",
    "LaplaceImportance",
    "PruneReport",
    "PruneResult",
    "Quadratic",
    "Scores",
    "Shrunk",
    "Units",
    "apply_masks",
    "cubic_schedule",
    "hessian_saliency",
    "magnitude_saliency",
    "make_permanent",
    "obd_saliency",
    "obs_saliency",
    "places_of",
    "predicted_increase",
    "prune",
    "prune_gradually",
    "pruning_masks",
    "random_scores",
    "report",
    "saliency",
    "shrink",
    "surviving",
    "woodfisher",
]
