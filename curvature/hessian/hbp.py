"""Hessian backpropagation: the diagonal blocks of Hessian, GGN and positive-curvature Hessian of a chain of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lapkit.curvature.hessian.hbp_averages import averaged_blocks, check_averaging
from lapkit.curvature.hessian.hbp_batches import check_block_sizes, pieces
from lapkit.curvature.hessian.hbp_blocks import CurvatureBlocks, parts_of
from lapkit.curvature.hessian.hbp_modes import mode_of
from lapkit.curvature.hessian.hbp_propagation import ActivationHessian, ModuleLink, descend
from lapkit.curvature.hessian.hbp_trace import Tracer
from lapkit.curvature.hessian.hbp_weights import add_blocks, link_blocks
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import default_budget
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.vectors import twice_differentiable
from lapkit.curvature.quantities.quantity import described


def hessian_blocks(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    mode: str = "hessian",
    averaging: str | None = None,
    parameters: Parameters | Iterable[str] | None = None,
    sub_blocks: int | Mapping[str, int] | None = None,
    memory_budget: int | None = None,
    output_axis: int | None = None,
) -> CurvatureBlocks:
    """One dense block for each parameter of a sequential network, summed over examples.

    The Hessian of each example's loss is sent from the outputs to the inputs, a module at a time,

        H_x = J_x^T H_z J_x + R_x        H_w = J_w^T H_z J_w + R_w        R = sum_k (nabla^2 z_k) delta_k

    and `mode` says what becomes of the residual R: "hessian" keeps it, "ggn" drops it, "pch-abs" and "pch-clip" replace
    its eigenvalues (for elementwise modules its entries) by their absolute values or by their positive parts.
    "hessian" starts from the second derivatives of the loss, the others from the likelihood's own root `S S^T`.

    With an average only one matrix is kept between two modules, instead of one for each example. Its size does not
    grow with the data, but the data is gone through once for each module. Residuals are averaged before the mode
    changes them.

    Args:
        model: a chain of modules; it is given back as it was.
        likelihood: of targets given outputs; any whose `loss` autograd can differentiate twice.
        data: batches `(inputs, targets)`, or `(inputs, targets, weights)` without averaging.
        mode: "hessian", "ggn", "pch-abs" or "pch-clip".
        averaging: None for exact blocks; "outer" for `E[J^T E[H] J]`, as in KFRA; "inner" for `E[J]^T E[H] E[J]`.
        parameters: the weights, or names of parameters or modules; all trainable ones by default.
        sub_blocks: cut each parameter along its first axis, the output units of a linear layer, into so many blocks,
            for all or by name.
        memory_budget: bytes that intermediates may take.
        output_axis: the axis of classes in the outputs.

    Returns:
        The blocks. Divide by `count` for those of the mean loss.

    Raises:
        ValueError: if the model is no chain, a matrix would not fit into memory, the mode or the averaging is unknown,
            or there is no data.
        RuntimeError: if derivatives contradict autograd's.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> data = [(torch.ones(4, 1), torch.zeros(4, 1))]
        >>> hessian_blocks(torch.nn.Linear(1, 1, bias=False), Gaussian(), data).to_dense()
        tensor([[4.]])

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (4.7), (4.8), (4.9) and section 4.3.1; Botev, Ritter and
        Barber, Practical Gauss-Newton optimisation for deep learning, 2017; Chen and others, BDA-PCH, 2019.
    """
    chosen = mode_of(mode)
    check_averaging(averaging)
    parameters = Parameters.selected(model, parameters)
    parameters.check_finite()
    budget = default_budget(parameters.device) if memory_budget is None else memory_budget
    shapes = {name: p.shape for name, p in zip(parameters.names, parameters.tensors, strict=True)}
    parts = parts_of(shapes, sub_blocks)
    check_block_sizes(parameters, parts, budget)
    about = {"mode": mode, "averaging": str(averaging), "likelihood": described(likelihood)}
    with borrowed(model, parameters), twice_differentiable(model):
        tracer = Tracer(model, parameters, likelihood, chosen, open_skips=averaging is None, output_axis=output_axis)
        if averaging is not None:
            sums, count = averaged_blocks(tracer, data, parts, averaging, budget)
        else:
            sums, count = _exact_blocks(tracer, data, parts, budget)
    return CurvatureBlocks.of(sums, shapes, count, about)


def _exact_blocks(
    tracer: Tracer, data: Iterable[Any], parts: Mapping[str, Sequence[slice]], budget: int
) -> tuple[dict[str, list[Tensor]], int]:
    """Blocks of each parameter, and the number of examples."""
    sums: dict[str, list[Tensor]] = {}
    count = 0

    def visit(link: ModuleLink, top: ActivationHessian) -> None:
        add_blocks(sums, link_blocks(link, top, parts, budget))

    for trace in pieces(tracer, data, budget):
        descend(trace.links, trace.top, visit, to_input=False)
        count += trace.count
    return sums, count
