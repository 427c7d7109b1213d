"""Another library as a backend: what it is asked, what it offers, and its sums as lapkit's."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lapkit.backends.backend import Backend
from lapkit.backends.losses import check_targets, loss_of
from lapkit.choices import CURVATURES, STRUCTURES
from lapkit.curvature import GGN, Columns, EmpiricalFisher, Likelihood, MonteCarloGGN, Parameters, Subnetwork, borrowed
from lapkit.curvature.accumulate import EMPTY, Totals
from lapkit.curvature.capture.forward import ForwardFunction, forward
from lapkit.curvature.columns.sampling import seed_from
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.curvature.inspection import inspection
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.parameters import unwrapped
from lapkit.curvature.quantities.quantity import described
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.structures import Structure
from lapkit.subsets import Weights

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a library is asked.

    Args:
        model: a copy of the network in evaluation mode, in which the random weights alone require gradients.
        parameters: these, of the copy.
        loss: the library's, summed over the examples.
        factor: what it is of lapkit's loss.
        columns: which curvature.
        seed: for Monte Carlo curvature.
    """

    model: nn.Module
    parameters: Parameters
    loss: nn.Module
    factor: float
    columns: Columns
    seed: int = 0

    @property
    def scale(self) -> float:
        """What multiplies the library's curvature: gradients enter the empirical Fisher twice, as the noise does."""
        return self.factor**-self.columns.dispersion_power

    @property
    def samples(self) -> int:
        """Of Monte Carlo curvature; otherwise one."""
        return self.columns.samples if isinstance(self.columns, MonteCarloGGN) else 1


@dataclass(frozen=True)
class Kernel:
    """How a library computes one structure.

    Args:
        title: the structure, as users call it.
        result: what the tensors become.
        tensors: computes them for some batches, lapkit's sums.
        columns: the types of curvature that it can.
        about: settings of the result.
        uses: how often a parameter may be used in a forward pass.
        whole: whether all data have to be there at once, because what is found of parts does not add up.
    """

    title: str
    result: type[CurvatureSum]
    tensors: Callable[[Problem, Sequence[Batch]], dict[str, Tensor]]
    columns: tuple[type[Columns], ...]
    about: Mapping[str, str]
    uses: int = 1
    whole: bool = False


