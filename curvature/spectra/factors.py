"""The factors of one batch's curvature and gradient: small in the space of outputs, sent back when they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns, LossGradient
from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.inputs import can_be_cut, map_tensors
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import default_budget
from lapkit.curvature.products.vectors import agree
from lapkit.curvature.spectra.network import Examples, Network


@dataclass(frozen=True, eq=False)
class Factors:
    """`G = V V^T` with `V = (J_n^T s_kn)` and the gradients `g_n = J_n^T r_n`, by what is sent back for them.

    Args:
        network: the model.
        batch: all N examples.
        part: the examples that columns are sent back through, the same object as `batch` for all of them.
        index: which `N_c` of all examples have curvature, `(N_c,)`.
        places: where those stand in `part`, `(N_c,)`.
        columns: `s`, `(K, N_c, *, C)`, divided by the root of `N_c`.
        residuals: `r`, `(N, *, C)`, or None if gradients are not wanted.
    """

    network: Network
    batch: Examples
    part: Examples
    index: Tensor
    places: Tensor
    columns: Tensor
    residuals: Tensor | None

    @property
    def separate(self) -> bool:
        """Whether columns go back through a batch of their own."""
        return self.part is not self.batch

    def in_part(self, columns: Tensor) -> Tensor:
        """Columns `(R, N_c, *, C)` among zeros for the other examples of `part`."""
        return _placed(columns, self.places, len(self.part))

    def in_batch(self, columns: Tensor) -> Tensor:
        """Columns `(R, N_c, *, C)` among zeros for the other examples of the batch."""
        return _placed(columns, self.index, len(self.batch))


def _placed(columns: Tensor, places: Tensor, count: int) -> Tensor:
    if len(places) == count and torch.equal(places, torch.arange(count, device=places.device)):
        return columns
    spread = columns.new_zeros(len(columns), count, *columns.shape[2:])
    spread[:, places] = columns
    return spread


@dataclass(frozen=True, eq=False)
class Loss:
    """What the outputs of a batch are compared with.

    Args:
        likelihood: of targets given outputs.
        y: checked targets.
        weights: of the examples, `(N,)`, if they have any.
        draws: for random columns.
    """

    likelihood: Likelihood
    y: Tensor
    weights: Tensor | None
    draws: Draws | None

    def residuals(self, f: Tensor) -> Tensor:
        """`d loss / df` of each example, `(N, *, C)`."""
        index = torch.arange(len(f), device=f.device)
        return self.columns(LossGradient(), f, index)[0]

    def columns(self, columns: Columns, f: Tensor, index: Tensor, groups: int = 1) -> Tensor:
        """The columns of some examples, `(K, n, *, C)`, times their weights.

        Raises:
            ValueError: if their inner products would not fit into memory for so many groups of weights.
        """
        draws = None if self.draws is None else Draws(self.draws.seed, self.draws.keys[index])
        found = columns(self.likelihood, f[index], self.y[index], draws)
        _check_fits(len(found), len(index), groups, f)
        values = found[:]
        if self.weights is None:
            return values
        return values * (self.weights[index] ** columns.weight_power).reshape(-1, *[1] * (f.ndim - 1))


def _check_fits(columns: int, examples: int, groups: int, f: Tensor) -> None:
    """Refuse before memory runs out.

    Raises:
        ValueError: if the Gram matrices would take more than there is.
    """
    # One is taken at a time to be decomposed in double precision: itself and its eigenvectors.
    needed = (columns * examples) ** 2 * ((groups + 1) * f.element_size() + 16)
    if needed > 4 * default_budget(f.device):
        raise ValueError(
            f"The Gram matrices of {columns} columns and {examples} examples, for {groups} groups of weights, would "
            f"take {needed / 2**30:.3g} GiB, more than is free. Take fewer columns (MonteCarloGGN), fewer "
            "curvature_examples or fewer groups; for whole data sets there is largest_eigenpairs(GGNProduct(...))."
        )


def part_of(network: Network, batch: Examples, index: Tensor) -> tuple[Examples, Tensor]:
    """The examples with curvature as a batch of their own, where they can be one; and where they stand in it.

    A batch that cannot be cut, or gives other outputs when it is, is sent through as a whole.

    Args:
        network: the model, borrowed.
        batch: all examples.
        index: which have curvature.

    Returns:
        The batch and the places of the examples in it.
    """
    count = len(batch)
    if len(index) == count or not can_be_cut(batch.x, count):
        return batch, index
    x = map_tensors(lambda t: t[index.to(t.device)] if t.ndim > 0 else t, batch.x)
    f, expected = summable(network.engine.outputs(x).detach()), batch.f[index]
    if f.shape != expected.shape or not agree([f], [expected]):
        return batch, index
    return Examples(x, f), torch.arange(len(index), device=index.device)
