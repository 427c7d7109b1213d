"""Tables to read in a terminal."""

from __future__ import annotations

from collections.abc import Iterable


def readable_size(size: float) -> str:
    """Bytes with a unit, such as `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def text_table(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    """Lines of left-aligned columns."""
    lines = [tuple(head), *(tuple(row) for row in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
