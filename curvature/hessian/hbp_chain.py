"""A network read as a chain: modules that follow each other, `z_l = m_l(z_{l-1})`, with skips around parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from lapkit.curvature.parameters import Parameters

REMEDY = (
    "Write it as nn.Sequential (with lapkit.curvature.Residual for skip connections), or use the matrix-free products "
    "HessianProduct and GGNProduct, which take any network."
)


@final
class Residual(nn.Module):
    """`z = x + s(x)`, a skip connection around the modules `s`, through which curvature is propagated one by one.

    Args:
        modules: the chain `s`, whose outputs have the shape of its inputs.

    Example:
        >>> import torch
        >>> block = Residual(nn.Linear(3, 3), nn.Tanh())
        >>> block(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """`x + s(x)`; the modules see a copy, since one of them may work in place."""
        return x + self.inner(x.clone())


@dataclass(frozen=True, eq=False)
class Stage:
    """One module of the chain.

    Args:
        name: as in `model.named_modules()`.
        module: any module that maps a batch to a batch, example by example.
        weights: the selected parameters inside: their names in the model and in the module.
        inner: the chain `s` where the module is `x + s(x)`.
    """

    name: str
    module: nn.Module
    weights: Mapping[str, str]
    inner: tuple[Stage, ...] = ()

    def __str__(self) -> str:
        return f"{self.name or 'the model'!r} ({type(self.module).__name__})"


def stages_of(model: nn.Module, parameters: Parameters, x: Any) -> tuple[Stage, ...]:
    """The modules of a chain in the order in which a batch passes them.

    `nn.Sequential` is opened, and so is every other container whose forward pass hands a batch from one of its modules
    to the next and does nothing else. A module that cannot be opened is one stage, treated as a whole.

    Args:
        model: the network, in eval mode.
        parameters: the selected weights.
        x: a batch of inputs.

    Returns:
        The stages, each with the selected weights it holds.

    Raises:
        ValueError: if the model is no chain, or a weight is used by several modules or by none.
    """
    found = [(name, module) for name, module, _ in _opened("", model, x)]
    if len(found) == 1 and found[0][1] is model and any(True for _ in model.children()):
        raise ValueError(
            f"{type(model).__name__} is not sequential: its forward pass, or a hook on one of its modules, does more "
            f"than hand a batch from one module to the next, so Hessian backpropagation does not apply. {REMEDY}"
        )
    return _with_weights(found, parameters)


def _with_weights(found: Sequence[tuple[str, nn.Module]], parameters: Parameters) -> tuple[Stage, ...]:
    """Give every selected weight to the one stage that holds it.

    Raises:
        ValueError: if there is not exactly one.
    """
    full = {id(p): name for name, p in zip(parameters.names, parameters.tensors, strict=True)}
    stages = []
    for name, module in found:
        weights = {full[id(p)]: local for local, p in module.named_parameters() if id(p) in full}
        inner = _skipped(name, module, parameters) if isinstance(module, Residual) else ()
        stages.append(Stage(name, module, weights, inner))
    for name in parameters.names:
        owners = [str(stage) for stage in stages if name in stage.weights]
        if len(owners) > 1:
            raise ValueError(
                f"Parameter {name!r} is used by several modules ({', '.join(owners)}). Hessian backpropagation takes "
                "modules one by one, which would lose the terms between them. Use the matrix-free products of the "
                "whole curvature, or leave this parameter out."
            )
        if not owners:
            raise ValueError(
                f"No module of the chain uses parameter {name!r}, so it has no curvature. Leave it out: "
                "parameter.requires_grad_(False), or name the others in parameters."
            )
    return tuple(stages)


def _skipped(name: str, module: Residual, parameters: Parameters) -> tuple[Stage, ...]:
    """The chain inside a skip connection."""
    inside = {id(p) for p in module.parameters()}
    flags = [id(p) in inside for p in parameters.tensors]
    found = _flattened(f"{name}.inner" if name else "inner", module.inner)
    if not any(flags):
        return tuple(Stage(n, m, {}, _skipped(n, m, parameters) if isinstance(m, Residual) else ()) for n, m in found)
    return _with_weights(found, parameters.subset(flags))


def _flattened(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Nested `nn.Sequential` opened, without a batch to look at anything else."""
    if type(module).forward is not nn.Sequential.forward:
        return [(name, module)]
    # one activation may stand in several places, of which named_children() gives the first alone
    children = [(n, child) for n, child in module.named_modules(remove_duplicate=False) if n and "." not in n]
    parts = [_flattened(f"{name}.{n}" if name else n, child) for n, child in children]
    return [pair for part in parts for pair in part]


def _opened(name: str, module: nn.Module, x: Any) -> list[tuple[str, nn.Module, Any]]:
    """The chain inside a module, with the input of each part; the module itself if it is not one."""
    steps = None if isinstance(module, Residual) else _steps(module, x)
    if steps is None:
        return [(name, module, x)]
    return [found for n, child, given in steps for found in _opened(f"{name}.{n}" if name else n, child, given)]


def _steps(module: nn.Module, x: Any) -> list[tuple[str, nn.Module, Any]] | None:
    """The modules that a container calls, in order and with their inputs, if each takes what the last one returned.

    That the steps make up the whole forward pass is checked by its result, later: something may happen in between that
    leaves no trace, such as an operation in place.
    """
    if not any(True for _ in module.children()):
        return None
    calls: list[tuple[str, nn.Module, Any, Any]] = []
    open_calls: list[tuple[nn.Module, Any]] = []

    def before(child: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        plain = len(arguments) == 1 and not named
        open_calls.append((child, arguments[0] if plain else None))

    def after(child: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        _, given = open_calls.pop()
        if not open_calls:
            calls.append((names[child], child, given, result))

    names = {child: n for n, child in module.named_modules() if n}
    handles = [child.register_forward_pre_hook(before, with_kwargs=True) for child in names]
    handles += [child.register_forward_hook(after) for child in names]
    start = x.clone() if isinstance(x, Tensor) else x
    try:
        output = module(start)
    finally:
        for handle in handles:
            handle.remove()
    here = start
    for _, _, given, result in calls:
        if given is not here:
            return None
        here = result
    return [(n, child, given) for n, child, given, _ in calls] if calls and here is output else None
