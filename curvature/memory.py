"""How much memory an intermediate may take, and how many examples or columns fit into it."""

from __future__ import annotations

import os

import torch

FRACTION = 0.25  # of what is free, left to one chunk of intermediates
UNKNOWN = 2**30  # bytes, where the system does not say what is free


def default_budget(device: torch.device) -> int:
    """A quarter of the free memory of `device`, in bytes."""
    return int(FRACTION * available(device))


def available(device: torch.device) -> int:
    """Bytes of memory that can be had on `device`, what caches of files would give up included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # of Linux
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # of other Unix systems
    except (ValueError, OSError, AttributeError):
        return UNKNOWN


def chunk_length(count: int, bytes_each: int, budget: int) -> int:
    """How many of `count` items of `bytes_each` fit into `budget`; at least one."""
    return max(1, min(count, budget // max(bytes_each, 1)))
