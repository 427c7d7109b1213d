"""Tensors and plain values in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "lapkit.curvature.result/1"


def write(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], rest: Mapping[str, Any], what: str = FORMAT
) -> None:
    """Tensors, which may share memory here but not in the file, and a header of plain values, under a format's name.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"Cannot save to {path}: there is no folder {str(folder)!r}. Make it first.")
    alone = {key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(alone, str(path), metadata={"format": what, "header": json.dumps(rest)})


def read(
    path: str | PathLike[str], device: torch.device | str = "cpu", what: str = FORMAT
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` has written under this format's name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no safetensors file, or not written by lapkit.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}).") from error
    if metadata.get("format") != what:
        raise ValueError(
            f"{path} was not written by lapkit's results: its format is {metadata.get('format')!r}, expected {what!r}."
        )
    return tensors, json.loads(metadata["header"])
