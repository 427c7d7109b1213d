"""Who called lapkit: the line that a warning is about."""

from __future__ import annotations

import inspect


def callers_level() -> int:
    """The `stacklevel` at which `warnings.warn`, where this is called, shows the first line outside of lapkit."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lapkit":
        frame, level = frame.f_back, level + 1
    return level
