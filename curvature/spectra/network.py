"""A model and the weights it had when a batch was looked at: run again for more, or refused if it has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.vectors import agree

CHANGED = (
    "The {what} since the analysis was made, so that its eigenvectors would be those of something else. Ask for all "
    "vectors, steps and products before the weights are changed or the tensors of the batch are filled anew, under the "
    "same autocast; or call vivit again."
)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and what came out.

    Args:
        x: a batch of inputs.
        f: the outputs, `(N, *, C)`, detached.
    """

    x: Any
    f: Tensor

    def __len__(self) -> int:
        return len(self.f)


class Network:
    """Runs a model; its engine remembers what it has verified.

    Args:
        model: the network.
        parameters: the selected weights.
        engine: for both.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, engine: Engine) -> None:
        self.model, self.parameters, self.engine = model, parameters, engine
        self._versions = [p._version for p in parameters.tensors]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The model, borrowed.

        Raises:
            RuntimeError: if its weights have been written to.
        """
        if self._versions != [p._version for p in self.parameters.tensors]:
            raise RuntimeError(CHANGED.format(what="weights have changed"))
        with borrowed(self.model, self.parameters):
            yield

    def backprop(self, seen: Examples) -> Backprop:
        """The pass of some examples, ready for columns."""
        backprop = self.engine(seen.x)
        self._check(backprop.output, seen)
        return backprop

    def outputs(self, seen: Examples) -> Tensor:
        """The outputs of some examples with their graph."""
        output = self.engine.outputs(seen.x)
        self._check(output, seen)
        return output

    @staticmethod
    def _check(output: Tensor, seen: Examples) -> None:
        """Refuse a pass that differs from the first.

        Raises:
            RuntimeError: if it does.
        """
        if output.shape != seen.f.shape or not agree([summable(output.detach())], [seen.f]):
            raise RuntimeError(CHANGED.format(what="outputs of the model have changed"))
