"""What is looked at: which examples have curvature, which weights make a block, which directions of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.data_product import grouped

Which = int | slice | Sequence[int] | Tensor | None
Groups = str | Sequence[Iterable[str]] | Mapping[str, Iterable[str]] | None

EVERYTHING = "all"  # the label of the only group


def chosen(which: Which, count: int, what: str) -> Tensor:
    """Indices that a user gives as a number of leading ones, a slice, or themselves.

    Args:
        which: a number k of any integer type, meaning the first k, a slice, a list or tensor of indices, or None for
            all.
        count: how many there are.
        what: of what, for errors.

    Returns:
        Distinct indices `(k,)` of int64, on the CPU.

    Raises:
        TypeError: if it is something else.
        ValueError: if there are fewer, an index is out of range or given twice, or nothing is picked.
    """
    everything = torch.arange(count)
    if which is None:
        return everything
    if isinstance(which, bool):
        raise TypeError(f"Expected a number of {what}, a slice or indices, got {which}.")
    which = _number(which)
    if isinstance(which, int):
        if not 1 <= which <= count:
            raise ValueError(f"Asked for {which} {what}; there are {count}. Ask for 1 to {count}, or None for all.")
        return everything[:which]
    indices = everything[which] if isinstance(which, slice) else _indices(which, what)
    if not len(indices) or len(indices.unique()) < len(indices):
        raise ValueError(f"Expected at least one of the {count} {what} and none twice, got {which}.")
    if int(indices.min()) < 0 or int(indices.max()) >= count:
        raise ValueError(f"There are {count} {what}, numbered 0 to {count - 1}; asked for {indices.tolist()}.")
    return indices


def _number(which: Any) -> Any:
    """An integer of numpy, or in a tensor without axes, as one of Python; anything else as it is."""
    if isinstance(which, Tensor) and (which.ndim or which.is_floating_point() or which.dtype == torch.bool):
        return which
    try:
        return index(which)
    except TypeError:
        return which


def _indices(which: Any, what: str) -> Tensor:
    """A list or tensor of indices as a tensor.

    Raises:
        TypeError: if it is none of integers.
    """
    indices = torch.as_tensor(which).detach().cpu()
    if not indices.numel():  # an empty list has no type
        return indices.long().flatten()
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(
            f"Expected a number of {what}, a slice or a vector of integer indices, got {indices.dtype} of shape "
            f"{tuple(indices.shape)}. A mask becomes indices by mask.nonzero()[:, 0]."
        )
    return indices.long()


def partition(parameters: Parameters, groups: Groups) -> dict[str, Parameters]:
    """Groups of weights, each a block on the diagonal of the curvature, by label.

    Args:
        parameters: all that are looked at.
        groups: None for one group of all; "parameters" or "modules" for one each; or lists of names of parameters or
            modules, in a list or, by labels of your own, in a mapping.

    Returns:
        One selection for each group; every parameter is in one.

    Raises:
        TypeError: if names are not given in groups.
        ValueError: if a name or word is unknown, a group is empty, or a parameter is in no group or in several.
    """
    if groups is None:
        return {EVERYTHING: parameters}
    if groups == "parameters":
        return _by_label(parameters, list(parameters.names))
    if groups == "modules":
        return _by_label(parameters, [name.rpartition(".")[0] for name in parameters.names])
    if isinstance(groups, str):
        raise ValueError(f"Groups are 'parameters', 'modules' or lists of names, got {groups!r}.")
    given = list(groups.values() if isinstance(groups, Mapping) else groups)
    lists = [[] if isinstance(names, str) else list(names) for names in given]
    if any(isinstance(names, str) for names in given) or not all(isinstance(n, str) for names in lists for n in names):
        raise TypeError(f"Each group is a list of names, as in [['0'], ['2.weight', '2.bias']]; got {groups!r}.")
    labels = list(groups) if isinstance(groups, Mapping) else [", ".join(names) for names in lists]
    members = [{parameters.names[i] for i in group} for group in grouped(parameters, lists)]
    label_of = {name: label for label, names in zip(labels, members, strict=True) for name in names}
    found = _by_label(parameters, [label_of[name] for name in parameters.names])
    return {label: found[label] for label in labels}


def _by_label(parameters: Parameters, labels: Sequence[str]) -> dict[str, Parameters]:
    """Parameters of equal labels, in the order of the first of each."""
    return {each: parameters.subset(label == each for label in labels) for each in dict.fromkeys(labels)}
