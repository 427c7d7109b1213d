"""Which weights belong to one head of an attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
OUTPUTS = ("o_proj", "out_proj", "out_lin", "dense")
COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(frozen=True)
class HeadWeights:
    """A tensor of an attention layer, cut into heads.

    Args:
        name: of the parameter.
        heads: how many.
        axis: which is cut: 0 of queries, keys and values, 1 of the output.
        stacked: how many projections stand in it one after the other.
    """

    name: str
    heads: int
    axis: int
    stacked: int = 1

    def of_head(self, values: Tensor, head: int) -> Tensor:
        """The part of one head."""
        return values.unflatten(self.axis, (self.stacked, self.heads, -1)).select(self.axis + 1, head)


def head_weights(name: str, module: nn.Module) -> list[HeadWeights]:
    """The tensors of an attention layer; none for other modules.

    Args:
        name: of the module.
        module: any.

    Returns:
        Weights and biases of queries, keys and values, and the weight of the output; none where several heads share
        keys and values.
    """
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.MultiheadAttention):
        return [HeadWeights(prefix + n, module.num_heads, a, s) for n, a, s in _multihead(module)]
    heads = next((getattr(module, n) for n in COUNTS if isinstance(getattr(module, n, None), int)), 0)
    inputs = next((names for names in INPUTS if all(_is_linear(module, n, 0, heads) for n in names)), None)
    if inputs is None or _is_grouped(module, inputs):
        return []
    found = [HeadWeights(f"{prefix}{n}.{kind}", heads, 0) for n in inputs for kind in ("weight", "bias")]
    output = next((n for n in OUTPUTS if _is_linear(module, n, 1, heads)), None)
    return found if output is None else [*found, HeadWeights(f"{prefix}{output}.weight", heads, 1)]


def _multihead(module: nn.MultiheadAttention) -> Iterator[tuple[str, int, int]]:
    if module.in_proj_weight is not None:
        yield "in_proj_weight", 0, 3
    else:
        yield from ((f"{letter}_proj_weight", 0, 1) for letter in "qkv")
    yield "in_proj_bias", 0, 3
    yield "out_proj.weight", 1, 1


def _is_grouped(module: nn.Module, inputs: tuple[str, str, str]) -> bool:
    """Whether several heads share keys and values, so that none has weights of its own there."""
    query, key, _ = (getattr(module, name).weight.shape[0] for name in inputs)
    return bool(query != key)


def _is_linear(module: nn.Module, name: str, axis: int, heads: int) -> bool:
    """Whether the part is a linear layer whose axis can be cut into heads."""
    part: Any = getattr(module, name, None)
    return heads > 0 and isinstance(part, nn.Linear) and part.weight.shape[axis] % heads == 0
