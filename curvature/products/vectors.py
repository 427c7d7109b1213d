"""Several vectors through one autograd graph: together where that is right, one by one where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lapkit.curvature.capture import internals
from lapkit.curvature.capture.forward import recurrence_on_tape
from lapkit.curvature.capture.tape import Graph
from lapkit.curvature.parameters import Parameters

CACHE = 2**22  # bytes; on a CPU larger vectors gain nothing from going together, and lose the processor's cache

Vectors = tuple[Tensor, ...]  # one vector: a tensor for each parameter; several: with an axis in front
Product = Callable[[Vectors], Vectors]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Operations whose gradient can be differentiated again, in place of fused kernels for which that is not written.

    These are attention everywhere and recurrent layers of oneDNN and cuDNN.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(recurrence_on_tape(model))
        yield


def differentiated(outputs: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None = None) -> Vectors:
    """Gradients that can be differentiated again, zero where an output does not depend on an input.

    Raises:
        NotTwiceDifferentiable: if an operation has no second derivative.
    """
    with explained():
        return torch.autograd.grad(outputs, inputs, cotangent, create_graph=True, materialize_grads=True)


def pulled_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Vectors:
    """`sum_i J_i^T c_i` of a graph that is kept for further vectors; outputs that are constants have none.

    Raises:
        NotTwiceDifferentiable: if an operation has no second derivative.
    """
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(i) for i in inputs)
    wanted, given = zip(*pairs, strict=True)
    with explained():
        found = torch.autograd.grad(wanted, inputs, given, retain_graph=True, materialize_grads=True)
    return tuple(f.to_dense() if f.is_sparse else f for f in found)


class NotTwiceDifferentiable(RuntimeError):
    """An operation whose gradient has no derivative."""


@contextmanager
def explained() -> Iterator[None]:
    """Errors of autograd about a missing second derivative, in words that say what to do.

    Raises:
        NotTwiceDifferentiable: if an operation has no second derivative.
        RuntimeError: any other, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not any(words in message for words in ("derivative for", "differentiate twice", "differentiable twice")):
            raise
        raise NotTwiceDifferentiable(
            f"An operation of this model cannot be differentiated twice, which products with curvature need: {message} "
            "Replace it by plain torch operations, leave the parameters before it out of the selection, or accumulate "
            "the curvature (GGNDense, GGNBlocks, GGNKronecker, ...), which needs one derivative."
        ) from error


class Passage:
    """Sends several vectors through products, in chunks that fit the budget.

    The first time of each product, a random vector among those that go together under `torch.func.vmap` is compared
    with what it gives alone: rules for batches are wrong for some operations and missing for others. All then go alone.

    Args:
        budget: bytes that intermediates may take.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.together = budget, True

    def __call__(self, product: Product, vectors: Vectors, *, verify: bool) -> Vectors:
        """The product with each of R vectors.

        Args:
            product: of one vector.
            vectors: `(R, *shape)` for each parameter.
            verify: make the comparison.

        Returns:
            The results, `(R, *shape)`.
        """
        found = self._together(product, vectors, verify=verify)
        if found is not None:
            return found
        alone = [product(tuple(v[r] for v in vectors)) for r in range(len(vectors[0]))]
        return tuple(torch.stack(parts) for parts in zip(*alone, strict=True))

    def add(self, product: Product, vectors: Vectors, totals: Vectors, *, verify: bool) -> None:
        """Add the product with each of R vectors to a total, without a copy of all of them.

        Args:
            product: of one vector.
            vectors: `(R, *shape)` for each parameter.
            totals: of the results, of their shapes.
            verify: make the comparison.
        """
        found = self._together(product, vectors, verify=verify)
        if found is not None:
            _add(totals, found)
            return
        for r in range(len(vectors[0])):
            _add(tuple(t[r] for t in totals), product(tuple(v[r] for v in vectors)))

    def _together(self, product: Product, vectors: Vectors, *, verify: bool) -> Vectors | None:
        """All at once, or None where vectors go one by one.

        Raises:
            NotTwiceDifferentiable: if an operation has no second derivative.
            RuntimeError: if what went well before does not go well now.
        """
        if not self.together or len(vectors[0]) == 1:
            return None
        probe = _probe(vectors) if verify else tuple(v[:0] for v in vectors)
        try:
            with warnings.catch_warnings():
                # An operation without a rule for batches is looped over inside: slower, and exact.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                found = torch.func.vmap(product)(tuple(torch.cat(pair) for pair in zip(vectors, probe, strict=True)))
        except NotTwiceDifferentiable:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if not verify:
                raise
            reason = str(error).splitlines()[0]
        else:
            count = len(vectors[0])
            if not verify or agree(tuple(f[count] for f in found), product(tuple(p[0] for p in probe))):
                return tuple(f[:count] for f in found)
            reason = "a wrong product"
        warnings.warn(
            f"Some operation of this model cannot be differentiated in a batch of vectors ({reason}); vectors go one "
            "by one, which is slower but exact.",
            stacklevel=3,
        )
        self.together = False
        return None


def random_vectors(like: Sequence[Tensor], seed: int = 0) -> Vectors:
    """Normal numbers in the shapes of some tensors, that leave torch's own generators alone."""
    generator = torch.Generator(like[0].device).manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in like)


def _probe(vectors: Vectors) -> Vectors:
    """One more vector, a random one: what products with those of a solver give may be nothing but rounding."""
    generator = torch.Generator(vectors[0].device).manual_seed(0)
    return tuple(
        torch.randn(v[:1].shape, generator=generator, device=v.device, dtype=torch.float32).to(v.dtype) for v in vectors
    )


def _add(totals: Vectors, parts: Vectors) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two vectors are the same up to rounding."""
    difference, norm = (
        torch.stack([t.double().norm() for t in tensors]).norm()
        for tensors in ([a - e for a, e in zip(actual, expected, strict=True)], expected)
    )
    return bool(difference <= torch.finfo(expected[0].dtype).eps ** 0.5 * norm)


def bytes_each(output: Tensor, parameters: Parameters) -> int:
    """What one more vector takes on its way through the graph of an output, at most, if none is freed on the way."""
    nodes = Graph(output, parameters, strict=False)
    numbers = sum(
        internals.shape_at(node, number).numel() for node, numbers in nodes.outputs.items() for number in numbers
    )
    return (2 * numbers + 3 * parameters.numel) * output.element_size()
