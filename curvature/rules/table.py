"""Closed forms: what an operation's cotangent says about a weight, for the operations where networks spend time.

A rule looks at one use of a parameter once a batch and returns a function from cotangents `(K, *shape)` to that use's
Jacobian, or None if this is not the case it knows; the exact local path then serves. Adding an operation is adding
one function to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lapkit.curvature.capture import internals
from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.rules.batched import batched_left_operand, batched_right_operand
from lapkit.curvature.rules.convolution import convolution_bias, convolution_weight
from lapkit.curvature.rules.elementwise import (
    choice,
    concatenation,
    product_added,
    quotient,
    repetition,
    scale,
    shift,
    slope,
)
from lapkit.curvature.rules.embedding import embedding
from lapkit.curvature.rules.experts import grouped_right_operand
from lapkit.curvature.rules.linear import (
    left_operand,
    linear_weight,
    right_operand,
    vector_operand,
)
from lapkit.curvature.rules.norm import batch_norm, group_norm, layer_norm, rms_norm
from lapkit.curvature.rules.site import FromCotangent, Site

ANY = -1  # any operand


def closed_form(site: Site) -> FromCotangent | None:
    """The closed form of one use of a parameter, if there is one.

    Args:
        site: the node and operand, and what is known of that place.

    Returns:
        A function from cotangents `(K, *shape)` to the Jacobian, or None.
    """
    rule = RULES.get((site.name, site.use.slot)) or RULES.get((site.name, ANY))
    if rule is None or not internals.dtype_at(site.node, 0).is_floating_point:  # complex numbers go the generic way
        return None
    jacobian = rule(site)
    if jacobian is None:
        return None

    def of_cotangent(cotangent: Tensor) -> LayerJacobian:
        site.check_unchanged()
        return jacobian(cotangent)

    return of_cotangent


RULES: dict[tuple[str, int], Callable[[Site], FromCotangent | None]] = {
    ("AddmmBackward0", 0): shift,
    ("AddmmBackward0", 1): left_operand,
    ("AddmmBackward0", 2): right_operand,
    ("MmBackward0", 0): left_operand,
    ("MmBackward0", 1): right_operand,
    ("MvBackward0", 1): vector_operand,
    ("BmmBackward0", 0): batched_left_operand,
    ("BmmBackward0", 1): batched_right_operand,
    ("BaddbmmBackward0", 0): shift,
    ("BaddbmmBackward0", 1): batched_left_operand,
    ("BaddbmmBackward0", 2): batched_right_operand,
    ("GroupedMmBackward0", 1): grouped_right_operand,
    ("LinearBackward0", 1): linear_weight,  # on devices whose matrix product takes the bias along
    ("LinearBackward0", 2): shift,
    ("EmbeddingBackward0", 0): embedding,
    ("AddBackward0", 0): shift,
    ("AddBackward0", 1): shift,
    ("SubBackward0", 0): shift,
    ("SubBackward0", 1): shift,
    ("MulBackward0", 0): scale,
    ("MulBackward0", 1): scale,
    ("DivBackward0", 0): quotient,
    ("DivBackward0", 1): quotient,
    ("AddcmulBackward0", 0): shift,
    ("AddcmulBackward0", 1): product_added,
    ("AddcmulBackward0", 2): product_added,
    ("WhereBackward0", 0): choice,
    ("WhereBackward0", 1): choice,
    ("PreluKernelBackward0", 1): slope,
    ("CatBackward0", ANY): concatenation,
    ("RepeatBackward0", 0): repetition,
}

# The same operation has other names on other devices. A name that is missing here takes the exact local path.
for _name in ("ConvolutionBackward0", "ConvolutionOverrideableBackward0"):
    RULES |= {(_name, 1): convolution_weight, (_name, 2): convolution_bias}
for _name in ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"):
    RULES |= {(_name, slot): batch_norm for slot in (1, 2)}
for _name, _rule in (("NativeLayerNorm", layer_norm), ("NativeGroupNorm", group_norm), ("FusedRmsNorm", rms_norm)):
    RULES |= {(f"{_name}Backward0", slot): _rule for slot in (1, 2)}
