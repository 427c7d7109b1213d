"""The one call: a model, a likelihood and a mini-batch in; the spectrum of its curvature, block by block, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction, check_positions
from lapkit.curvature.columns.columns import GGN, Columns
from lapkit.curvature.columns.sampling import Draws, example_keys, seed_from
from lapkit.curvature.inputs import to_device, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.spectra.analysis import ViViT
from lapkit.curvature.spectra.decomposition import Block, Decomposition
from lapkit.curvature.spectra.factors import Factors, Loss, part_of
from lapkit.curvature.spectra.gram import inner_sums
from lapkit.curvature.spectra.network import Examples, Network
from lapkit.curvature.spectra.selection import Groups, Which, chosen, partition
from lapkit.curvature.spectra.spectrum import Spectrum


def vivit(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    *,
    parameters: Parameters | Iterable[str] | None = None,
    columns: Columns | None = None,
    curvature_examples: Which = None,
    groups: Groups = None,
    threshold: float | None = None,
    gradients: bool = True,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    memory_budget: int | None = None,
    generator: Generator | None = None,
) -> ViViT:
    """Spectrum, directional derivatives and noise of the curvature of one mini-batch, through its Gram matrix.

    With the columns `s_kn` of the likelihood's Hessian, `V = N_c^{-1/2} (J_n^T s_kn)` has `K N_c` columns and
    `G = V V^T` is the MEAN curvature of the `N_c` examples with curvature; `G` and `V^T V`, `(K N_c, K N_c)`, have
    the same non-zero eigenvalues. `V^T V` is summed layer by layer, each layer's Jacobian is discarded at once and V is
    not formed, unless a group has less than half as many weights as V has columns: then G itself is. Gradients, of all
    examples, go back beside the columns. The loss is the likelihood's, free of dispersion; the mean divides by the
    number of examples, also where they have weights.

    Args:
        model: the network; it is run in eval mode and given back as it was.
        likelihood: of targets given outputs.
        data: one batch `(inputs, targets)`, or `(inputs, targets, weights)` with weights `(N,)` that multiply the
            examples' losses.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        columns: which curvature; the exact GGN by default, `MonteCarloGGN(M)` for M columns instead of C.
        curvature_examples: which examples have curvature: a number of first ones, a slice or indices; all by default.
            Gradients are of all examples.
        groups: blocks of weights with a spectrum each: "parameters", "modules", or lists of names of parameters or
            modules, in a list or by labels in a mapping; all weights together by default.
        threshold: eigenvalues below it are left out (the experiments with ViViT take 1e-4); by default those that
            rounding may have made of zeros, less than `4 eps` times the largest (and `sqrt(K N_c) eps` of double
            precision). `Spectrum.left_out` counts them; a model in float64 keeps the small ones.
        gradients: whether to send loss gradients back; without them there are eigenpairs and curvatures only.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        memory_budget: bytes that intermediates may take.
        generator: for Monte Carlo columns.

    Returns:
        A spectrum for each group.

    Raises:
        TypeError: if the likelihood is none, the data is more than a batch, or examples or groups are given in another
            form.
        ValueError: if the threshold is negative, examples or groups do not exist, groups are empty or overlap, the
            Gram matrices do not fit into memory, or the engine or the likelihood refuses the batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lapkit.curvature import Categorical, vivit
        >>> _ = torch.manual_seed(0)
        >>> model, batch = nn.Linear(2, 3), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> spectrum = vivit(model, Categorical(), batch).spectrum
        >>> spectrum.rank, spectrum.eigenvectors(2).shape
        (6, torch.Size([9, 2]))
        >>> spectrum.directions(2).curvature_snr().shape
        torch.Size([2])

    Reference:
        Dangel, Tatzel and Hennig, ViViT: curvature access through the generalized Gauss-Newton's low-rank structure,
        2022.
    """
    selected = Parameters.selected(model, parameters)
    selected.check_finite()
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"Expected a likelihood such as lapkit.curvature.Categorical() or Gaussian(), got {likelihood!r}. A loss "
            "of your own becomes one by lapkit.curvature.FromLogProb."
        )
    _check_one_batch(data)
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"The threshold for eigenvalues is not negative, got {threshold}.")
    blocks = partition(selected, groups)
    with borrowed(model, selected):
        engine = Engine(model, selected, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
        network = Network(model, selected, engine)
        wanted = GGN() if columns is None else columns
        factors, backprop = _factors(
            network, likelihood, data, wanted, curvature_examples, generator, groups=len(blocks), gradients=gradients
        )
        sums = inner_sums(factors, backprop, blocks)
        with torch.no_grad():
            found = {
                label: Block(label, group, Decomposition.of(sums.pop(label), len(factors.index), threshold))
                for label, group in blocks.items()
            }
    return ViViT({label: Spectrum(block, factors) for label, block in found.items()}, selected, factors)


def _check_one_batch(data: Any) -> None:
    """Refuse a data loader, a data set, or batches in a list.

    Raises:
        TypeError: if it is one of these.
    """
    several = isinstance(data, (tuple, list)) and all(_is_batch(part) for part in data)
    if several or isinstance(data, (Dataset, DataLoader, Iterator)):
        raise TypeError(
            f"vivit takes ONE batch (inputs, targets), got {'a list' if several else 'a ' + type(data).__name__} of "
            "batches or examples. Take the first one: next(iter(loader)), or batches[0]. The curvature of all the data "
            "has GGNProduct and largest_eigenpairs."
        )


def _is_batch(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and len(part) in (2, 3) and isinstance(part[1], Tensor) and part[1].ndim > 0


def _factors(
    network: Network,
    likelihood: Likelihood,
    data: Any,
    columns: Columns,
    examples: Which,
    generator: Generator | None,
    *,
    groups: int,
    gradients: bool,
) -> tuple[Factors, Backprop]:
    """Run the model on the batch and see what is to be sent back.

    Raises:
        ValueError: if weights or examples do not fit the batch.
    """
    x, y, weights = to_device(unpack(data, 0), network.parameters.device)
    whole = None
    if gradients or examples is None:
        whole = network.engine(x)
        f = summable(whole.output.detach())
    else:  # no graph of examples through which nothing is sent back
        with torch.no_grad():
            f = summable(network.engine.outputs(x))
    index = chosen(examples, len(f), "examples").to(f.device)
    batch = Examples(x, f)
    part, places = part_of(network, batch, index)
    backprop = network.backprop(part) if whole is None else whole
    check_positions(backprop.returned_shape, network.engine.output_axis, y)
    draws = Draws(seed_from(generator), example_keys((x, y), len(f)).to(f.device)) if columns.random else None
    if weights is not None and len(weights) != len(f):
        raise ValueError(f"Got {len(weights)} weights for a batch of {len(f)} examples: one weight an example.")
    weights = None if weights is None else weights.detach().to(f)
    loss = Loss(likelihood, likelihood.check(f, y, network.engine.output_axis), weights, draws)
    sent = loss.columns(columns, f, index, groups) / len(index) ** 0.5
    return Factors(network, batch, part, index, places, sent, loss.residuals(f) if gradients else None), backprop