@final
@dataclass(frozen=True)
class Library(Backend):
    """Another library: for networks of modules that it knows, outputs `(N, C)`, and examples without weights.

    Args:
        name: under which it is chosen and imported.
        install: what pip is told.
        kernels: the structures that it can.
        prepare: makes a copied network, and the loss, such that the library can work with it.
    """

    name: str
    install: str
    kernels: Mapping[Structure, Kernel]
    prepare: Callable[[nn.Module], nn.Module]

    def check(self, structure: Structure, likelihood: Likelihood, columns: Columns) -> None:
        """See `Backend.check`.

        Raises:
            ValueError: if structure, likelihood or curvature are not offered.
            ImportError: if the library is not installed.
        """
        if find_spec(self.name) is None:
            raise ImportError(
                f"backend={self.name!r} needs the library: pip install {self.install}; with --no-deps where a CPU "
                "build of torch has to stay, as it asks for torchvision, and then what it imports by hand. "
                "backend='lapkit' needs nothing."
            )
        loss_of(likelihood, self.name)
        kernel = self.kernels.get(structure)
        if kernel is None or type(columns) not in kernel.columns or not _plain(columns):
            names = {type(own): repr(name) for name, own in CURVATURES.items()}
            offers = [f"{k.title!r} of {', '.join(names[c] for c in k.columns)}" for k in self.kernels.values()]
            asked = names[type(columns)] if _plain(columns) else described(columns)
            form = {own: repr(name) for name, own in STRUCTURES.items()}.get(structure, str(structure))
            raise ValueError(
                f"{self.name} does not compute the curvature {asked} in the structure {form}. It computes "
                f"{'; '.join(offers)}. backend='lapkit' computes every structure of every curvature."
            )

    def sum(
        self,
        structure: Structure,
        model: nn.Module,
        weights: Weights,
        likelihood: Likelihood,
        columns: Columns,
        data: Iterable[Any],
        *,
        generator: torch.Generator | None = None,
        forward_fn: ForwardFunction | None = None,
        output_axis: int | None = None,
        progress_bar: bool = False,
        total: int | None = None,
        **rest: Any,
    ) -> tuple[CurvatureSum, Totals]:
        """See `Structure.sum`; the memory budget is for lapkit's engine.

        Raises:
            ValueError: if single weights are random, the model is called by a function, there is no data, or the
                library cannot take a batch.
        """
        if isinstance(weights, Subnetwork) or forward_fn is not None or output_axis is not None:
            raise ValueError(
                f"{self.name} takes whole parameters, and a network that is called with its inputs: no subnetwork, "
                "forward_fn or output_axis. backend='lapkit' takes all of them."
            )
        with torch.inference_mode(False):  # a copy of ordinary tensors, whoever calls
            kernel, copied = self.kernels[structure], copy.deepcopy(unwrapped(model))
        owned = dict(copied.named_parameters())
        chosen = Parameters(weights.names, tuple(owned[name] for name in weights.names))
        loss, factor = loss_of(likelihood, self.name)
        with borrowed(model, weights), borrowed(copied, chosen):
            with self._asked(kernel):
                problem = Problem(self.prepare(copied), chosen, self.prepare(loss), factor, columns)
            bar = tqdm(data, desc=self.name, total=total, disable=not progress_bar, leave=False)
            examined = self._examined(model, weights, likelihood, bar, kernel.uses)
            last = deque(self._parts(kernel, problem, described(likelihood), examined, generator), maxlen=1)
        if not last:
            raise ValueError(EMPTY)
        sums, totals = last[0]
        return sums, totals.to(dtype=torch.promote_types(chosen.dtype, torch.float32))

    def _parts(
        self,
        kernel: Kernel,
        problem: Problem,
        likelihood: str,
        examined: Iterable[tuple[Batch, Totals]],
        generator: torch.Generator | None,
    ) -> Iterator[tuple[CurvatureSum, Totals]]:
        """What has been summed after each batch, or after all of them where they have to be there at once."""
        shapes = {n: tuple(p.shape) for n, p in zip(problem.parameters.names, problem.parameters.tensors, strict=True)}
        about = {"backend": self.name, "columns": described(problem.columns), "likelihood": likelihood, **kernel.about}
        found: tuple[CurvatureSum, Totals] | None = None
        for part in filter(None, [list(examined)]) if kernel.whole else ([one] for one in examined):
            seeded = replace(problem, seed=seed_from(generator) if problem.columns.random else 0)
            with self._asked(kernel):
                tensors = kernel.tensors(seeded, [batch for batch, _ in part])
            totals = reduce(operator.add, (own for _, own in part))
            kept = {key: summable(t.detach()) for key, t in tensors.items()}
            sums = kernel.result(shapes, kept, totals.count, about)
            found = (sums, totals) if found is None else (found[0] + sums, found[1] + totals)
            yield found

    def _examined(
        self, model: nn.Module, weights: Parameters, likelihood: Likelihood, data: Iterable[Any], uses: int
    ) -> Iterator[tuple[Batch, Totals]]:
        """Each batch in the form that libraries take, with what lapkit sums beside the curvature.

        Raises:
            ValueError: if a batch has no such form, or a parameter is used more often than the library knows.
        """
        for number, batch in numbered(data):
            x, y, of_examples = to_device(unpack(batch, number), weights.device)
            f = summable(forward(model, x, weights).detach()) if isinstance(x, Tensor) else None
            if of_examples is not None or f is None or f.ndim != 2:
                raise ValueError(
                    f"{self.name} takes inputs in one tensor, outputs (N, C) and examples without weights, which batch "
                    f"{number} is not. backend='lapkit' takes all of them."
                )
            if number == 0:
                self._check_uses(model, x, weights, uses)
            y = likelihood.check(f, y)
            check_targets(likelihood, y, self.name)
            yield (x, y), Totals(likelihood.loss(f, y).double().sum(), len(f), f.shape[1], len(f))

    def _check_uses(self, model: nn.Module, x: Tensor, weights: Parameters, uses: int) -> None:
        """Refuse shared weights, of which some libraries see one use, or count each for itself.

        Raises:
            ValueError: if there are any.
        """
        shared = [row.name for row in inspection(model, x, parameters=weights).rows if len(row.operations) > uses]
        if shared:
            raise ValueError(
                f"The parameters {shared} are used more than once in a forward pass, which {self.name} does not add up "
                "in this structure. backend='lapkit' does."
            )

    @contextmanager
    def _asked(self, kernel: Kernel) -> Iterator[None]:
        """The library at work: without its warnings, and with its errors in words that say what to do.

        Raises:
            ValueError: if the library fails.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as e:
            raise ValueError(
                f"{self.name} could not compute {kernel.title!r} of this network ({type(e).__name__}: {e}). It takes "
                "networks of modules that it knows, each used once. backend='lapkit' takes any."
            ) from e


def _plain(columns: Columns) -> bool:
    """Whether columns have no settings that a library would not see."""
    return columns in (GGN(), EmpiricalFisher()) or (isinstance(columns, MonteCarloGGN) and columns.seed is None)
