"""The page of a run: its figures as SVG within, its samples, its recipe. It needs nothing but itself, and no script."""

import colorsys
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from cavelight.see.figure import number
from cavelight.see.page import VARIABLES, themed
from cavelight.see.run_log import Line, RunLog
from cavelight.see.run_parts import Part
from cavelight.see.series import Series
from cavelight.spec.recipe import Recipe

MOST_SAMPLES = 6
MOST_HAPPENINGS = 60  # rows of the table of what happened: the first and the last ones
COLOR = re.compile(r"#[0-9a-f]{6}\b")
DARKEST = 0.45  # lightness of a line on a dark ground, at least
NOUNS = {"saved": "save"}  # what kinds of lines are called, where not by their own word
SECTIONS = ("model", "data", "train")


def run_page(run: RunLog, facts: Sequence[str], parts: Sequence[Part], drawings: Mapping[str, str], inside: str) -> str:
    """The whole page. drawings: the SVG of each, by its key; inside: where a look inside the model lies, if any."""
    name, room = escape(run.title), files("cavelight.see")
    style = "".join((room / file).read_text(encoding="utf-8") for file in ("page.css", "run_page.css"))
    sections = [(part.key, part.title, part.finding, _figures(part, drawings)) for part in parts]
    sections += _words(run)
    summary = "".join(
        f'<li><a href="#{key}">{escape(title)}</a> {escape(told)}</li>' for key, title, told, _ in sections
    )
    body = "".join(_section(*section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title>
<style>
{style}{_other_colors(drawings.values())}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p class="facts">{" · ".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>
</header>
<nav aria-labelledby="summary">
<h2 id="summary">What stands out</h2>
<ol>{summary}</ol>
</nav>
<main>
{body}</main>
<footer>
<p>{_inside(inside)}</p>
<p>Made by <code>cavelight look</code> from the run's metrics.jsonl and recipe.json; each figure lies beside it as SVG
and PNG, and run.svg and run.png put the first ones on one sheet.</p>
</footer>
</body>
</html>
"""


def _section(key: str, title: str, finding: str, body: str) -> str:
    return f"""<section id="{key}">
<h2>{escape(title)}</h2>
<p class="finding">{escape(finding)}</p>
{body}</section>
"""


def _figures(part: Part, drawings: Mapping[str, str]) -> str:
    shown = "".join(
        f"<figure>{_colored(themed(drawings[drawing.key], f'{run_words(drawing.words)}.', drawing.key))}</figure>\n"
        for drawing in part.drawings
    )
    return f'<p class="how">{escape(part.how)}</p>\n<div class="panels singles">\n{shown}</div>\n'


def run_words(words: str) -> str:
    """A description with a capital."""
    return words[0].upper() + words[1:]


def _colored(svg: str) -> str:
    """What is left of fixed colours becomes variables, which the page's style sheet holds for light and dark."""
    return COLOR.sub(lambda found: f"var(--c{found[0][1:]})", svg)


def _other_colors(drawings: Sequence[str] | Any) -> str:
    """Variables for the colours that the page's own style sheet does not name, such as the shades of layers."""
    colors = sorted({color for svg in drawings for color in COLOR.findall(svg)} - set(VARIABLES))
    light = "".join(f"--c{color[1:]}: {color};" for color in colors)
    dark = "".join(f"--c{color[1:]}: {_for_dark(color)};" for color in colors)
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n" if colors else ""


def _for_dark(color: str) -> str:
    """The colour of the same hue for a dark ground: what stood out by darkness does so by lightness."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    turned = colorsys.hls_to_rgb(hue, max(1 - lightness, DARKEST), saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in turned)


def _words(run: RunLog) -> list[tuple[str, str, str, str]]:
    """The sections that hold words: key, title, finding, content."""
    sections = []
    if run.samples:
        last = run.samples[-1]["step"]
        finding = f"{number(len(run.samples), 'sample')} of what the model writes, the last after step {last:,}."
        sections.append(("samples", "Samples", finding, _samples(run.samples, run.series)))
    if run.happened:
        finding = ", ".join(number(count, NOUNS.get(kind, kind)) for kind, count in _kinds(run.happened).items())
        sections.append(("happened", "What happened", finding[0].upper() + finding[1:] + ".", _happened(run.happened)))
    if run.sessions:
        times = len(run.sessions) - 1
        finding = f"The run was stopped and went on {number(times, 'time')}." if times else "It ran without a stop."
        sections.append(("sessions", "Machine and sessions", finding, _sessions(run.sessions)))
    if run.recipe:
        changed = sum(is_changed for rows in _recipe(run.recipe).values() for _, _, is_changed in rows)
        finding = f"{number(changed, 'key')} {'differs' if changed == 1 else 'differ'} from the default, in bold."
        sections.append(("recipe", "Recipe", finding, _recipe_tables(run.recipe)))
    return sections


def _samples(samples: Sequence[Line], series: Series) -> str:
    """The first, some between, and the last."""
    count = min(len(samples), MOST_SAMPLES)
    chosen = [samples[round(i * (len(samples) - 1) / max(count - 1, 1))] for i in range(count)]
    return "".join(_sample(sample, series) for sample in chosen)


def _sample(sample: Line, series: Series) -> str:
    share = series.tokens_at(sample["step"]) / int(series.tokens_P[-1])
    held = ", ".join(f"{share:.0%}" for share in sample.get("acceptance") or ())
    facts = f"{share:.0%} of the run so far" + (f" · drafts accepted: {held}" if held else "")
    return f"""<div class="sample">
<h3>Step {sample["step"]:,} <span>{facts}</span></h3>
<pre><span class="prompt">{escape(sample["prompt"])}</span>{escape(sample["text"])}</pre>
</div>
"""


def _kinds(happened: Sequence[Line]) -> dict[str, int]:
    kinds = [line["kind"] for line in happened]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _happened(happened: Sequence[Line]) -> str:
    half = MOST_HAPPENINGS // 2
    shown = happened if len(happened) <= MOST_HAPPENINGS else [*happened[:half], *happened[-half:]]
    rows = [_happening(line) for line in shown]
    if len(shown) < len(happened):
        rows.insert(half, f'<tr><th scope="row">…</th><td></td><td>{len(happened) - len(shown):,} more</td></tr>')
    head = '<th scope="col">step</th><th scope="col">what</th><th scope="col"></th>'
    return _table(head, rows, "What happened", "events")


def _happening(line: Line) -> str:
    step = f"{line['step']:,}" if "step" in line else ""
    rest = "; ".join(_told(key, value) for key, value in line.items() if key not in ("kind", "step") and value != "")
    return f'<tr><th scope="row">{step}</th><td>{escape(str(line["kind"]))}</td><td>{escape(rest)}</td></tr>'


def _told(key: str, value: Any) -> str:
    words = _value(value)
    return words if key in ("text", "why") else f"{key.replace('_', ' ')} {words}"


def _sessions(sessions: Sequence[Line]) -> str:
    rows = [
        f'<tr><th scope="row">{line["step"]:,}</th><td>{escape(line["at"][:16].replace("T", " "))} UTC</td>'
        f"<td>{line['peak'] / 1e12:.3f} Tflop/s</td><td>{escape(line['machine'])}</td></tr>"
        for line in sessions
    ]
    words = ("from step", "at", "matmul peak", "machine")
    return _table("".join(f'<th scope="col">{word}</th>' for word in words), rows, "Sessions", "events")


def _recipe(recipe: Line) -> dict[str, list[tuple[str, str, bool]]]:
    """Of each section its keys, values as words, and whether they differ from the default."""
    defaults = Recipe().model_dump(mode="json")
    return {
        section: [
            (key, _value(value), key in defaults[section] and value != defaults[section][key])
            for key, value in keys.items()
        ]
        for section in SECTIONS
        if isinstance(keys := recipe.get(section), dict)
    }


def _recipe_tables(recipe: Line) -> str:
    tables = ""
    for section, keys in _recipe(recipe).items():
        rows = [_key(*row) for row in keys]
        tables += f"<div><h3>{section}</h3>\n{_table('', rows, section)}</div>\n"
    return f'<div class="tables">\n{tables}</div>\n'


def _key(key: str, words: str, changed: bool) -> str:
    opening = '<tr class="changed">' if changed else "<tr>"
    return f'{opening}<th scope="row">{escape(key)}</th><td>{escape(words)}</td></tr>'


def _table(head: str, rows: Sequence[str], label: str, kind: str = "") -> str:
    lines = "\n".join(rows)
    top = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="{kind}">
{top}<tbody>
{lines}
</tbody></table></div>
"""


def _value(value: Any) -> str:
    """A value of a recipe or a log as a person writes it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items()) or "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(_value, value)) or "–"
    return str(value)


def _inside(address: str) -> str:
    if address:
        return f'<a href="{escape(address)}">Inside its model</a>: biases, experts, latents, MTP.'
    return "<code>cavelight look RUN/model</code> looks inside its model: biases, experts, latents, MTP."
