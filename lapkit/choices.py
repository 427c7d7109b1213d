"""What the facade's arguments may be, and the objects that they stand for."""

from __future__ import annotations

from functools import partial
from typing import Any

from lapkit.curvature import (
    GGN,
    Bernoulli,
    BradleyTerry,
    Categorical,
    Columns,
    EKFACCorrection,
    EmpiricalFisher,
    FactoredGGN,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    LowRankGGN,
    MonteCarloGGN,
    SqrtGGN,
)
from lapkit.structures import Structure

LIKELIHOODS = {
    "classification": Categorical,
    "regression": Gaussian,
    "binary": Bernoulli,
    "reward_modeling": BradleyTerry,
}
STRUCTURES = {
    "diag": Structure(GGNDiagonal),
    "kron": Structure(GGNKronecker, factored=True),
    "kron_reduce": Structure(partial(GGNKronecker, setting="reduce"), factored=True),
    "ekfac": Structure(GGNKronecker, EKFACCorrection, factored=True),
    "blockdiag": Structure(GGNBlocks),
    "full": Structure(GGNDense),
    "lowrank": Structure(LowRankGGN),
    "gp": Structure(FactoredGGN),
}
SPACES = {"auto": LowRankGGN, "weights": SqrtGGN, "functions": FactoredGGN}
CURVATURES: dict[str, Columns] = {"ggn": GGN(), "mc": MonteCarloGGN(), "ef": EmpiricalFisher()}
PRED_TYPES = ("glm", "nn")
PRIOR_STRUCTURES = ("scalar", "layerwise", "unit", "diag")


def choice(table: Any, key: Any, what: str) -> Any:
    """The entry of a table, or the name itself where there is only a list of them.

    Raises:
        ValueError: if it has no such name.
    """
    if key not in table:
        raise ValueError(f"Unknown {what} {key!r}. Choose one of {', '.join(map(repr, table))}.")
    return table[key] if isinstance(table, dict) else key


def curvature_structure(hessian_structure: str, rank: int | None, per_parameter: bool, space: str) -> Structure:
    """What makes the curvature in a structure for a selection of weights.

    Args:
        hessian_structure: a name of `STRUCTURES`.
        rank: of "lowrank": the number of columns to keep, all by default.
        per_parameter: of "lowrank": blocks of single parameters.
        space: of "lowrank": a name of `SPACES`.

    Raises:
        ValueError: if a name is unknown, or settings do not go together.
    """
    found: Structure = choice(STRUCTURES, hessian_structure, "hessian_structure")
    form = choice(SPACES, space, "space")
    if (rank, per_parameter, space) == (None, False, "auto"):
        return found
    if found is not STRUCTURES["lowrank"]:
        raise ValueError(
            f"rank={rank}, per_parameter={per_parameter} and space={space!r} were given beside "
            f"hessian_structure={hessian_structure!r}; they belong to 'lowrank' only."
        )
    if rank is None:
        return Structure(partial(form, per_parameter=per_parameter))
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"The rank is a whole number of columns, at least 1, got {rank}.")
    if form is FactoredGGN:
        raise ValueError(
            f"A rank of {rank} was given with space='functions'. Columns are cut to a rank where they are written out: "
            "choose space='weights', or no rank."
        )
    return Structure(partial(SqrtGGN, rank=rank, per_parameter=per_parameter))
