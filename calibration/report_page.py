"""The page of a report: HTML with everything inside, for phones and desktops, on paper too."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from lapkit.calibration.report_diagrams import as_svg, export_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lapkit.calibration.report_table import Column, Report, Section

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #ffffff; color: #1d2226; font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .25rem; padding-top: .8rem; border-top: 1px solid #d5dade; }
p, ul, dl { max-width: 46rem; margin: .4rem 0; }
.summary, .caption, footer { color: #4a545b; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e7ea; }
th:first-child { text-align: left; position: sticky; left: 0; background: #ffffff; white-space: normal;
  overflow-wrap: break-word; max-width: min(18rem, 40vw); }
thead th { vertical-align: bottom; border-bottom: 2px solid #1d2226; font-weight: 600; white-space: normal; }
thead small { display: block; font-weight: 400; color: #4a545b; }
tbody th { font-weight: 500; }
td.best { font-weight: 700; background: #e3f0f8; }
td.text { text-align: left; }
.wrong { color: #a34700; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.panels.wide { grid-template-columns: minmax(0, 36rem); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; margin: 1rem 0; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; max-width: 30rem; }
.tiles img { image-rendering: pixelated; border: 1px solid #d5dade; }
.wide figure img { max-width: 36rem; }
figcaption { font-size: .88rem; line-height: 1.35; margin-top: .3rem; }
footer { margin: 2.5rem 0 1rem; font-size: .85rem; }
@media (max-width: 40rem) { main { padding: .9rem; } dl { display: block; } dd { margin: 0 0 .5rem; } }
@media print { h2, figure, tr { break-inside: avoid; } }
"""


def page(report: Report) -> str:
    """The whole page of a report.

    Args:
        report: whose words may hold anything; they are escaped.

    Returns:
        HTML.
    """
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(report.title)}</h1>\n<p class="summary">{escape(report.summary)}</p>\n'
        f"{_scores(report)}\n{f'<ul>{notes}</ul>' if notes else ''}\n"
        f"<dl>{''.join(_explained(column) for column in report.columns)}</dl>\n"
        + "\n".join(_section(section) for section in report.sections)
        + "\n<footer>Made by lapkit. Everything on this page is inside this one file.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide for the screen.

    Args:
        head: cells of HTML, `<th>` each.
        rows: cells of HTML, `<th>` or `<td>` each.

    Returns:
        HTML.
    """
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    top = f"<thead><tr>{''.join(head)}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>'


def panels(drawings: Iterable[tuple[str, Callable[[Axes], object]]], *, size: tuple[float, float], wide: bool) -> str:
    """Drawings side by side where there is room, else one below the other.

    Args:
        drawings: what each shows, for readers without sight, and what draws it into axes.
        size: width and height of each, in inches.
        wide: one drawing over the width of the text.

    Returns:
        HTML with SVG inside.
    """
    found = "".join(f'<figure><img alt="{escape(alt)}" src="{_drawn(draw, size)}"></figure>' for alt, draw in drawings)
    return f'<div class="panels{" wide" if wide else ""}">{found}</div>'


def image(data: bytes, kind: str, alt: str) -> str:
    """A picture inside the page.

    Args:
        data: the file.
        kind: "png" or "svg+xml".
        alt: what it shows.

    Returns:
        HTML.
    """
    return f'<img alt="{escape(alt)}" src="{_inline(data, kind)}">'


def _drawn(draw: Callable[[Axes], object], size: tuple[float, float]) -> str:
    figure, ax = export_axes(size)
    draw(ax)
    return _inline(as_svg(figure), "svg+xml")


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _section(section: Section) -> str:
    return f'<h2>{escape(section.title)}</h2>\n<p class="caption">{escape(section.caption)}</p>\n{section.content()}'


def _scores(report: Report) -> str:
    best = {column.name: column.best([row[column.name] for row in report.rows.values()]) for column in report.columns}
    rows = []
    for name, row in report.rows.items():
        cells = [f'<th scope="row">{escape(name)}</th>']
        for column in report.columns:
            value = row[column.name]
            mark = ' class="best"' if value == best[column.name] else ""
            cells.append(f"<td{mark}>{escape(column.text(value))}</td>")
        rows.append(cells)
    return table(['<th scope="col">method</th>', *(_heading(column) for column in report.columns)], rows)


def _heading(column: Column) -> str:
    wish = {"smaller": "smaller is better", "larger": "larger is better", None: ""}
    words = wish.get(column.better) if not isinstance(column.better, float) else f"best: {column.better:g}"
    small = " ".join(f"<small>{escape(line)}</small>" for line in (column.unit, words) if line)
    return f'<th scope="col">{escape(column.name)}{small}</th>'


def _explained(column: Column) -> str:
    return f"<dt>{escape(column.name)}</dt><dd>{escape(column.about)}</dd>"
