"""A fitted `Laplace` on data that it has not seen, beside what costs less and what costs more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, Independent, MixtureSameFamily, MultivariateNormal

from lapkit.calibration import Report, SigmaScaling, TemperatureScaling, report
from lapkit.choices import choice
from lapkit.curvature import Bernoulli, BradleyTerry, Categorical, Likelihood
from lapkit.evaluation_data import Seen, seen
from lapkit.facade.predictions import Predictions
from lapkit.mixing import mixed
from lapkit.posteriors import LINKS, FunctionDistribution, predictive

UNSURE = 0.1  # how far the mean confidence may lie below the accuracy without a remark


def evaluate(
    la: Predictions,
    loader: Iterable[Any],
    *,
    ood: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    ensemble: Sequence[nn.Module] = (),
    others: Sequence[Predictions] = (),
    weights: Tensor | None = None,
    link_approx: str = "probit",
    n_samples: int = 100,
    generator: torch.Generator | None = None,
    **page: Any,
) -> Report:
    """Score the MAP network, its recalibration, Laplace and an ensemble on the same test data.

    Args:
        la: fitted.
        loader: batches `(inputs, targets)` that nothing was trained, tuned or recalibrated on.
        ood: batches of inputs, with or without targets, from elsewhere.
        validation: batches that were not trained on either, for the temperature, or the factor of the spread.
        ensemble: networks trained from different starts, the MAP network among them or not; of a mixture, its own by
            default.
        others: the other members of a mixture, all fitted; see `LaplaceMixture.evaluate`.
        weights: of the mixture's members, `la` first, which sum to one; equal by default.
        link_approx: for classes, as for predictions.
        n_samples: of "mc" and "qmc".
        generator: of "mc" and "qmc".
        page: further arguments of `lapkit.calibration.report`, such as `class_names`, `unit` and `title`.

    Returns:
        The report: rows "MAP", "MAP + temperature" (or "MAP + sigma scaling"), "Laplace", "ensemble of M", "mixture of
        M".

    Raises:
        TypeError: if the likelihood is neither of classes nor Gaussian, a batch has the wrong type, or the ensemble is
            a single network.
        ValueError: if there are no data, they do not fit, or examples have weights.
        RuntimeError: before `fit`, or if the network's weights have changed since.
    """
    link, likelihood = choice(LINKS, link_approx, "link_approx"), la.likelihood
    mixture = (la, *others)
    held_out = None if validation is None else seen((la,), validation)
    scaling = None if held_out is None else _scaling(likelihood, held_out)

    def rows(data: Seen) -> dict[str, Any]:
        pairs = list(zip(mixture, data.f, strict=True))
        networks = [predictive(member.likelihood, _certain(f.mean)) for member, f in pairs]
        each = [predictive(member.likelihood, f, link, n_samples, generator) for member, f in pairs]
        mode = _prediction(networks[0])
        found = {"MAP": mode}
        if isinstance(scaling, TemperatureScaling):
            found["MAP + temperature"] = scaling(_logits(data.f[0].mean, mode))
        elif scaling is not None:
            found["MAP + sigma scaling"] = scaling(mode)
        found["Laplace"] = _prediction(each[0])
        if data.members:
            networks = [predictive(likelihood, _certain(f)) for f in data.members]
        if data.members or others:
            found[f"ensemble of {len(networks)}"] = _prediction(mixed(networks))
        if others:
            found[f"mixture of {len(each)}"] = _prediction(mixed(each, weights))
        return found

    test = seen(mixture, loader, ensemble)
    y, kept = _labels(likelihood, test.targets)
    predictions = {name: p[kept] if isinstance(p, Tensor) else p for name, p in rows(test).items()}
    outside = None if ood is None else rows(seen(mixture, ood, ensemble, with_targets=False))
    notes = [*page.pop("notes", ()), _about(scaling), f"Laplace: {la!r}.", *_doubts(predictions, y[kept])]
    focus = f"mixture of {len(mixture)}" if others else "Laplace"
    # Several events of an example, or labels that are missing: rows are no examples.
    rowwise = test.inputs is not None and len(test.inputs) == len(y) and bool(kept.all())
    page = {"inputs": test.inputs if rowwise else None, "focus": focus} | page
    return report(predictions, y[kept], ood=outside, notes=notes, **page)


def _certain(mean: Tensor) -> FunctionDistribution:
    """Outputs without doubt."""
    return FunctionDistribution(mean, mean.new_zeros(*mean.shape, mean.shape[-1]))


@singledispatch
def _prediction(distribution: Distribution) -> Any:
    """A predictive in the form of `lapkit.calibration`.

    Raises:
        TypeError: if it is neither of classes nor Gaussian.
    """
    raise TypeError(
        f"Targets of a {type(distribution).__name__} cannot be evaluated in one table, only classes and real numbers "
        "of a Gaussian. Score la.predictive_distribution(x), or draws from it as lapkit.calibration.Samples."
    )


@_prediction.register
def _(distribution: CategoricalDistribution) -> Tensor:
    return distribution.probs  # (M, C)


@_prediction.register(Independent)
def _(distribution: Any) -> Any:
    if isinstance(distribution.base_dist, BernoulliDistribution):
        return distribution.base_dist.probs.reshape(-1)  # every output is an event by itself
    return _prediction(distribution.base_dist)


@_prediction.register(MultivariateNormal)
@_prediction.register(MixtureSameFamily)
def _(distribution: Distribution) -> Distribution:
    return distribution


@singledispatch
def _labels(likelihood: Likelihood, y: Tensor) -> tuple[Tensor, Tensor]:
    """Targets, and which of them there are."""
    return y, torch.ones(len(y), dtype=torch.bool, device=y.device)


@_labels.register
def _(likelihood: Categorical, y: Tensor) -> tuple[Tensor, Tensor]:
    return y[:, 0], y[:, 0].ne(likelihood.ignore_index)


@_labels.register
def _(likelihood: BradleyTerry, y: Tensor) -> tuple[Tensor, Tensor]:
    return y[:, 0], y[:, 0].ge(0)


@_labels.register
def _(likelihood: Bernoulli, y: Tensor) -> tuple[Tensor, Tensor]:
    flat = y.reshape(-1)
    there = (flat == 0) | (flat == 1)
    return flat.where(there, 0).long(), there


def _logits(mean: Tensor, probabilities: Tensor) -> Tensor:
    """Outputs in the shape of the probabilities."""
    return mean.reshape(probabilities.shape)


def _scaling(likelihood: Likelihood, data: Seen) -> TemperatureScaling | SigmaScaling:
    """What is fitted to held-out data."""
    mean = data.f[0].mean
    mode = _prediction(predictive(likelihood, _certain(mean)))
    y, kept = _labels(likelihood, data.targets)
    if isinstance(mode, Tensor):
        return TemperatureScaling.fit(_logits(mean, mode)[kept], y[kept])
    return SigmaScaling.fit(mode, y)


def _about(scaling: TemperatureScaling | SigmaScaling | None) -> str:
    if scaling is None:
        return "MAP is not recalibrated: that takes validation=, batches held out from training and from this test."
    return f"MAP is recalibrated by {scaling!r}, fitted to held-out data."


def _doubts(predictions: dict[str, Any], y: Tensor) -> list[str]:
    """Whether Laplace is far less sure than it is right, and the network is not: a prior that does not suit it."""
    tables = predictions["MAP"], predictions["Laplace"]
    if not all(isinstance(p, Tensor) and p.ndim == 2 for p in tables):
        return []
    right, sure = zip(
        *[(float((p.argmax(1) == y).double().mean()), float(p.amax(1).mean())) for p in tables], strict=True
    )
    if right[1] - sure[1] < max(UNSURE, 2 * abs(right[0] - sure[0])):
        return []
    return [
        f"Laplace is underconfident: right about {right[1]:.0%} of the examples, it expects {sure[1]:.0%}. The prior "
        "precision is too small for this network: choose one by held-out data, with "
        "la.optimize_prior_precision(method='gridsearch', val_loader=...)."
    ]
