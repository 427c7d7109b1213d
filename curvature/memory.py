"""How much memory an intermediate may take, and how many examples or columns fit into it."""

from __future__ import annotations

import os

import torch

FRACTION = 0.25  # of what is free, left to one chunk of intermediates
UNKNOWN = 2**30  # bytes, where the system does not say what is free


def default_budget(device: torch.device) -> int:
    """A quarter of the free memory of `device`, in bytes."""
    if device.type == "cuda":
        return int(FRACTION * torch.cuda.mem_get_info(device)[0])
    try:
        return int(FRACTION * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not a name on this system
        return int(FRACTION * UNKNOWN)


def chunk_length(count: int, bytes_each: int, budget: int) -> int:
    """How many of `count` items of `bytes_each` fit into `budget`; at least one."""
    return max(1, min(count, budget // max(bytes_each, 1)))
