"""The diagonal blocks of Hessian, GGN and positive-curvature Hessian by their products with vectors, never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lapkit.curvature.hessian.hbp_batches import EMPTY
from lapkit.curvature.hessian.hbp_blocks import parts_of
from lapkit.curvature.hessian.hbp_modes import mode_of
from lapkit.curvature.hessian.hbp_propagation import ActivationHessian, ModuleLink, Products, descend
from lapkit.curvature.hessian.hbp_trace import Trace, Tracer
from lapkit.curvature.hessian.hbp_weights import weight_product
from lapkit.curvature.inputs import map_tensors, numbered, to_device, unpack
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import chunk_length, default_budget
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.matrix_free import MatrixFree
from lapkit.curvature.products.vectors import twice_differentiable

Product = Callable[[Tensor], Tensor]


def hessian_products(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    mode: str = "hessian",
    parameters: Parameters | Iterable[str] | None = None,
    sub_blocks: int | Mapping[str, int] | None = None,
    memory_budget: int | None = None,
    output_axis: int | None = None,
) -> BlockProducts:
    """The exact blocks of a sequential network as linear maps, for iterative solvers.

    A product goes from a weight up to the loss and back, `v -> J_w^T H_z J_w v` with `H_z u = J^T H J u + R u` applied
    module by module, and costs about as much as a gradient. Unlike second-order automatic differentiation it also
    gives the positive-curvature Hessian.

    Args:
        model: a chain of modules.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)` or `(inputs, targets, weights)`, a list or a data loader that does not change.
        mode: "hessian", "ggn", "pch-abs" or "pch-clip".
        parameters: the weights, or names of parameters or modules; all trainable ones by default.
        sub_blocks: cut each parameter along its first axis into so many blocks, for all or by name.
        memory_budget: bytes that the activations of the data may take; beyond it they are computed for each product.
        output_axis: the axis of classes in the outputs.

    Returns:
        The linear maps, summed over examples. They hold for the weights at this moment.

    Raises:
        ValueError: if the model is no chain, the mode is unknown, or the data is empty or can be gone through only
            once.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian
        >>> data = [(torch.ones(4, 1), torch.zeros(4, 1))]
        >>> hessian_products(torch.nn.Linear(1, 1, bias=False), Gaussian(), data).matmul(torch.ones(1))
        tensor([4.])

    Reference:
        Dangel, Harmeling and Hennig, Modular block-diagonal curvature approximations for feedforward architectures,
        2020, section 3.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            "Products go through the data each time, but this data is an iterator that is used up after the first "
            "time. Give a list of batches or a data loader."
        )
    chosen = mode_of(mode)
    parameters = Parameters.selected(model, parameters)
    parameters.check_finite()
    budget = default_budget(parameters.device) if memory_budget is None else memory_budget
    parts = parts_of({n: p.shape for n, p in zip(parameters.names, parameters.tensors, strict=True)}, sub_blocks)
    tracer = Tracer(model, parameters, likelihood, chosen, output_axis=output_axis)
    return BlockProducts(tracer, data, parts, budget)


@final
class BlockProducts(MatrixFree):
    """What `hessian_products` returns.

    Args:
        tracer: reads the model.
        data: batches.
        parts: how each parameter is cut, in ranges of its flat positions.
        budget: bytes that the activations of the data may take.

    Raises:
        ValueError: if there is no data, or the model is no chain.
    """

    def __init__(
        self, tracer: Tracer, data: Iterable[Any], parts: Mapping[str, tuple[slice, ...]], budget: int
    ) -> None:
        self.tracer, self.data, self.parts, self.budget = tracer, data, parts, budget
        self.parameters = tracer.parameters
        self._versions = self._current()
        self._kept: list[Trace] | None = []
        self.count = 0
        kept = 0
        with borrowed(tracer.model, self.parameters), twice_differentiable(tracer.model):
            for trace in self._fresh():
                self.count += trace.count
                # Inputs, cotangents and what autograd keeps of each module.
                kept += 8 * sum(link.derivatives.delta.nbytes for link in trace.links)
                if self._kept is not None and kept <= budget:
                    self._kept.append(trace)
                else:
                    self._kept = None
            if self._kept is None:
                tracer.check_repeatable(data)
        if not self.count:
            raise ValueError(EMPTY)

    @property
    def blocks(self) -> dict[str, tuple[BlockProduct, ...]]:
        """One map for each block, by parameter, in flat order."""
        return {name: tuple(BlockProduct(self, name, part) for part in parts) for name, parts in self.parts.items()}

    @property
    def sizes(self) -> list[int]:
        """The sizes of all blocks, in flat order."""
        return [part.stop - part.start for parts in self.parts.values() for part in parts]

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.parameters.numel

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors."""
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.parameters.device

    def _matmul(self, vectors: Tensor) -> Tensor:
        rows = dict(zip(self.parameters.names, vectors.T.split(self.parameters.sizes, dim=1), strict=True))
        found = self.products(rows)
        return torch.cat([found[name] for name in self.parameters.names], dim=1).T

    def products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Products with the blocks of some parameters in one pass over the data.

        Args:
            vectors: `(K, P_l)` by the parameter's name.

        Returns:
            `(K, P_l)` likewise; zero between groups of rows.

        Raises:
            RuntimeError: if the weights have changed since the products were made.
        """
        if self._current() != self._versions:
            raise RuntimeError("The model's weights have changed since these products were made. Make them again.")
        sums: dict[str, Tensor] = {}

        def visit(link: ModuleLink, top: ActivationHessian) -> None:
            for name in vectors.keys() & link.weights.keys():
                product = weight_product(link, name, top)
                for part in self.parts[name]:
                    out = self._within(product, vectors[name].to(link.derivatives.delta.dtype), part, link)
                    sums[name] = sums[name] + out if name in sums else out

        with borrowed(self.tracer.model, self.parameters), twice_differentiable(self.tracer.model):
            for trace in self._fresh() if self._kept is None else self._kept:
                descend(trace.links, Products(trace.top.matmul), visit, to_input=False)
        return sums

    def _within(self, product: Product, rows: Tensor, part: slice, link: ModuleLink) -> Tensor:
        """One block of a product, a few vectors at a time."""
        out = rows.new_zeros(rows.shape)
        step = chunk_length(len(rows), 8 * link.derivatives.delta.nbytes, self.budget)
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            cut = torch.zeros_like(rows[some])
            cut[:, part] = rows[some, part]
            out[some, part] = product(cut)[:, part]
        return out

    def _fresh(self) -> Iterator[Trace]:
        for number, batch in numbered(self.data):
            x, y, weights = unpack(batch, number)
            device = self.parameters.device
            x, y = map_tensors(torch.clone, (to_device(x, device), to_device(y, device)))  # a loader may reuse its own
            yield self.tracer(x, y, weights)

    def _current(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.tracer.model.parameters())


@final
@dataclass(frozen=True, eq=False)
class BlockProduct(MatrixFree):
    """One block.

    Args:
        whole: the map it is a block of.
        name: the parameter.
        part: the range of its flat positions.
    """

    whole: BlockProducts
    name: str
    part: slice

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.part.stop - self.part.start

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors."""
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.whole.device

    def _matmul(self, vectors: Tensor) -> Tensor:
        total = self.whole.parameters.sizes[self.whole.parameters.names.index(self.name)]
        wide = vectors.new_zeros(vectors.shape[1], total)
        wide[:, self.part] = vectors.T
        return self.whole.products({self.name: wide})[self.name][:, self.part].T
