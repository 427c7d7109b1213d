"""The engine's checks of itself, on the first batch of each kind: examples apart, gradients reproduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import internals
from lapkit.curvature.backprop import Backprop, Plan
from lapkit.curvature.inputs import map_tensors, tensors
from lapkit.curvature.jacobians import LayerJacobian, summable
from lapkit.curvature.layout import Probe

# A misread tape is wrong by a factor of order one; these leave room for another order of summation and for TF32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}


def contraction_errors(backprop: Backprop, found: Probe, plan: Plan) -> dict[str, float]:
    """Relative errors of `sum_n r_n J_n^T u_n` against autograd's gradient, where they are too large.

    Columns carry `u`, in two parts where two may go together, so that both are checked. The factors `r` are put on
    afterwards: a Jacobian given to the wrong example is found as surely as a wrong one.
    """
    captured: dict[str, Tensor] = {}

    def contract(name: str, jacobian: LayerJacobian) -> None:
        weights = summable(found.factors).expand(jacobian.shape[:2])
        captured[name] = jacobian.pull_back(weights)

    part = found.cotangent.flip(0, 1)
    columns = torch.stack([found.cotangent - part, part]) if plan.chunk > 1 else found.cotangent[None]
    backprop(columns, contract, plan, whole=True)
    # Under autocast a part of the pass is coarser than the weights.
    tolerance = max(TOLERANCE.get(internals.dtype_at(n, o), 0.0) for n in backprop.uses for o in backprop.layouts[n])
    wanted = dict(zip(backprop.parameters.names, found.gradients, strict=True))
    scale = max(float(g.norm()) for g in wanted.values())
    errors = {}
    for name, gradient in wanted.items():
        reference = gradient.reshape(-1)
        difference = float((captured.get(name, torch.zeros_like(reference)) - reference).norm())
        allowed = tolerance * float(reference.norm()) + torch.finfo(gradient.dtype).eps * scale
        if not difference <= allowed:
            errors[name] = difference / max(float(reference.norm()), 1e-300)
    return errors


def check_examples_apart(model: nn.Module, x: Any, output: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Move the second half of a batch to the front and repeat it: its outputs must move along unchanged.

    So all the other examples and the place in the batch change at once, for half of the examples.

    Args:
        model: the network, for naming the culprit.
        x: the batch; only tensors, and tuples and mappings of them, can be rearranged.
        output: the outputs of `x`.
        run: the forward pass.

    Raises:
        ValueError: if the outputs of an example depend on which other examples stand in the batch.
    """
    examples = len(output)
    half = examples // 2
    index = half + torch.arange(examples, device=output.device) % (examples - half)
    if half == 0 or not any(t.ndim > 0 and len(t) == examples for t in tensors(x)):
        return
    other = map_tensors(lambda t: t[index.to(t.device)] if t.ndim and len(t) == examples else t, x)
    again = run(other)  # with a graph, like the first time: without one, attention takes another path
    difference = (again[: examples - half] - output[half:]).detach().abs().max()
    if difference <= TOLERANCE[output.dtype] * output.detach().abs().max():
        return
    culprit = _first_mixing_module(model, x, other, examples)
    raise ValueError(
        f"The output of an example changes with the other examples in its batch{culprit}, so a posterior over "
        "independent examples is not defined. Batch statistics are the usual cause: use track_running_stats=True and "
        "eval mode, or another normalisation."
    )


def _first_mixing_module(model: nn.Module, x: Any, other: Any, examples: int) -> str:
    """The first module executed whose outputs for the second half of `x`, the first of `other`, differ."""
    half = examples // 2
    records: list[list[tuple[str, Tensor]]] = []
    names = {module: name for name, module in model.named_modules() if not list(module.children())}

    def hook(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not out.is_nested and examples in out.shape:
            kept = out.detach().clone().movedim(out.shape.index(examples), 0)
            kept = kept[half:] if len(records) == 1 else kept[: examples - half]
            records[-1].append((f"{names[module] or 'the model'!s} ({type(module).__name__})", kept))

    handles = [module.register_forward_hook(hook) for module in names]
    try:
        for batch in (x, other):
            records.append([])
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    for (name, one), (_, two) in zip(*records, strict=False):
        if one.shape == two.shape and (one - two).abs().max() > TOLERANCE.get(one.dtype, 0) * one.abs().max():
            return f", first at module {name}"
    return ""
