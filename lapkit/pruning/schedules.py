"""Pruning in rounds, each by the curvature of the network that the last one has left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from lapkit.laplace import Laplace
from lapkit.pruning.prune import prune
from lapkit.pruning.quadratic import Quadratic
from lapkit.pruning.refitting import surviving
from lapkit.pruning.result import PruneResult

Train = Callable[[nn.Module], Any]


def cubic_schedule(final: float, steps: int, start: float = 0.0) -> list[float]:
    """Sparsities `s_f + (s_0 - s_f) (1 - t / n)^3`, t = 1 .. n: many weights go early, few late.

    Args:
        final: the last sparsity.
        steps: how many, n.
        start: what is gone already.

    Returns:
        n sparsities, ascending.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> cubic_schedule(0.8, 4)
        [0.4625, 0.7, 0.7875, 0.8]

    Reference:
        Zhu and Gupta, To prune, or not to prune, 2017, eq. (1).
    """
    if steps < 1 or not 0 <= start <= final < 1:
        raise ValueError(f"Expected steps >= 1 and 0 <= start <= final < 1, got {steps}, {start} and {final}.")
    return [final + (start - final) * (1 - t / steps) ** 3 for t in range(1, steps + 1)]


@dataclass(frozen=True, eq=False)
class GradualResult:
    """What pruning in rounds leaves.

    Args:
        laplace: the posterior over the surviving weights of the pruned network, a copy of the one that was fitted.
        rounds: what each round has decided.
    """

    laplace: Laplace
    rounds: tuple[PruneResult, ...]

    @property
    def model(self) -> nn.Module:
        """The pruned network, its zeros written into the weights."""
        return self.laplace.model

    @property
    def sparsity(self) -> float:
        """The fraction of units that have gone."""
        return self.rounds[-1].sparsity


def prune_gradually(
    la: Laplace,
    data: Iterable[Any],
    schedule: Sequence[float],
    criterion: str = "obs",
    *,
    train: Train | None = None,
    tune: bool = False,
    **options: Any,
) -> GradualResult:
    """Prune a little, train if wanted, sum the curvature of what is left, and so on.

    One round at a high sparsity leaves the region in which the quadratic model holds; several follow the loss.

    Args:
        la: fitted, on whole parameters. Its network stays as it is.
        data: the batches that were fitted, in a container that can be read many times.
        schedule: ascending sparsities, such as `cubic_schedule(0.9, 5)`.
        criterion: see `prune`.
        train: called with the network after each round, to train it further in place. Its weights carry masks
            meanwhile, so that what has gone stays zero whatever the optimiser does.
        tune: optimise one prior precision by marginal likelihood after each fit.
        options: more for `prune`.

    Returns:
        The posterior, with its network, and the rounds.

    Raises:
        TypeError: if the data can be run through only once.
        ValueError: if the schedule does not ascend, or `prune` refuses something.
    """
    if isinstance(data, Iterator):
        raise TypeError(f"Pruning in rounds reads the data many times; a {type(data).__name__} is used up after one.")
    if not schedule or list(schedule) != sorted(schedule):
        raise ValueError(f"A schedule is a list of ascending sparsities, got {list(schedule)}.")
    rounds: list[PruneResult] = []
    names = None  # sparsities are of the same units in each round
    for sparsity in schedule:
        rounds.append(prune(Quadratic.of(la, names), sparsity, criterion, **options))
        names = rounds[0].parameters.names
        model = rounds[-1].pruned()
        if train is not None:
            masked = rounds[-1].apply(copy.deepcopy(model))
            train(masked)
            model.load_state_dict(make_permanent(masked).state_dict())
        la = surviving(la, rounds[-1], data, model)
        if tune:
            la.optimize_prior_precision()
    return GradualResult(la, tuple(rounds))


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network that may carry masks, whose products `copy.deepcopy` alone refuses.

    Args:
        model: with masks or without.

    Returns:
        A copy, with the same masks.
    """
    products = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    made: nn.Module = copy.deepcopy(model, {id(product): product.detach().clone() for product in products})
    return made


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the masks of `torch.nn.utils.prune` into the weights, in place.

    As torch does it, weights come after biases then in `model.parameters()`.

    Args:
        model: with masks or without.

    Returns:
        The same model.
    """
    for module in model.modules():
        masked = [n.removesuffix("_orig") for n, _ in module.named_parameters(recurse=False) if n.endswith("_orig")]
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        for name in masked:
            if f"{name}_mask" in buffers:  # others, such as a causal mask, are the network's own
                torch_prune.remove(module, name)
    return model
