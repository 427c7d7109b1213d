"""One forward pass: any model and any form of inputs in, outputs of one form out, or an error that says why not."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lapkit.curvature.capture import internals
from lapkit.curvature.inputs import all_finite, tensors
from lapkit.curvature.parameters import Parameters, callers_autocast

ForwardFunction = Callable[[nn.Module, Any], Any]


@contextmanager
def recurrence_on_tape(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as the matrix products they are made of, each with a node of its own.

    The fused kernels of oneDNN and cuDNN are one opaque node for all steps, which has no second derivative either.
    They are left out while these modules run, and only then: convolutions keep theirs.

    Args:
        model: the network; its `nn.RNNBase` modules get hooks for the time being.
    """
    entered = ExitStack()

    def leave(*_: Any) -> None:
        entered.pop_all().close()

    def enter(*_: Any) -> None:
        with warnings.catch_warnings():  # of TF32, which nobody asks for here
            warnings.simplefilter("ignore")
            entered.enter_context(torch.backends.mkldnn.flags(enabled=False))
            entered.enter_context(torch.backends.cudnn.flags(enabled=False))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                # Where two of these contexts are nested, the inner one has to leave first.
                hooks.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
        yield


def call(model: nn.Module, x: Any) -> Any:
    """`model(**x)`, `model(*x)` or `model(x)`: a mapping or a tuple is spread where the signature takes it so."""
    if isinstance(x, Mapping) and _takes(model, (), x):
        return model(**x)
    if isinstance(x, (tuple, list)) and _takes(model, x, {}):
        return model(*x)
    return model(x)


def _takes(model: nn.Module, positional: Any, named: Mapping[str, Any]) -> bool:
    """Whether the forward pass can be called with these arguments."""
    try:
        inspect.signature(model.forward).bind(*positional, **named)
    except (TypeError, ValueError):  # does not fit, or has no signature to ask
        return False
    return True


