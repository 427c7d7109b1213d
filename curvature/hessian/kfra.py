"""KFRA: Kronecker factors of the GGN from averages between modules, whose cost grows neither with data nor classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import forward
from lapkit.curvature.hessian.hbp_averages import Outer, passes
from lapkit.curvature.hessian.hbp_chain import Stage
from lapkit.curvature.hessian.hbp_modes import mode_of
from lapkit.curvature.hessian.hbp_propagation import ModuleLink
from lapkit.curvature.hessian.hbp_trace import Tracer
from lapkit.curvature.jacobians.jacobian import LayerJacobian, averaged, summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import default_budget
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.vectors import twice_differentiable
from lapkit.curvature.quantities.quantity import described
from lapkit.curvature.quantities.results import CurvatureSum


@final
class AveragedFactors(CurvatureSum):
    """One Kronecker product for each weight, `rows/NAME` `(G, R, R)` and `columns/NAME` `(G, C, C)`.

    Biases have their dense block in `block/NAME`.
    """

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "KFRA's factors are made of averages over all the data between any two layers, so those of two parts do "
            "not add up. Call kfra on all the data, or use GGNKronecker, whose sums do."
        )

    def operator(self) -> BlockDiagonal:
        """One block for each parameter, summed over examples."""
        rows, columns, blocks = self.part("rows"), self.part("columns"), self.part("block")
        return BlockDiagonal(
            tuple(
                KroneckerProduct(rows[n].clone(), columns[n].clone()) if n in rows else Dense(blocks[n].clone())
                for n in self.shapes
            )
        )


def kfra(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    parameters: Parameters | Iterable[str] | None = None,
    memory_budget: int | None = None,
    output_axis: int | None = None,
) -> AveragedFactors:
    """`N G (x) A` for each weight and `N G` for each bias, with the averaged GGN G at the layer's output.

    `G_x = E[J^T G_z J]` starts from the mean loss Hessian; A is the mean of `a a^T` over examples. For convolutions A
    is also a mean and G a sum over positions, as in KFAC's expand setting, so that the trace of the product is near
    that of the block.

    Args:
        model: a chain of modules; it is given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)` that can be gone through several times, once for each module.
        parameters: the weights, or names of parameters or modules; all trainable ones by default.
        memory_budget: bytes that intermediates may take; an `(h, h)` matrix between two modules must fit.
        output_axis: the axis of classes in the outputs.

    Returns:
        One Kronecker product for each weight and one dense block for each bias, summed over examples; `operator()` is
        the matrix.

    Raises:
        ValueError: if the model is no chain, a matrix between two modules would not fit into memory, or the data is
            empty or can be gone through only once.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> data = [(torch.ones(4, 1), torch.zeros(4, 1))]
        >>> kfra(torch.nn.Linear(1, 1), Gaussian(), data).operator().diagonal()
        tensor([4., 4.])

    Reference:
        Botev, Ritter and Barber, Practical Gauss-Newton optimisation for deep learning, 2017; Dangel, Backpropagation
        Beyond the Gradient, eq. (B.17).
    """
    parameters = Parameters.selected(model, parameters)
    parameters.check_finite()
    budget = default_budget(parameters.device) if memory_budget is None else memory_budget
    found: dict[str, Tensor] = {}
    with borrowed(model, parameters), twice_differentiable(model):
        tracer = Tracer(model, parameters, likelihood, mode_of("ggn"), open_skips=False, output_axis=output_axis)
        for stage, average, links, count in passes(tracer, data, Outer, budget):  # noqa: B007 (the same each time)
            found.update(_factors(stage, average.top, links, parameters, budget))
    shapes = {name: tuple(p.shape) for name, p in zip(parameters.names, parameters.tensors, strict=True)}
    about = {"curvature": "kfra", "likelihood": described(likelihood)}
    return AveragedFactors(shapes, found, count, about)


def _factors(
    stage: Stage, top: Tensor, links: Callable[[], Iterator[ModuleLink]], parameters: Parameters, budget: int
) -> dict[str, Tensor]:
    """The tensors of one module's weights: a root of the averaged matrix is sent back into them."""
    chosen = parameters.subset(name in stage.weights for name in parameters.names)
    factors = {name: _Factors(kronecker=p.ndim > 1) for name, p in zip(chosen.names, chosen.tensors, strict=True)}
    engine = Engine(stage.module, chosen, memory_budget=budget)
    for link in links():
        backprop = engine(link.derivatives.x)
        columns = _root(top, link, chosen)
        columns = columns[:, None].expand(len(columns), *backprop.output.shape)
        plan = backprop.plan(len(columns))
        for start in range(0, len(columns), plan.chunk):

            def take(name: str, jacobian: LayerJacobian, first: bool = start == 0) -> None:
                factors[name].add(jacobian, first=first)

            backprop(columns[start : start + plan.chunk], take, plan)
    return {f"{key}/{name}": t for name, found in factors.items() for key, t in found.tensors().items()}


def _root(top: Tensor, link: ModuleLink, chosen: Parameters) -> Tensor:
    """Columns `(K, *, C)` in the form of the engine's outputs, with `sum_k c_k c_k^T` the matrix."""
    values, vectors = torch.linalg.eigh((top + top.T) / 2)
    columns = (vectors * values.clamp_min(0).sqrt()).T.unflatten(1, link.derivatives.delta.shape[1:])
    return forward(link.derivatives.module, columns, chosen, forward_fn=lambda _, given: given)


class _Factors:
    """Sums over columns, examples and positions.

    Args:
        kronecker: whether two factors are kept, or the dense block.
    """

    def __init__(self, *, kronecker: bool) -> None:
        self.kronecker, self.transposed = kronecker, False
        self.outputs: Tensor | None = None
        self.inputs: Tensor | None = None
        self.count: float | Tensor = 0.0

    def add(self, jacobian: LayerJacobian, *, first: bool) -> None:
        """Take the Jacobian of some columns of some examples; inputs are the same for all columns."""
        outputs = summable(jacobian.output_moment() if self.kronecker else jacobian.block())
        self.outputs = outputs if self.outputs is None else self.outputs + outputs
        if first and self.kronecker:
            inputs, count = jacobian.input_moment()
            self.inputs = inputs if self.inputs is None else self.inputs + inputs
            self.count = self.count + count
            self.transposed = jacobian.transposed

    def tensors(self) -> dict[str, Tensor]:
        """The factors of rows and columns, or the dense block."""
        assert self.outputs is not None  # a module with weights was passed
        if self.inputs is None:
            return {"block": self.outputs}
        a = averaged(self.inputs, self.count)
        rows, columns = (a, self.outputs) if self.transposed else (self.outputs, a)
        return {"rows": rows, "columns": columns}
