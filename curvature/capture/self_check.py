"""The engine's checks of itself, on the first batch of each kind: examples apart, gradients reproduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.backprop import Backprop, Plan
from lapkit.curvature.capture.layout import Probe
from lapkit.curvature.inputs import can_be_cut, is_ambiguous, map_tensors
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable

# A misread tape is wrong by a factor of order one; these leave room for another order of summation and for TF32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}

SAME = {torch.float64: 1e-8, torch.float32: 1e-4}  # outputs of one example in two batches, where there is no TF32

ACCIDENT = (
    " If the first axis of an input counts something else, such as the vertices of graphs, and is as long by accident, "
    "use batches of another size."
)


def contraction_errors(backprop: Backprop, found: Probe, plan: Plan) -> dict[str, float]:
    """Relative errors of `sum_n r_n J_n^T u_n` against autograd's gradient, where they are too large.

    Columns carry `u`, in two parts where two may go together, so that both are checked. The factors `r` are put on
    afterwards: a Jacobian given to the wrong example is found as surely as a wrong one.
    """
    captured: dict[str, list[Tensor]] = {}

    def contract(name: str, jacobian: LayerJacobian) -> None:
        captured[name] = [jacobian.pull_back(summable(f).expand(jacobian.shape[:2])) for f in found.factors]

    part = found.cotangent.flip(0, 1)
    columns = torch.stack([found.cotangent - part, part]) if plan.chunk > 1 else found.cotangent[None]
    backprop(columns, contract, plan, whole=True)
    # Under autocast, or in a norm that insists on float32, a part of the pass is coarser than the weights.
    dtypes = backprop.graph.dtypes()
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    errors: dict[str, float] = {}
    for number, gradients in enumerate(found.gradients):
        scale = max(float(g.norm()) for g in gradients)
        for name, gradient in zip(backprop.parameters.names, gradients, strict=True):
            reference = gradient.reshape(-1)
            contracted = captured[name][number] if name in captured else torch.zeros_like(reference)
            difference = float((contracted - reference).norm())
            if not difference <= tolerance * float(reference.norm()) + 1e3 * coarsest * scale:
                errors[name] = max(errors.get(name, 0.0), difference / max(float(reference.norm()), 1e-300))
    return errors


def check_examples_apart(model: nn.Module, x: Any, output: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Set the examples of the second half apart by copies of a single other one: their outputs must not change.

    So neighbours, groups, statistics and the place in the batch change at once, for half of the examples.

    Args:
        model: the network, for naming the culprit.
        x: the batch; only tensors, and tuples and mappings of them, can be rearranged.
        output: the outputs of `x`.
        run: the forward pass.

    Raises:
        ValueError: if the outputs of an example depend on which other examples stand in the batch, or on chance.
    """
    examples = len(output)
    if examples == 1:
        _check_alone(x, output, run)
        return
    half = examples // 2
    index = torch.full((examples,), 0 if half > 1 else half)
    index[::2] = torch.arange(half, examples)
    others = list(_rearranged(x, index, examples))
    if not others:
        return
    for other in others:
        try:
            again = run(other)  # with a graph, like the first time: without one, attention takes another path
        except Exception:  # not valid in this order, such as a batch sorted by length: nothing is known from it
            return
        if again.shape != output.shape or same(again[::2], output[half:]):
            return
    if not same(run(x), output):
        raise ValueError(
            "The model draws random numbers in eval mode: two passes over one batch have different outputs. Make its "
            "forward pass deterministic, such as dropout(x, p, training=self.training) without training=True."
        )
    culprit = _first_mixing_module(model, run, x, others[0], examples)
    accident = "" if isinstance(x, Tensor) else ACCIDENT
    raise ValueError(
        f"The output of an example changes with the other examples in its batch{culprit}, and curvature is a sum over "
        "independent examples. Batch statistics are the usual cause: use track_running_stats=True and eval mode, or "
        f"another normalisation.{accident}"
    )


def _check_alone(x: Any, output: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Set a single example beside itself turned round, since beside a copy its statistics would stay the same.

    Raises:
        ValueError: if its output changes.
    """
    if not can_be_cut(x, 1):
        return
    beside = map_tensors(lambda t: torch.cat([t, t.flip(tuple(range(1, t.ndim)))]) if t.ndim else t, x)
    try:
        again = run(beside)
    except Exception:  # turned round it is no valid input: nothing is known from it
        return
    if len(again) == 2 and again.shape[1:] == output.shape[1:]:
        check_same(again[:1], output)


def _rearranged(x: Any, index: Tensor, examples: int) -> Iterator[Any]:
    """A batch in another order; in both of the ways there are, if a list may hold inputs or examples."""
    if is_ambiguous(x, examples):
        yield [x[i] for i in index.tolist()]
        x = tuple(x)
    if can_be_cut(x, examples):  # the nodes of a graph, say, could not be moved along
        yield map_tensors(lambda t: t[index.to(t.device)] if t.ndim else t, x)


def same(one: Tensor, two: Tensor) -> bool:
    """Whether outputs are equal up to rounding."""
    tolerance = TOLERANCE[two.dtype] if two.is_cuda else SAME.get(two.dtype, TOLERANCE[two.dtype])
    return bool((one - two).detach().abs().max() <= tolerance * two.detach().abs().max())


def check_same(again: Tensor, output: Tensor) -> None:
    """Refuse a model whose output for the same example differs from pass to pass or from place to place.

    Raises:
        ValueError: if one of the outputs differs.
    """
    if not same(again, output.expand_as(again)):
        raise ValueError(
            "Two copies of one example do not have the outputs of that example: the model draws random numbers in eval "
            "mode, or examples influence each other. Make its forward pass deterministic, one example at a time."
        )


def _first_mixing_module(model: nn.Module, run: Callable[[Any], Tensor], x: Any, other: Any, examples: int) -> str:
    """The first module executed whose outputs for the second half of `x`, every other one of `other`, differ."""
    half = examples // 2
    records: list[list[tuple[str, Tensor]]] = []
    names = {module: name for name, module in model.named_modules() if not list(module.children())}

    def hook(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not out.is_nested and examples in out.shape:
            kept = out.detach().clone().movedim(out.shape.index(examples), 0)
            kept = kept[half:] if len(records) == 1 else kept[::2]
            records[-1].append((f"{names[module] or 'the model'!s} ({type(module).__name__})", kept))

    handles = [module.register_forward_hook(hook) for module in names]
    try:
        for batch in (x, other):
            records.append([])
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for (name, one), (_, two) in zip(*records, strict=False):
        if one.shape == two.shape and (one - two).abs().max() > TOLERANCE.get(one.dtype, 0) * one.abs().max():
            return f", first at module {name}"
    return ""
