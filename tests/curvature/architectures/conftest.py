"""The networks as a fixture, with everything about one batch that tests compare with, computed by brute force."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import oracles
import pytest
import torch
from networks import brute_force
from networks.cases import CASES, Case
from torch import Tensor, nn
from torch.nn import functional as F

from lapkit.curvature import Parameters

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from configurations; nothing may be looked for


@dataclass(frozen=True)
class Problem:
    """A network, a batch of three examples with labels, and the slow truth about both.

    Shapes: N examples, T positions (none for classifiers), C classes, P weights.
    """

    case: Case
    model: nn.Module
    parameters: Parameters
    x: Any
    examples: int = 3

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        return brute_force.jacobian(self.model, self.x, self.examples, self.case.outputs, self.case.cut)

    @property
    def outputs(self) -> Tensor:
        """(N, *, C)."""
        return self._truth[0]

    @property
    def jacobian(self) -> Tensor:
        """(N, *, C, P)."""
        return self._truth[1]

    @cached_property
    def labels(self) -> Tensor:
        """(N, *)."""
        shape = self.outputs.shape[:-1]
        return torch.arange(shape.numel()).reshape(shape) % self.outputs.shape[-1]

    @cached_property
    def ggn(self) -> Tensor:
        """Of the sum of cross entropies over examples and positions, (P, P)."""
        loss = lambda f, y: F.cross_entropy(f[None], y[None])  # noqa: E731
        hessians = oracles.output_hessian(loss, self.outputs.flatten(0, -2), self.labels.flatten())
        return oracles.ggn(self.jacobian.flatten(0, -3), hessians)

    @cached_property
    def gradients(self) -> Tensor:
        """Of each example's cross entropy, (N, P)."""
        residual = self.outputs.softmax(-1) - F.one_hot(self.labels, self.outputs.shape[-1])
        return torch.einsum("n...c,n...cp->np", residual, self.jacobian)

    def close(self, actual: Tensor, expected: Tensor) -> None:
        """To the case's tolerance, of the largest entry: some derivatives are zero but for rounding."""
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=self.case.tolerance * scale)


def build(name: str) -> tuple[Case, nn.Module]:
    """A case and its network."""
    case = CASES[name]
    with warnings.catch_warnings():
        # peft asks transformers for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return case, case.build()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _problem(name: str) -> Problem:
    """Made once: the slow truth takes most of the time, and the engine gives a model back as it was."""
    case, model = build(name)
    return Problem(case, model, Parameters.of(model), case.inputs(3))


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest) -> Problem:
    for package in CASES[request.param].requires:
        pytest.importorskip(package)
    torch.set_default_dtype(CASES[request.param].dtype)
    return _problem(request.param)
