"""Panels as HTML: words stay text and keep their size, only plots stretch, so that they fit a phone and a wide screen.

A heatmap is a picture with one pixel a cell, once for light screens and once for dark ones; lines are SVG without
proportions of its own; dots are placed by their share of the width.
"""

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from cavelight.see.figure import Curves, Dots, Floats, Heat, Line, Panel, Table, along, chosen, limits, short, ticks

LIGHT = ("#0b3e6f", "#3f83bd", "#b5d2e8", "#eef0f1", "#f6cd8f", "#d97a00", "#7a3b00")
DARK = ("#b9deff", "#5b9fd9", "#2a4c69", "#252e37", "#66491f", "#d08a2c", "#ffd9a0")
UNKNOWN = 255  # of a heatmap's 256 colours, the transparent one of cells that are not finite
SIDE = 1000  # of a plot's own coordinates
LABELS = 9  # at most, along a plot
NARROW = 200  # a heatmap of more columns gets the page's whole width


def plot(panel: Panel, place: str, title: str) -> str:
    """One panel as HTML. place: where the script finds its numbers, \"figure.panel\"; title: of the figure."""
    if isinstance(panel, Table):
        return f'<figure class="table">\n{_caption(panel.title, "")}{_table(panel)}</figure>\n'
    alt = escape(f"{title}: {panel.title}, {panel.unit}. {_extent(panel)}")
    if isinstance(panel, Heat):
        body = _heat(panel, place, alt)
    elif isinstance(panel, Curves):
        body = _curves(panel, place, alt)
    else:
        body = _dots(panel, alt)
    kind = type(panel).__name__.lower() + (" whole" if isinstance(panel, Heat) and len(panel.columns) > NARROW else "")
    return f'<figure class="{kind}">\n{_caption(panel.title, panel.unit)}{body}</figure>\n'


def _caption(title: str, unit: str) -> str:
    return f"<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>\n"


def _extent(panel: Heat | Curves | Dots) -> str:
    """In words, between which values the panel's numbers lie."""
    arrays = [panel.values] if isinstance(panel, Heat) else [line.values for line in panel.lines]
    values = np.concatenate([values.ravel() for values in arrays])
    values = values[np.isfinite(values)]
    return f"Values from {short(float(values.min()))} to {short(float(values.max()))}." if len(values) else "No values."


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in table.head)
    rows = [
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    ]
    summed = ' class="summed"' if table.summed else ""
    label = f'tabindex="0" role="region" aria-label="{escape(table.title)}"'
    body = "\n".join(rows)
    return f"""<div class="scroll" {label}><table{summed}>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
"""


