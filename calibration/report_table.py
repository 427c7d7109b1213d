"""What a report is: a table with a row for each method, sections with pictures, and the page that shows both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

from lapkit.calibration.report_page import page


@final
@dataclass(frozen=True)
class Column:
    """A score of the table.

    Args:
        name: heading.
        unit: of its numbers; empty for none.
        better: "smaller", "larger", or the number that is best, or None where the score is not one of quality.
        about: one sentence for readers who do not know it.
        digits: after the point.
    """

    name: str
    unit: str
    better: str | float | None
    about: str
    digits: int = 3

    def text(self, value: float) -> str:
        """A number as the table prints it; a dash where there is none."""
        if math.isnan(value):
            return "-"
        if math.isinf(value):
            return str(value)
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

    def best(self, values: list[float]) -> float | None:
        """The best of several numbers; None if there is no such thing, as where all are equal."""
        given = [value for value in values if not math.isnan(value)]
        if self.better is None or len(set(given)) < 2:
            return None
        if isinstance(self.better, float):
            wanted = self.better
            return min(given, key=lambda value: abs(value - wanted))
        return min(given) if self.better == "smaller" else max(given)


@final
@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: heading.
        caption: what is shown and how to read it.
        content: makes its HTML, with matplotlib where it has pictures.
    """

    title: str
    caption: str
    content: Callable[[], str]


@final
@dataclass(frozen=True, eq=False)
class Report:
    """How good and how honest several predictions of the same targets are; prints as a table.

    Args:
        title: of the page.
        summary: what was predicted: how many examples, of what.
        columns: scores, in order.
        rows: of each method, its score of each column by name.
        notes: what to keep in mind.
        sections: pictures of the page, made when it is.
    """

    title: str
    summary: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]

    def __str__(self) -> str:
        width = max(6, *map(len, self.rows))
        widths = [max(9, len(column.name) + 2) for column in self.columns]
        head = "".join(f"{column.name:>{w}}" for column, w in zip(self.columns, widths, strict=True))
        lines = [f"{'method':<{width}}{head}", "-" * (width + sum(widths))]
        for name, row in self.rows.items():
            cells = zip(self.columns, widths, strict=True)
            lines.append(f"{name:<{width}}" + "".join(f"{column.text(row[column.name]):>{w}}" for column, w in cells))
        return "\n".join([*lines, "", self.summary, *self.notes])

    def __repr__(self) -> str:
        return f"Report({self.title!r}: {', '.join(self.rows)})"

    def to_dict(self) -> dict[str, Any]:
        """All numbers and words, without pictures, as JSON can hold them (infinities apart).

        Returns:
            `title`, `summary`, `units` of the scores, `rows` by method and score (None where there is none), `notes`.
        """
        return {
            "title": self.title,
            "summary": self.summary,
            "units": {column.name: column.unit for column in self.columns},
            "rows": {
                name: {column: None if math.isnan(value) else value for column, value in row.items()}
                for name, row in self.rows.items()
            },
            "notes": list(self.notes),
        }

    def to_html(self) -> str:
        """The whole page: one string of HTML with pictures inside, which needs no network and no script.

        Returns:
            The page. Its pictures are drawn now, by matplotlib.
        """
        return page(self)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page.

        Args:
            path: a file, such as "report.html", in a folder that is there.

        Returns:
            The path.
        """
        target = Path(path)
        target.write_text(self.to_html(), encoding="utf-8")
        return target
