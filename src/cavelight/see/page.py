"""The page of `look`: figures as HTML that needs nothing but itself, on any screen, by light or dark.

The script tells the values under the pointer; all else stands without it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from cavelight.see import architecture, style
from cavelight.see.figure import Figure
from cavelight.see.plots import plot

# What the page's style sheet calls the colours of a drawing.
VARIABLES = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.FAINT: "faint",
    style.GROUND: "ground",
    style.BLUE: "blue",
    style.AMBER: "amber",
    style.GREY: "grey",
    style.DEEP_AMBER: "deep",
    architecture.CARD: "card",
    architecture.PALE_BLUE: "pale-blue",
    architecture.PALE_AMBER: "pale-amber",
    architecture.LIGHT: "light",
}


def page(content: Mapping[str, Any], figures: Sequence[Figure], drawing: str) -> str:
    """The whole page. content: what look.json holds; drawing: the architecture as SVG, in style's colours."""
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    sections = "".join(_section(figure, f) for f, figure in enumerate(figures))
    name, room = escape(content["checkpoint"]), files("cavelight.see")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in content["notes"])
    summary = "".join(
        f'<li><a href="#{figure.key}">{escape(figure.title)}</a> {escape(figure.finding)}</li>' for figure in figures
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>Inside {name}</title>
<style>
{(room / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>Inside {name}</h1>
<p class="facts">{" · ".join(f"<span>{escape(fact)}</span>" for fact in content["facts"])}</p>
{notes}</header>
<nav aria-labelledby="summary">
<h2 id="summary">What stands out</h2>
<ol>{summary}</ol>
</nav>
<main>
<section id="architecture">
<h2>The model</h2>
<p class="how">Above, the layers that a token's vector runs through from left to right; below, one of them opened: how
it looks at earlier tokens, what it caches of them, and how it works on what it found.</p>
<div class="wide" tabindex="0" role="region" aria-label="Drawing of the model; scrolls sideways on narrow screens">
{themed(drawing, "Drawing of the model: " + ", ".join(content["facts"]))}
</div>
</section>
{sections}</main>
<footer>
{_absent(content["absent"])}<p><a id="download" href="look.json" download="look.json">The numbers as JSON</a></p>
<p>Made by <code>cavelight look</code> from the weights alone: nothing was run.</p>
</footer>
<script type="application/json" id="data">{data}</script>
<script>
{(room / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _absent(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences)


def _section(figure: Figure, f: int) -> str:
    panels = "".join(plot(panel, f"{f}.{p}", figure.title) for p, panel in enumerate(figure.panels))
    return f"""<section id="{figure.key}">
<h2>{escape(figure.title)}</h2>
<p class="finding">{escape(figure.finding)}</p>
<p class="how">{escape(figure.how)}</p>
<div class="panels">
{panels}</div>
</section>
"""


def themed(svg: str, alt: str, prefix: str = "") -> str:
    """A drawing's SVG as part of the page: its colours become the page's, which follow the scheme.

    prefix: of its ids, where a page holds several drawings.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    if prefix:
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(alt)}">{rest}'.replace("xlink:href", "href")
