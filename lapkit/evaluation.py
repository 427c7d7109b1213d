"""A fitted `Laplace` on data that it has not seen, beside what costs less and what costs more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, Independent, MixtureSameFamily, MultivariateNormal

from lapkit.calibration import Report, SigmaScaling, TemperatureScaling, report
from lapkit.choices import choice
from lapkit.curvature import Bernoulli, BradleyTerry, Categorical, Engine, Likelihood, Parameters, borrowed
from lapkit.curvature.inputs import TARGET_KEYS, as_tensors, numbered, to_device, unpack
from lapkit.facade.predictions import Predictions
from lapkit.posteriors import LINKS, FunctionDistribution, predictive


@dataclass(frozen=True)
class _Seen:
    """What the networks say of all examples; an output at one position of an example is a row.

    Args:
        f: of the linearised network, `(M, C)`.
        members: outputs of the ensemble's networks, `(M, C)` each.
        targets: checked, `(M, *)`; none where they were not asked for.
        inputs: where examples are rows and inputs are tensors.
    """

    f: FunctionDistribution
    members: tuple[Tensor, ...]
    targets: Tensor
    inputs: Tensor | None


def evaluate(
    la: Predictions,
    loader: Iterable[Any],
    *,
    ood: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    ensemble: Sequence[nn.Module] = (),
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
        ensemble: networks trained from different starts, the MAP network among them or not.
        link_approx: for classes, as for predictions.
        n_samples: of "mc" and "qmc".
        generator: of "mc" and "qmc".
        page: further arguments of `lapkit.calibration.report`, such as `class_names`, `unit` and `title`.

    Returns:
        The report: rows "MAP", "MAP + temperature" (or "MAP + sigma scaling"), "Laplace", "ensemble of M".

    Raises:
        TypeError: if the likelihood is neither of classes nor Gaussian, a batch has the wrong type, or the ensemble is
            a single network.
        ValueError: if there are no data, they do not fit, or examples have weights.
        RuntimeError: before `fit`, or if the network's weights have changed since.
    """
    link, likelihood = choice(LINKS, link_approx, "link_approx"), la.likelihood
    held_out = None if validation is None else _seen(la, validation, ())
    scaling = None if held_out is None else _scaling(likelihood, held_out)

    def rows(seen: _Seen) -> dict[str, Any]:
        mode = _prediction(predictive(likelihood, _certain(seen.f.mean)))
        found = {"MAP": mode}
        if isinstance(scaling, TemperatureScaling):
            found["MAP + temperature"] = scaling(_logits(seen.f.mean, mode))
        elif scaling is not None:
            found["MAP + sigma scaling"] = scaling(mode)
        found["Laplace"] = _prediction(predictive(likelihood, seen.f, link, n_samples, generator))
        if seen.members:
            each = [_prediction(predictive(likelihood, _certain(f))) for f in seen.members]
            found[f"ensemble of {len(each)}"] = _mixed(each)
        return found

    test = _seen(la, loader, ensemble)
    y, kept = _labels(likelihood, test.targets)
    predictions = {name: p[kept] if isinstance(p, Tensor) else p for name, p in rows(test).items()}
    outside = None if ood is None else rows(_seen(la, ood, ensemble, with_targets=False))
    notes = [*page.pop("notes", ()), _about(scaling), f"Laplace: {la!r}."]
    # Several events of an example, or labels that are missing: rows are no examples.
    rowwise = test.inputs is not None and len(test.inputs) == len(y) and bool(kept.all())
    page = {"inputs": test.inputs if rowwise else None, "focus": "Laplace"} | page
    return report(predictions, y[kept], ood=outside, notes=notes, **page)


def _seen(la: Predictions, data: Iterable[Any], ensemble: Sequence[nn.Module], *, with_targets: bool = True) -> _Seen:
    """One pass over the data.

    Raises:
        TypeError: if the ensemble is a single network.
        ValueError: if there are none, or examples have weights.
    """
    if isinstance(ensemble, nn.Module):  # an nn.Sequential would be read as a list of its layers
        raise TypeError(f"The ensemble is one {type(ensemble).__name__}; expected a list of networks.")
    means, covariances, targets, inputs = [], [], [], []
    members: list[list[Tensor]] = [[] for _ in ensemble]
    for number, batch in numbered(data):
        x, y, weights = unpack(batch, number) if with_targets else (_inputs(batch, number), None, None)
        if weights is not None:
            raise ValueError("The batches have weights of the examples; expected none: all count alike here.")
        f = la.function_distribution(x)
        outputs = f.mean.shape[-1]
        means.append(f.mean.reshape(-1, outputs))
        covariances.append(f.covariance.reshape(-1, outputs, outputs))
        for found, member in zip(members, ensemble, strict=True):
            found.append(_outputs(la, member, x).reshape(-1, outputs).to(f.mean))
        if y is not None:
            checked = la.likelihood.check(f.mean, y.to(f.mean.device), la.output_axis)
            targets.append(checked.reshape(len(means[-1]), -1))
        inputs.append(x)
    if not means:
        raise ValueError("There is no batch in the data. A generator can be run through once only: give a loader.")
    shown = torch.cat(inputs) if all(isinstance(x, Tensor) for x in inputs) else None
    return _Seen(
        FunctionDistribution(torch.cat(means), torch.cat(covariances)),
        tuple(torch.cat(found) for found in members),
        torch.cat(targets) if targets else torch.empty(0),
        shown if shown is not None and len(shown) == sum(map(len, means)) else None,
    )


def _inputs(batch: Any, number: int) -> Any:
    """The inputs of a batch that may or may not have targets."""
    if isinstance(batch, Mapping):
        return as_tensors({key: value for key, value in batch.items() if key not in TARGET_KEYS})
    if isinstance(batch, (tuple, list)):
        return as_tensors(batch[0]) if len(batch) == 1 else unpack(batch, number)[0]
    return as_tensors(batch)


def _outputs(la: Predictions, model: nn.Module, x: Any) -> Tensor:
    """What another network gives for the same inputs, in the same form."""
    engine = Engine(model, Parameters.of(model), forward_fn=la.forward_fn, output_axis=la.output_axis)
    with borrowed(model, engine.parameters):
        return engine.outputs(to_device(x, engine.parameters.device)).detach()


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


@_prediction.register
def _(distribution: MultivariateNormal) -> MultivariateNormal:
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


def _scaling(likelihood: Likelihood, seen: _Seen) -> TemperatureScaling | SigmaScaling:
    """What is fitted to held-out data."""
    mode = _prediction(predictive(likelihood, _certain(seen.f.mean)))
    y, kept = _labels(likelihood, seen.targets)
    if isinstance(mode, Tensor):
        return TemperatureScaling.fit(_logits(seen.f.mean, mode)[kept], y[kept])
    return SigmaScaling.fit(mode, y)


def _mixed(members: Sequence[Any]) -> Any:
    """The mixture of an ensemble's predictions, with equal weights."""
    if isinstance(members[0], Tensor):
        return torch.stack(list(members)).mean(0)
    mean = torch.stack([member.mean for member in members], dim=1)
    root = torch.stack([member.scale_tril for member in members], dim=1)
    weights = CategoricalDistribution(logits=mean.new_zeros(mean.shape[:2]))
    return MixtureSameFamily(weights, MultivariateNormal(mean, scale_tril=root))


def _about(scaling: TemperatureScaling | SigmaScaling | None) -> str:
    if scaling is None:
        return "MAP is not recalibrated: that takes validation=, batches held out from training and from this test."
    return f"MAP is recalibrated by {scaling!r}, fitted to held-out data."