def _heat(heat: Heat, place: str, alt: str) -> str:
    rows = len(heat.rows)
    height = 22 if rows <= 10 else 16 if rows <= 20 else 13 if rows <= 30 else 8
    index = np.where(np.isfinite(heat.shades), np.round(127 + 127 * np.nan_to_num(heat.shades)), UNKNOWN)
    light, dark = (_png(index.astype(np.uint8), stops) for stops in (LIGHT, DARK))
    y = _labels(heat.rows, rows * height // 16, "top")
    x = _labels(tuple(map(_brief, heat.columns)), LABELS, "left")
    legend = f'<span>{escape(heat.ends[0])}</span><i class="ramp"></i><span>{escape(heat.ends[2])}</span>'
    legend += f'<span class="middle">pale: {escape(heat.ends[1])}</span>'
    if heat.marks is not None and heat.marks.any():
        legend += f'<span><i class="mark"></i> {escape(heat.mark_word)}</span>'
    if heat.crosses.any():
        legend += '<span><i class="cross">×</i> not finite</span>'
    return f"""<div class="plot" style="--label:{_width(heat.rows)}ch;--height:{rows * height}px">
<div class="y" aria-hidden="true">{y}</div>
<div class="area" data-panel="{place}"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">\
<img src="{light}" alt="{alt}"></picture>{_overlay(heat)}</div>
<div class="x" aria-hidden="true">{x}</div>
{_across(heat.across)}</div>
<div class="legend">{legend}</div>
<output></output>
"""


def _overlay(heat: Heat) -> str:
    """Dots on marked cells and crosses on those that are not finite."""
    rows, columns = heat.values.shape
    marked = heat.marks if heat.marks is not None else np.zeros((rows, columns), dtype=bool)
    dots = "".join(f"M{2 * c + 1} {2 * r + 1}h0" for r, c in np.argwhere(marked))
    holes = np.argwhere(heat.crosses)
    crosses = "".join(f"M{2 * c + 0.4} {2 * r + 0.4}l1.2 1.2m0 -1.2l-1.2 1.2" for r, c in holes)
    size = min(5.0, max(1.5, 300 / columns))
    paths = "".join(
        f'<path class="{kind}" style="stroke-width:{size + more:.1f}px" d="{dots}"/>'
        for kind, more in (("halo", 2), ("marks", 0))
        if dots
    )
    paths += f'<path class="crosses" d="{crosses}"/>' if crosses else ""
    box = f'viewBox="0 0 {2 * columns} {2 * rows}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{paths}</svg>" if paths else ""


def _curves(curves: Curves, place: str, alt: str) -> str:
    low, high = limits(curves.lines, curves.levels, curves.log)
    count = len(curves.places)
    centres = (np.arange(count) + 0.5) / count
    if not curves.dots and count > 1:
        centres = (along(curves.places) - along(curves.places)[0]) / np.ptp(along(curves.places))
    grid = "".join(
        f'<path class="grid" d="M0 {_y(t, low, high, curves.log)}H{SIDE}"/>' for t in ticks(low, high, curves.log)
    )
    levels = "".join(f'<path class="level" d="M0 {_y(v, low, high, curves.log)}H{SIDE}"/>' for v, _ in curves.levels)
    words = "".join(
        f'<span class="level" style="top:{_y(v, low, high, curves.log) / 10:g}%">{escape(w)}</span>'
        for v, w in curves.levels
    )
    lines = "".join(_line(line, centres, low, high, curves) for line in curves.lines)
    labels = {t: short(t) for t in ticks(low, high, curves.log)}
    y = "".join(f'<span style="top:{_y(t, low, high, curves.log) / 10:g}%">{word}</span>' for t, word in labels.items())
    x = _labels(tuple(map(_brief, curves.places)), LABELS, "left", centres)
    across = curves.across or ("layer" if curves.places[0].startswith("layer") else "")
    return f"""<div class="legend">{"".join(map(_swatch, curves.lines))}</div>
<div class="plot" style="--label:{_width(labels.values())}ch;--height:190px">
<div class="y" aria-hidden="true">{y}</div>
<div class="area" data-panel="{place}"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" \
aria-label="{alt}">{grid}{levels}{lines}</svg>{words}</div>
<div class="x" aria-hidden="true">{x}</div>
{_across(across)}</div>
<output></output>
"""


def _line(line: Line, centres: Floats, low: float, high: float, curves: Curves) -> str:
    """One path through what is finite, and a dot on each value where the panel has dots."""
    steps, dots, joined = [], [], False
    for x, value in zip(centres, line.values, strict=True):
        known = np.isfinite(value) and (value > 0 or not curves.log)
        if known:
            at = f"{x * SIDE:.0f} {_y(float(value), low, high, curves.log)}"
            steps.append(f"{'L' if joined else 'M'}{at}")
            dots.append(f"M{at}h0")
        joined = bool(known)
    dashed = " dashed" if line.dashed else ""
    path = f'<path class="line {line.color}{dashed}" style="opacity:{_opacity(line):.2f}" d="{"".join(steps)}"/>'
    return path + (
        f'<path class="dot {line.color}" d="{"".join(dots)}"/>' if curves.dots and len(centres) <= 40 else ""
    )


def _dots(dots: Dots, alt: str) -> str:
    low, high = limits(dots.lines, dots.levels, dots.log)

    def left(value: float) -> str:
        return f"left:{100 - _y(value, low, high, dots.log) / 10:.1f}%"

    marks = ticks(low, high, dots.log)
    grid = "".join(f'<i class="tick" style="{left(t)}"></i>' for t in marks)
    rows = []
    for r, row in enumerate(dots.rows):
        told = [(line, float(line.values[r])) for line in dots.lines]
        told = [(line, value) for line, value in told if np.isfinite(value) and (value > 0 or not dots.log)]
        points = "".join(
            f'<i class="point {line.color}" style="{left(value)};opacity:{_opacity(line):.2f}" '
            f'title="{escape(line.name)}: {short(value)}"></i>'
            for line, value in told
        )
        words = escape("; ".join(f"{line.name} {short(value)}" for line, value in told))
        rows.append(
            f'<span>{escape(row)}</span><div class="track" role="img" aria-label="{words}">{grid}{points}</div>'
        )
    scale = "".join(f'<span style="{left(t)}">{short(t)}</span>' for t in marks)
    return f"""<div class="legend">{"".join(map(_swatch, dots.lines))}</div>
<div class="rows" role="group" aria-label="{alt}">{"".join(rows)}<span></span><div class="x">{scale}</div></div>
"""


def _swatch(line: Line) -> str:
    if not line.named:
        return ""
    dashed = " dashed" if line.dashed else ""
    path = f'<path class="line {line.color}{dashed}" style="opacity:{_opacity(line):.2f}" d="M0 5H24"/>'
    return f'<span><svg class="swatch" viewBox="0 0 24 10" aria-hidden="true">{path}</svg> {escape(line.name)}</span>'


def _opacity(line: Line) -> float:
    return 0.2 + 0.8 * line.strength


def _y(value: float, low: float, high: float, log: bool) -> int:
    """Height of a value from the plot's upper edge, in its own coordinates."""
    share = np.log(value / low) / np.log(high / low) if log else (value - low) / (high - low)
    return round(SIDE * (1 - float(np.clip(share, 0, 1))))


def _labels(names: Sequence[str], most: int, side: str, centres: Floats | None = None) -> str:
    """Some of the names, at the middle of their rows or columns."""
    middle = (np.arange(len(names)) + 0.5) / len(names) if centres is None else centres
    return "".join(
        f'<span style="{side}:{100 * middle[i]:.2f}%">{escape(names[i])}</span>' for i in chosen(names, most)
    )


def _across(word: str) -> str:
    return f'<div class="across" aria-hidden="true">{escape(word)}</div>\n' if word else ""


def _brief(name: str) -> str:
    return name.removeprefix("layer ")


def _width(names: Iterable[str]) -> int:
    return max(map(len, names), default=0)


def _png(index: NDArray[np.uint8], stops: Sequence[str]) -> str:
    """A picture of a byte a pixel, 0 to 254 along the stops' colours, as the content of a src attribute."""
    rgb = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops])
    along = np.linspace(0, len(stops) - 1, UNKNOWN)
    palette = np.stack([np.interp(along, range(len(stops)), rgb[:, i]) for i in range(3)], axis=1).round()
    palette = np.concatenate([palette, rgb[[3]]]).astype(np.uint8)
    rows, columns = index.shape
    pixels = b"".join(b"\0" + row.tobytes() for row in index)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"tRNS", b"\xff" * UNKNOWN + b"\0"),
        (b"IDAT", zlib.compress(pixels, 9)),
        (b"IEND", b""),
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"
