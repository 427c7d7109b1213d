"""What pruning was predicted to cost, and what it does cost: the quadratic model tested on the data it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature import Parameters, borrowed
from lapkit.curvature.accumulate import EMPTY
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.laplace import Laplace
from lapkit.posteriors import GaussianPrior
from lapkit.pruning.result import PruneResult
from lapkit.training import negative_log_posterior

SHARE = 0.5  # of the prediction, by which it may be wrong
NEGLIGIBLE = 1e-3  # nats an example, by which it may be wrong in any case


@dataclass(frozen=True)
class PruneReport:
    """Predicted and actual change of the negative log posterior, in nats summed over the data.

    Args:
        result: what was pruned.
        predicted: by curvature, `d^T P d / 2`.
        slope: `g^T d` with the gradient g before pruning, which is zero at a mode and then left out of the prediction.
        actual: what the negative log posterior does change by.
        actual_loss: the part of it that is the data's.
        predicted_loss: its prediction: the prior's part is known exactly.
        examples: how many there were.
    """

    result: PruneResult
    predicted: float
    slope: float
    actual: float
    actual_loss: float
    predicted_loss: float
    examples: float

    @property
    def tolerance(self) -> float:
        """By how much a prediction may be wrong: by half of itself, or by a thousandth of a nat for each example."""
        return max(SHARE * abs(self.predicted), NEGLIGIBLE * self.examples)

    @property
    def at_mode(self) -> bool:
        """Whether the network was at a minimum, as far as this change can tell."""
        return abs(self.slope) <= self.tolerance

    @property
    def trusted(self) -> bool:
        """Whether the quadratic model, with its slope, has predicted the change: it is inside its trust region."""
        return abs(self.actual - self.predicted - self.slope) <= self.tolerance

    @property
    def verdict(self) -> str:
        """In words."""
        words = []
        if not self.at_mode:
            words.append(
                f"The network was not at a minimum of the negative log posterior: its slope says "
                f"{self.slope:+.4g} nats. Train it longer, with the prior of this Laplace as weight decay."
            )
        if not self.trusted:
            words.append(
                f"The quadratic model has left its trust region: it errs by "
                f"{self.actual - self.predicted - self.slope:+.4g} nats. Prune less at once: smaller rounds with new "
                "curvature (prune_gradually)."
            )
        return " ".join(words) or "The quadratic model holds."

    def __str__(self) -> str:
        rows = [
            ("curvature, d'Pd/2", f"{self.predicted:+.4g}"),
            ("slope, g'd", f"{self.slope:+.4g}"),
            ("actual", f"{self.actual:+.4g}"),
            ("of which loss", f"{self.actual_loss:+.4g} (predicted {self.predicted_loss:+.4g})"),
        ]
        table = "\n".join(f"{name:<20}{value}" for name, value in rows)
        return f"{self.result}\n\nchange of the negative log posterior, nats\n{table}\n{self.verdict}"


def report(la: Laplace, result: PruneResult, data: Iterable[Any]) -> PruneReport:
    """Compare what pruning was predicted to cost with what it costs on the data.

    Args:
        la: that was pruned, with the weights that were fitted still in its network.
        result: of `prune`; not yet applied to that network, or to a copy of it.
        data: the batches that were fitted; gone through twice.

    Returns:
        The comparison, which prints as a table with a verdict.

    Raises:
        TypeError: if the data can be run through only once.
        ValueError: if the network's weights are not those that were fitted, or there are no data.
    """
    if isinstance(data, Iterator):
        raise TypeError(f"The report reads the data twice; a {type(data).__name__} is used up after one pass.")
    quadratic, parameters = result.quadratic, result.parameters
    before = parameters.vector()
    if not torch.equal(before[quadratic.places], quadratic.weights.to(before.dtype)):
        raise ValueError(
            "The network's weights are not those that were fitted: it was pruned or trained since. Report before "
            "result.apply(), or apply to a copy: result.pruned()."
        )
    after = torch.cat([w.flatten() for w in result.weights.values()])
    change = (after.double() - before.double())[quadratic.places]
    loss, gradient, examples = _misfit(la, parameters, data, differentiate=True)
    if not examples:
        raise ValueError(EMPTY)
    with _weights(parameters, after):
        pruned, _, _ = _misfit(la, parameters, data, differentiate=False)
    delta, deviation = quadratic.prior_precision, quadratic.weights - quadratic.prior_mean
    of_prior = float((delta * (deviation + change / 2) * change).sum())
    slope = float(gradient[quadratic.places] @ change + (delta * deviation * change).sum())
    predicted = float(quadratic.increase(change))
    return PruneReport(
        result,
        predicted,
        slope,
        pruned - loss + of_prior,
        pruned - loss,
        predicted + slope - of_prior,
        examples,
    )


@contextmanager
def _weights(parameters: Parameters, values: Tensor) -> Iterator[None]:
    """Other weights in the network for a while."""
    before = [p.detach().clone() for p in parameters.tensors]
    try:
        with torch.no_grad():
            for p, part in zip(parameters.tensors, parameters.split(values).values(), strict=True):
                p.copy_(part)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters.tensors, before, strict=True):
                p.copy_(value)


def _misfit(
    la: Laplace, parameters: Parameters, data: Iterable[Any], *, differentiate: bool
) -> tuple[float, Tensor, float]:
    """`-log p(y|w) / T` up to constants, its gradient `(P,)` and the number of examples."""
    total, examples, gradient = 0.0, 0.0, torch.zeros(parameters.numel, dtype=torch.float64, device=parameters.device)
    terms = negative_log_posterior(
        la.model,
        parameters,
        la.likelihood,
        GaussianPrior(),
        la.temperature,
        forward_fn=la.forward_fn,
        output_axis=la.output_axis,
    )
    with borrowed(la.model, parameters), torch.set_grad_enabled(differentiate):
        for number, batch in numbered(data):
            x, y, weights = to_device(unpack(batch, number), parameters.device)
            loss, _ = terms(x, y, weights)
            total += float(loss.detach())
            examples += len(y) if weights is None else float(weights.sum())
            if differentiate:
                found = torch.autograd.grad(loss, parameters.tensors, allow_unused=True)
                parts = zip(found, parameters.tensors, strict=True)
                gradient += torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts]).double()
    return total, gradient, examples
