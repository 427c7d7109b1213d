"""Model selection: fitted models ranked by their evidence, and told when their evidences cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lapkit.curvature import BlockDiagonal, Dense, Factored, GGNBlocks, GGNDense, Likelihood, LowRank
from lapkit.laplace import Laplace


@dataclass(frozen=True)
class Ranked:
    """One model of a comparison.

    Args:
        name: as given, or its place in the list.
        log_evidence: `log p(D|M)`, in nats.
        log_likelihood: at the MAP estimate, in nats: how well it fits.
        weights: the number of its random weights.
        probability: `p(M|D)` under equal prior probabilities of the models.
    """

    name: str
    log_evidence: float
    log_likelihood: float
    weights: int
    probability: float

    @property
    def occam_factor(self) -> float:
        """`log p(D|M) - log p(D|w*, M)`, in nats: what the evidence takes off the fit for flexibility."""
        return self.log_evidence - self.log_likelihood


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models by descending evidence; prints as a table.

    Args:
        ranking: the best one first.
        remarks: why some of the differences may not mean what they seem to; empty if nothing was found.
    """

    ranking: tuple[Ranked, ...]
    remarks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ranking)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.ranking)

    @property
    def best(self) -> Ranked:
        """The most probable model."""
        return self.ranking[0]

    def __repr__(self) -> str:
        width = max(5, *(len(row.name) for row in self.ranking))
        lines = [
            f"{'model':<{width}}  {'log evidence':>13} {'behind':>13} {'fit':>13} {'Occam':>13} {'p(M|D)':>7} "
            f"{'weights':>11}"
        ]
        lines += [
            f"{row.name:<{width}}  {row.log_evidence:>13.2f} {row.log_evidence - self.best.log_evidence:>13.2f} "
            f"{row.log_likelihood:>13.2f} {row.occam_factor:>13.2f} {row.probability:>7.3f} {row.weights:>11,}"
            for row in self.ranking
        ]
        return "\n".join([*lines, *(f"Beware: {remark}" for remark in self.remarks)])


def compare(models: Mapping[str, Laplace] | Sequence[Laplace]) -> Comparison:
    """Rank fitted models by their log marginal likelihoods.

    Evidences are comparable if they are densities of the same targets. What is known to break that is remarked: models
    fitted to different numbers of examples, likelihoods of different kinds, tempered likelihoods; and what blurs it:
    approximations of different structure, or of the last layer only, which takes the other weights as given for free.

    Args:
        models: by name, or in a list; fitted, their priors tuned or set.

    Returns:
        The ranking.

    Raises:
        TypeError: if one is no `Laplace`, or they are in no list or mapping.
        ValueError: if there is none, or they were fitted to different numbers of examples, outputs, or to likelihoods
            of different kinds, so that a ranking would be meaningless.
        RuntimeError: if one is not fitted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 1)
        >>> data = [(x, torch.randn(50, 1))]
        >>> models = {k: Laplace(nn.Linear(1, 1), "regression", "all", "full", prior_precision=p).fit(data)
        ...           for k, p in {"strong": 100.0, "weak": 1e-6}.items()}
        >>> compare(models).best.name
        'strong'

    Reference:
        MacKay, A practical Bayesian framework for backpropagation networks, 1992, section 2.
    """
    if not isinstance(models, (Mapping, Sequence)):
        raise TypeError(
            f"Expected several fitted Laplace objects in a list, or by name in a dict; got a {type(models).__name__}."
        )
    named = dict(models) if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models)}
    if not named:
        raise ValueError("There is no model to compare.")
    for name, model in named.items():
        if not isinstance(model, Laplace):
            hint = ": give its .laplace" if isinstance(getattr(model, "laplace", None), Laplace) else ""
            raise TypeError(f"Expected fitted Laplace objects, got {type(model).__name__} as {name!r}{hint}.")
    _check_comparable(named)
    evidence = {name: float(model.log_marginal_likelihood()) for name, model in named.items()}
    probability = torch.tensor(list(evidence.values()), dtype=torch.float64).softmax(0).tolist()
    rows = [
        Ranked(name, evidence[name], float(model.log_likelihood), model.n_params, p)
        for (name, model), p in zip(named.items(), probability, strict=True)
    ]
    return Comparison(tuple(sorted(rows, key=lambda row: -row.log_evidence)), tuple(_remarks(named)))


def _check_comparable(named: dict[str, Laplace]) -> None:
    """Refuse evidences of different data.

    Raises:
        ValueError: if counts of examples or outputs, or the likelihoods' kinds differ.
    """
    facts: dict[str, dict[str, object]] = {
        "examples": {name: model.fitted.count for name, model in named.items()},
        "outputs of an example": {name: model.fitted.outputs for name, model in named.items()},
        "kinds of likelihood": {name: _kind(model.likelihood) for name, model in named.items()},
    }
    for what, values in facts.items():
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name!r}: {value}" for name, value in values.items())
            raise ValueError(
                f"Evidences of different {what} are not comparable ({listed}). Fit all models to the same data with "
                "likelihoods of one kind."
            )


def _kind(likelihood: Likelihood) -> str:
    return type(likelihood).__name__


def _remarks(named: dict[str, Laplace]) -> Iterator[str]:
    tempered = [name for name, model in named.items() if model.temperature != 1]
    if tempered:
        yield f"{_listed(tempered)} have a temperature other than 1, so their likelihoods are not normalised."
    limited = [name for name, model in named.items() if _is_limited(model)]
    if limited:
        yield (
            f"{_listed(limited)} keep a limited rank of the curvature: nothing is taken off for what is left out, so "
            "that the evidence errs high."
        )
    structures = {_structure(model) for model in named.values()}
    if len(structures) > 1:
        yield (
            f"the posteriors have different structures ({', '.join(sorted(structures))}), whose log determinants err "
            "by different amounts: coarser structures have lower evidences."
        )
    conditional = [
        name
        for name, model in named.items()
        if model.n_params < sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    ]
    if conditional and len({model.n_params for model in named.values()}) > 1:
        yield (
            f"{_listed(conditional)} took some of the trained weights as given: nothing is taken off for fitting those."
        )
    estimated = [name for name, model in named.items() if model.columns.random or model.columns.dispersion_power != 1]
    if estimated:
        yield f"the curvature of {_listed(estimated)} is an estimate (Monte Carlo, or the empirical Fisher)."
    bad = [name for name, model in named.items() if not math.isfinite(float(model.log_marginal_likelihood()))]
    if bad:
        yield f"{_listed(bad)} have no finite evidence."


def _structure(model: Laplace) -> str:
    """What is kept of the curvature; columns, written out or not, are the full matrix, or blocks, in another form."""
    curvature, exact = model.fitted.curvature, (Dense, LowRank, Factored)
    if model.structure.factored:
        return str(model.structure)
    if isinstance(curvature, BlockDiagonal) and all(isinstance(block, exact) for block in curvature.blocks):
        return GGNBlocks.__name__
    return GGNDense.__name__ if isinstance(curvature, exact) else str(model.structure)


def _is_limited(model: Laplace) -> bool:
    """Whether columns may have been left out: a rank was given, and is reached."""
    make, curvature = model.structure.make, model.fitted.curvature
    rank = make.keywords.get("rank") if isinstance(make, partial) else None
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    return rank is not None and any(isinstance(b, LowRank) and rank <= b.rank and rank < b.size for b in blocks)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