def forward(
    model: nn.Module,
    x: Any,
    parameters: Parameters,
    *,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """The model's outputs as `(N, C)`, or `(N, T, C)` where every example has outputs at T positions.

    A sequence `(N, T, C)` has its classes last, an image `(N, C, H, W)` at axis 1, which moves to the end; positions
    are flattened. A model that returns an object with `logits`, as those of transformers do, is read there.

    Args:
        model: the network; it is run without `torch.compile`.
        x: a batch of inputs: a tensor, or tuples and mappings of them, spread over the arguments of the model.
        parameters: the selection, for its dtype.
        forward_fn: `forward_fn(model, x)` to be called instead.
        output_axis: the axis of classes or channels; the last one of up to three axes and 1 of more by default.
        y: targets, which must stand at the positions of the outputs.

    Returns:
        Outputs with their graph.

    Raises:
        TypeError: if the inputs' type does not suit the weights, or outputs are no floating tensor.
        ValueError: if outputs have a wrong shape or not that of the targets, or they or the inputs are not finite.
        RuntimeError: if the model itself fails.
    """
    returned = run(model, x, parameters, forward_fn)
    output = canonical(returned, output_axis)
    if y is not None:
        check_positions(returned.shape, output_axis, y)
    return output


def run(model: nn.Module, x: Any, parameters: Parameters, forward_fn: ForwardFunction | None = None) -> Any:
    """What the model returns, or its `logits`.

    Args:
        model: the network; it is run without `torch.compile`.
        x: a batch of inputs.
        parameters: the selection, for its dtype.
        forward_fn: `forward_fn(model, x)` to be called instead.

    Returns:
        Outputs as the model has them.

    Raises:
        TypeError: if the inputs' type does not suit the weights, or they are a data loader or with their targets.
        ValueError: if the inputs are not finite.
        RuntimeError: if the model itself fails.
    """
    if isinstance(x, (Dataset, DataLoader)):
        raise TypeError(
            f"Expected one batch of inputs, got a {type(x).__name__}. Take the inputs of one batch: "
            "x, _ = next(iter(loader))."
        )
    if any(t.is_floating_point() and not all_finite(t) and _refused(x, t) for t in tensors(x)):
        raise ValueError("The inputs hold NaN or infinite values. Remove or impute these examples first.")
    try:
        with internals.eagerly(), callers_autocast(), recurrence_on_tape(model):
            output = call(model, x) if forward_fn is None else forward_fn(model, x)
    except RuntimeError as error:
        if isinstance(x, Tensor) and x.dtype != parameters.dtype:
            raise TypeError(
                f"The model, with weights of type {parameters.dtype}, failed on inputs of type {x.dtype} ({error}). "
                f"If they are numbers rather than indices, convert them: x.to({parameters.dtype})."
            ) from error
        if type(error) is not RuntimeError:  # out of memory, or not implemented
            raise
        raise RuntimeError(f"The model failed on inputs of shape {_shapes(x)}: {error}") from error
    except TypeError as error:
        if isinstance(x, Tensor):
            raise
        wanted = "Expected one batch: a tensor or an array, or tuples and mappings of them as the model takes them."
        if isinstance(x, (tuple, list)):
            wanted = "If they are (inputs, targets), give the inputs alone."
        elif isinstance(x, Mapping) and forward_fn is None and _takes(model, (), x):  # so it was spread
            wanted = (
                "A mapping is spread over the arguments of the model. If its forward pass takes the mapping itself, "
                "behind *args and **kwargs, give forward_fn=lambda model, x: model(x)."
            )
        raise TypeError(
            f"The model failed on inputs that are a {type(x).__name__} of {_shapes(x) or 'no tensors'}: {error}. "
            f"{wanted}"
        ) from error
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _shapes(x: Any) -> str:
    """The shape of a tensor, or those of all inside."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else ", ".join(str(tuple(t.shape)) for t in tensors(x))


def _refused(x: Any, t: Tensor) -> bool:
    """Whether one of the inputs cannot be used; among several there may be a mask of zeros and minus infinity."""
    return isinstance(x, Tensor) or bool(torch.isnan(t).any())


def check_positions(outputs: torch.Size, axis: int | None, y: Tensor) -> None:
    """Refuse targets for positions of another shape, such as height and width exchanged; flattened ones pass.

    Args:
        outputs: the shape of the outputs as the model returned them.
        axis: of classes or channels.
        y: targets.

    Raises:
        ValueError: if positions differ in shape.
    """
    axis = _output_axis(len(outputs), axis) % len(outputs)
    positions = tuple(length for i, length in enumerate(outputs) if i not in (0, axis))
    wanted = tuple(outputs[1:]) if y.ndim == len(outputs) else positions
    if len(positions) > 1 and y.ndim in (len(outputs), len(outputs) - 1) and tuple(y.shape[1:]) != wanted:
        raise ValueError(
            f"Targets {tuple(y.shape)} do not stand at the positions {positions} of the outputs {tuple(outputs)}; "
            f"expected (N, {', '.join(map(str, positions))}) for classes, or {tuple(outputs)} for one number an output."
        )


def _output_axis(axes: int, axis: int | None) -> int:
    """The axis of classes: as given, or the last one of up to three axes and 1 of more."""
    if axis is not None:
        return axis
    return 1 if axes > 3 else -1


def canonical(output: Any, axis: int | None) -> Tensor:
    """Outputs with classes last and positions flattened, `(N, C)` or `(N, T, C)`.

    Raises:
        TypeError: if they are no floating tensor.
        ValueError: if the shape is not that of outputs, or does not have this axis, or a number is not finite.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"The model must return a floating tensor of outputs (N, C), (N, T, C) or (N, C, H, W), it returned "
            f"{kind}. Wrap it, or give forward_fn=lambda model, x: model(x)[...]."
        )
    if output.ndim == 1 and axis is None:
        output = output[:, None]
    if output.ndim < 2 or 0 in output.shape:
        raise ValueError(
            "The model must return outputs of shape (N, C), (N, T, C) or (N, C, H, W) with at least one example and "
            f"one output, it returned {tuple(output.shape)}."
        )
    axis = _output_axis(output.ndim, axis)
    if not -output.ndim < axis < output.ndim or axis == 0:
        raise ValueError(
            f"output_axis={axis} is no axis of classes in outputs {tuple(output.shape)}; axis 0 holds the examples."
        )
    if not all_finite(output):
        raise ValueError(
            "The model's outputs are NaN or infinite on finite inputs: check its weights and the scale of the inputs."
        )
    return output if output.ndim == 2 else output.movedim(axis, -1).flatten(1, -2)
