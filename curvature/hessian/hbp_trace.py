"""A batch sent through the chain and back: inputs of every module, loss gradients at its output, the loss Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.callers import callers_level
from lapkit.curvature.capture.forward import canonical, forward
from lapkit.curvature.capture.self_check import TOLERANCE, check_examples_apart
from lapkit.curvature.hessian.hbp_chain import REMEDY, Stage, stages_of
from lapkit.curvature.hessian.hbp_derivatives import Derivatives
from lapkit.curvature.hessian.hbp_loss import OutputLoss
from lapkit.curvature.hessian.hbp_modes import Mode
from lapkit.curvature.hessian.hbp_propagation import Link, Matrices, ModuleLink, SkipLink
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters, unwrapped
from lapkit.curvature.products.passes import Pass

Deltas = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Trace:
    """What one batch left.

    Args:
        links: the stages at this batch, in forward order.
        top: the loss Hessian at the output of the last one.
        count: the number of examples.
    """

    links: tuple[Link, ...]
    top: Matrices
    count: int


class Tracer:
    """Reads a model as a chain, checks on the first batch that it is one, and traces batches. Use inside `borrowed`.

    Args:
        model: the network.
        parameters: the selected weights.
        likelihood: of targets given outputs.
        mode: which curvature.
        open_skips: whether skip connections are entered, or count as one module.
        output_axis: the axis of classes in the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        likelihood: Likelihood,
        mode: Mode,
        *,
        open_skips: bool = True,
        output_axis: int | None = None,
    ) -> None:
        self.model, self.parameters, self.likelihood, self.mode = unwrapped(model), parameters, likelihood, mode
        self.open_skips, self.output_axis = open_skips, output_axis
        self.loss = OutputLoss(likelihood, mode, output_axis)
        self.stages: tuple[Stage, ...] = ()
        self.widest = 0  # the largest number of values between two modules, for one example
        self._alone: set[str] = set()  # stages whose columns must go one by one

    def __call__(self, x: Any, y: Tensor, weights: Tensor | None = None) -> Trace:
        """Forward and back.

        Args:
            x: a batch of inputs, a tensor.
            y: its targets.
            weights: of the examples, `(N,)`.

        Returns:
            The stages at this batch.

        Raises:
            ValueError: if the model is no chain, examples influence each other, or targets do not fit.
            RuntimeError: if the chain's own gradient is not autograd's.
        """
        if not self.stages:
            self.prepare(x, y, weights)
        return self._trace(x, y, weights)

    def prepare(self, x: Any, y: Tensor, weights: Tensor | None = None) -> None:
        """Read the model as a chain and check it on a batch.

        Raises:
            ValueError: if the model is no chain, examples influence each other, or targets do not fit.
            RuntimeError: if the chain's own gradient is not autograd's.
        """
        self.stages = stages_of(self.model, self.parameters, x)
        trace = self._trace(x, y, weights)
        self._check(x, y, weights, trace)
        self.widest = max(link.derivatives.delta[0].numel() for link in trace.links)

    def check_repeatable(self, data: Iterable[Any]) -> None:
        """Compare the losses of two passes over data that is going to be read several times.

        Raises:
            ValueError: if they are not the same.
        """
        Pass(self.model, self.parameters, self.likelihood, data, None, self.output_axis).check_repeatable()

    def _trace(self, x: Any, y: Tensor, weights: Tensor | None) -> Trace:
        found: list[Matrices] = []

        def loss_derivatives(z: Tensor) -> Tensor:
            delta, matrices = self.loss.derivatives(z, y, weights)
            found.append(Matrices(matrices))
            return delta

        links = self._links(self.stages, x, loss_derivatives, to_input=False)
        return Trace(tuple(links), found[0], len(found[0].values))

    def _links(self, stages: Sequence[Stage], x: Any, deltas: Deltas, *, to_input: bool) -> list[Link]:
        """Forward through `stages`, then the gradient back, as far down as there are weights or to the input."""
        inputs = [x]
        with torch.no_grad():
            for stage in stages:
                here = inputs[-1]
                inputs.append(stage.module(here.clone() if isinstance(here, Tensor) else here))
        delta = deltas(inputs[-1])
        lowest = 0 if to_input else next(i for i, stage in enumerate(stages) if stage.weights)
        links: list[Link] = []
        for i in reversed(range(lowest, len(stages))):
            link = self._link(stages[i], inputs[i], delta)
            links.append(link)
            if to_input or i > lowest:
                whole = Derivatives(stages[i].module, inputs[i], delta) if stages[i].inner else link.derivatives
                delta = whole.pull(delta[None])[0]
        return links[::-1]

    def _link(self, stage: Stage, x: Tensor, delta: Tensor) -> Link:
        together = stage.name not in self._alone
        if not (stage.inner and self.open_skips):
            return ModuleLink(Derivatives(stage.module, x, delta, together=together), stage.weights, self.mode)
        skipped = stage.module.get_submodule("inner")
        inner = self._links(stage.inner, x, lambda _: delta, to_input=True)
        return SkipLink(Derivatives(skipped, x, delta, together=together), stage.weights, tuple(inner))

    def _check(self, x: Any, y: Tensor, weights: Tensor | None, trace: Trace) -> None:
        """The chain must be the model, its examples independent, and its derivatives autograd's.

        Raises:
            ValueError: if the model does something between its modules.
            RuntimeError: if a gradient differs.
        """
        output = forward(self.model, x, self.parameters, output_axis=self.output_axis)
        z = x
        with torch.no_grad():
            for stage in self.stages:
                z = stage.module(z.clone() if isinstance(z, Tensor) else z)
            chained = canonical(z, self.output_axis)
        tolerance = TOLERANCE[output.dtype]
        if output.shape != chained.shape or not bool((output - chained).abs().max() <= tolerance * output.abs().max()):
            raise ValueError(
                f"{type(self.model).__name__} computes something else than the chain of its modules "
                f"{[str(stage) for stage in self.stages]}: an operation in place between them, or a hook. {REMEDY}"
            )
        check_examples_apart(
            self.model, x, output, lambda x: forward(self.model, x, self.parameters, output_axis=self.output_axis)
        )
        self._check_gradient(output, y, weights, trace.links)
        self._check_columns(self.stages, trace.links, to_input=False)

    def _check_gradient(self, output: Tensor, y: Tensor, weights: Tensor | None, links: Sequence[Link]) -> None:
        """Compare the chain's gradient with autograd's.

        Raises:
            RuntimeError: if they differ.
        """
        total = self.loss.total(output, y, weights)
        wanted = dict(
            zip(
                self.parameters.names,
                torch.autograd.grad(total, self.parameters.tensors, materialize_grads=True),
                strict=True,
            )
        )
        scale = max(float(g.norm()) for g in wanted.values())
        for link in _modules(links):
            for name, local in link.weights.items():
                found = link.derivatives.pull_weight(local, link.derivatives.delta[None])[0]
                allowed = TOLERANCE[found.dtype] * (float(wanted[name].norm()) + 1e-3 * scale)
                if not float((found - wanted[name]).norm()) <= allowed:
                    raise RuntimeError(
                        f"The gradient of {name!r} that comes back through the chain of modules is not autograd's: "
                        f"the model is not the chain of its modules in some way that its outputs do not show. {REMEDY}"
                    )

    def _check_columns(self, stages: Sequence[Stage], links: Sequence[Link], *, to_input: bool) -> None:
        """Find the modules whose columns must go one by one."""
        above = stages[len(stages) - len(links) :]
        for i, (stage, link) in enumerate(zip(above, links, strict=True)):
            needed = to_input or i > 0
            module = isinstance(link, ModuleLink)
            if not link.derivatives.check(str(stage), to_input=needed, weights=link.weights if module else {}):
                self._alone.add(stage.name)
                warnings.warn(
                    f"Module {stage} cannot be differentiated in a batch of columns; columns go one by one, which is "
                    "slower but exact.",
                    stacklevel=callers_level(),
                )
            if isinstance(link, SkipLink):
                self._check_columns(stage.inner, link.inner, to_input=True)


def _modules(links: Sequence[Link]) -> list[ModuleLink]:
    """All modules of a chain, those inside skip connections included."""
    found: list[ModuleLink] = []
    for link in links:
        if isinstance(link, ModuleLink):
            found.append(link)
        elif isinstance(link, SkipLink):
            found.extend(_modules(link.inner))
    return found
