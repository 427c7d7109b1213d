"""Which weights are random, in which order, and how a model is borrowed while they are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.inputs import all_finite


@dataclass(frozen=True)
class Parameters:
    """The chosen weights of a model, in the one flat order that everything in lapkit uses.

    The order is that of `model.named_parameters()`, each tensor flattened row-major: what
    `torch.nn.utils.parameters_to_vector` gives for the same tensors.

    Args:
        names: qualified names, as in `model.named_parameters()`.
        tensors: the parameters themselves, not copies.

    Raises:
        ValueError: if there is no parameter, or names and tensors do not pair up.

    Example:
        >>> from torch import nn
        >>> Parameters.of(nn.Linear(3, 2)).numel
        8
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.tensors):
            raise ValueError(f"{len(self.names)} names for {len(self.tensors)} tensors; they must pair up.")
        if not self.names:
            raise ValueError(
                "No parameter is selected: the model has none with requires_grad=True in the chosen subset. "
                "Unfreeze some with parameter.requires_grad_(True), or choose another subset."
            )

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str | Tensor] | None = None) -> Parameters:
        """The trainable parameters of `model`, or those of them that `names` picks.

        Args:
            model: any module, seen without compile and distribution wrappers; parameters with `requires_grad=False`
                are left out.
            names: names of parameters or of modules (which stand for all parameters inside), or the parameters
                themselves; None means all.

        Returns:
            The selection, in the model's own order.

        Raises:
            ValueError: if nothing is left, or a name picks nothing that can be trained.
        """
        trainable = {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}
        if names is None:
            return cls(tuple(trainable), tuple(trainable.values()))
        names = [names] if isinstance(names, (str, Tensor)) else list(names)
        name_of = {id(p): name for name, p in trainable.items()}
        wanted = [name_of.get(id(w), f"a {tuple(w.shape)} tensor") if isinstance(w, Tensor) else w for w in names]
        chosen = [n for n in trainable if any(n == w or n.startswith(f"{w}.") for w in wanted)]
        unmatched = [w for w in wanted if not any(n == w or n.startswith(f"{w}.") for n in trainable)]
        if unmatched:
            raise ValueError(
                f"{unmatched} name no trainable parameter or module of this model. Trainable are {list(trainable)}."
            )
        return cls(tuple(chosen), tuple(trainable[n] for n in chosen))

    @classmethod
    def selected(cls, model: nn.Module, choice: Parameters | Iterable[str | Tensor] | None) -> Parameters:
        """A selection as users give it: itself, names of parameters or modules, parameters, or None for all.

        Raises:
            TypeError: if there is no model.
            ValueError: if nothing is left, or a name picks nothing that can be trained.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected a model, which comes first: a torch.nn.Module, got an object of type {type(model).__name__}."
            )
        return choice if isinstance(choice, Parameters) else cls.of(model, choice)

    def subset(self, keep: Iterable[bool]) -> Parameters:
        """The parameters for which `keep`, one flag for each, is true."""
        pairs = [pair for pair, k in zip(zip(self.names, self.tensors, strict=True), keep, strict=True) if k]
        return Parameters(tuple(n for n, _ in pairs), tuple(p for _, p in pairs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights in each tensor."""
        return tuple(p.numel() for p in self.tensors)

    @property
    def numel(self) -> int:
        """Number of weights P in all."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tensors[0].device

    def vector(self) -> Tensor:
        """A detached copy of the weights as one vector `(P,)`."""
        return torch.cat([p.detach().reshape(-1) for p in self.tensors])

    def split(self, vector: Tensor) -> Mapping[str, Tensor]:
        """Views of `vector`, shape `(..., P)`, by name and in each parameter's own shape `(..., *shape)`.

        Raises:
            ValueError: if the last axis of `vector` is not of length P.
        """
        if vector.shape[-1] != self.numel:
            raise ValueError(f"Expected a last axis of length {self.numel}, got shape {tuple(vector.shape)}.")
        parts = vector.split(self.sizes, dim=-1)
        return {
            name: part.unflatten(-1, p.shape) if p.ndim else part.squeeze(-1)
            for name, part, p in zip(self.names, parts, self.tensors, strict=True)
        }

    def check_finite(self) -> None:
        """Refuse weights that training has destroyed.

        Raises:
            ValueError: if a selected parameter holds NaN or infinity.
        """
        bad = [n for n, p in zip(self.names, self.tensors, strict=True) if not all_finite(p)]
        if bad:
            raise ValueError(
                f"Parameters {bad} hold NaN or infinite values: training has diverged. "
                "Train again; a smaller learning rate helps."
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, `DistributedDataParallel` and `DataParallel` wrappers.

    A compiled graph is opaque to autograd's tape, and a distributed wrapper would wait for a backward pass that never
    comes.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


_autocast: ContextVar[tuple[str, torch.dtype] | None] = ContextVar("_autocast", default=None)


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """Sums of curvature keep their precision under a caller's autocast, which `callers_autocast` puts back."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    token = _autocast.set((device, torch.get_autocast_dtype(device)))
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _autocast.reset(token)


def callers_autocast() -> AbstractContextManager[Any]:
    """For the forward pass alone: the autocast under which lapkit was called."""
    setting = _autocast.get()
    return nullcontext() if setting is None else torch.autocast(setting[0], dtype=setting[1])


@contextmanager
def borrowed(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """The model in eval mode with only `parameters` requiring gradients; as it was afterwards, whatever happens.

    Modes of every submodule, `requires_grad` of every parameter and the buffers are restored, also after an
    exception. Frozen weights keep the tape short: it begins where the selection begins.

    Raises:
        ValueError: if a forward pass would change the weights: an embedding with `max_norm`.
    """
    rescaled = [name for name, module in model.named_modules() if getattr(module, "max_norm", None) is not None]
    if rescaled:
        raise ValueError(
            f"Modules {rescaled} rescale their own weights in the forward pass (max_norm). Apply the bound once with "
            "torch.nn.utils or by hand, and set max_norm=None."
        )
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(name, b, b.detach().clone(), b._version) for name, b in model.named_buffers()]
    chosen = {id(p) for p in parameters.tensors}
    try:
        for module, _ in modes:
            module.training = False
        for p, _ in flags:
            p.requires_grad_(id(p) in chosen)
        with torch.inference_mode(False), torch.enable_grad(), _without_autocast(parameters.device.type):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for name, buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
                if model.get_buffer(name) is not buffer:  # the forward pass put another tensor in its place
                    owner, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(owner), attribute, buffer)
