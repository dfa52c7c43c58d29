"""The page and the pictures of `look`: whole, self-contained, legible, true to the numbers, for every family."""

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Sheet
from matplotlib.image import imread
from matplotlib.text import Text
from tests.looked import FAMILIES, FULL, Weights, planted, written
from tests.reference.random_weights import random_weights
from tests.test_draw import check_places, shown
from typer.testing import CliRunner

from cavelight.cli.main import app
from cavelight.errors import UserError
from cavelight.see import style
from cavelight.see.architecture import draw_architecture
from cavelight.see.experts import expert_norms, routing_bias
from cavelight.see.figure import Curves, Figure, Heat, Line, chosen, limits, plain, short, ticks
from cavelight.see.latents import latent
from cavelight.see.look import data, figures, look
from cavelight.see.magnitudes import not_finite
from cavelight.see.measure import Measures, measure
from cavelight.see.page import page
from cavelight.see.plates import draw_figure, is_drawn
from cavelight.spec.events import Event, Phase
from cavelight.weights.stored import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("full"), FULL, random_weights(FULL))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> Measures:
    return measure(checkpoint)


IMAGE = r'<img src="data:image/png;base64,([^"]+)"'


class Reader(HTMLParser):
    """Checks that tags close in order, and gathers what a page consists of."""

    VOID = frozenset({"meta", "img", "source", "br", "path", "use", "image"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert len(given) == len(attributes), f"an attribute twice: {attributes}"
        self.links += [given[key] or "" for key in ("src", "href", "srcset") if key in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "img":
            self.images.append(given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, words: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(words)


def read_page(html: str) -> Reader:
    """The page, once it is known to be whole, self-contained and legible to those who do not see it."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert [link for link in reader.links if not link.startswith(("#", "data:image/png;base64,"))] == ["look.json"]
    assert len(reader.ids) == len(set(reader.ids))
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert all(image["alt"] for image in reader.images)
    assert not re.search(r"\b(nan|inf|None|np\.)\b", " ".join(reader.words).replace("NaN", ""))
    return reader


def embedded(html: str) -> Any:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert block
    return json.loads(block[1])


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("drawing") / "architecture.svg"
    draw_architecture(FULL, path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_page(tmp_path: Path, drawing: str, family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]
    checkpoint = written(tmp_path / "<model> & co", config, random_weights(config), dtype=dtype)
    found = measure(checkpoint)
    content = data(found, figures(found), checkpoint)
    html = page(content, figures(found), drawing)
    reader = read_page(html)
    assert embedded(html) == content == plain(content)
    words = " ".join(reader.words)
    for figure in figures(found):
        assert figure.title in words and figure.how in words and words.count(figure.finding) == 2
        assert figure.finding.endswith(".") and figure.key in reader.ids
    keys = {figure.key for figure in figures(found)}
    assert ("bias" in keys) == (config.n_routed_experts is not None and config.model_type == "deepseek_v3")
    assert ("experts" in keys) == (config.n_routed_experts is not None)
    assert ("query_latent" in keys) == (config.q_lora_rank is not None)
    assert ("mtp" in keys) == (config.num_nextn_predict_layers > 0) == (" MTP module" in words.split("What stands")[0])
    assert {"parameters", "latent", "norms", "spread"} <= keys
    assert "not_finite" not in keys and all(sentence in words for sentence in content["absent"])


def test_the_page_wears_its_own_colours(checkpoint: Checkpoint, found: Measures, drawing: str) -> None:
    html = page(data(found, figures(found), checkpoint), figures(found), drawing)
    drawn = html[html.index('<section id="architecture">') : html.index('<section id="parameters">')]
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}  # a default that nothing is drawn with
    sheet = html[html.index("<style>") : html.index("</style>")]
    defined = set(re.findall(r"(--[\w-]+):", sheet))
    assert set(re.findall(r"var\((--[\w-]+)", html)) <= defined | {"--label", "--height"}


def test_a_heatmap_has_the_colours_of_its_cells(checkpoint: Checkpoint, found: Measures, drawing: str) -> None:
    html = page(data(found, figures(found), checkpoint), figures(found), drawing)
    bias = html[html.index('<section id="bias">') :]
    for attribute in ("srcset", "src"):
        source = re.search(rf'{attribute}="data:image/png;base64,([^"]+)"', bias)
        assert source
        pixels = imread(BytesIO(base64.b64decode(source[1])))[..., :3]
        figure = routing_bias(found)
        assert figure is not None and pixels.shape[:2] == figure.panels[0].values.shape
        shades, lightness = figure.panels[0].shades, pixels.sum(axis=-1)
        middle, ends = lightness[np.abs(shades) < 0.1], lightness[np.abs(shades) > 0.9]
        assert middle.min() > ends.max() if attribute == "src" else middle.max() < ends.min()
        assert (pixels[..., 2] > pixels[..., 0])[shades < -0.5].all()  # blue
        assert (pixels[..., 2] < pixels[..., 0])[shades > 0.5].all()  # amber


def test_nan_is_shown_and_stops_nothing(tmp_path: Path, drawing: str) -> None:
    def spoil(weights: Weights) -> None:
        weights["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = float("nan")
        weights["model.layers.2.self_attn.kv_b_proj.weight"][1, 1] = float("inf")
        weights["model.layers.2.mlp.gate.e_score_correction_bias"][4] = float("nan")
        weights["model.layers.0.input_layernorm.weight"][0] = float("nan")

    found = planted(tmp_path, spoil)
    table = not_finite(found)
    assert table is not None and table.finding.startswith("4 numbers in 4 tensors are NaN or infinite")
    assert latent(found).finding.endswith("Not finite: layer 0, layer 2.")
    norms = expert_norms(found)  # the cells of what is not finite are clear and bear a cross
    assert norms is not None and np.argwhere(np.isnan(norms.panels[1].values)).tolist() == [[0, 2]]
    checkpoint = Checkpoint(tmp_path)
    html = page(data(found, figures(found), checkpoint), figures(found), drawing)
    section = html[html.index('<section id="experts">') :]
    clear = [imread(BytesIO(base64.b64decode(source)))[..., 3] == 0 for source in re.findall(IMAGE, section)[:3]]
    assert [np.argwhere(cells).tolist() for cells in clear] == [[], [[0, 2]], []]
    assert re.search(r"×\s+not finite", " ".join(read_page(html).words))

    def nothing_but(weights: Weights) -> None:
        for name, tensor in weights.items():
            weights[name] = torch.full_like(tensor, float("nan"))

    found = planted(tmp_path / "all", nothing_but)
    read_page(page(data(found, figures(found), Checkpoint(tmp_path / "all")), figures(found), drawing))


def test_zeros_stop_nothing(tmp_path: Path, drawing: str) -> None:
    found = planted(tmp_path, lambda weights: weights.update({name: 0 * tensor for name, tensor in weights.items()}))
    read_page(page(data(found, figures(found), Checkpoint(tmp_path)), figures(found), drawing))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pictures in few pixels, each held to have no words that overlap or leave the sheet; yields all their words."""
    seen: list[str] = []
    save = Sheet.savefig

    def savefig(sheet: Sheet, *arguments: Any, **options: Any) -> None:
        sheet.draw_without_rendering()
        texts = [text for text in sheet.findobj(Text) if text.get_text().strip() and shown(text)]
        check_places(sheet, texts)
        seen.extend(text.get_text() for text in texts)
        save(sheet, *arguments, **options | {"dpi": 30})

    monkeypatch.setattr(Sheet, "savefig", savefig)
    yield seen


def test_pictures_lie_beside_the_page(tmp_path: Path, checkpoint: Checkpoint, coarse: list[str]) -> None:
    events: list[Event] = []
    out = tmp_path / "looked"
    assert look(checkpoint, out, events.append) == out / "index.html"
    html = (out / "index.html").read_text(encoding="utf-8")
    content = json.loads((out / "look.json").read_text(encoding="utf-8"))
    read_page(html)
    assert embedded(html) == content
    pictures = {file.stem: imread(file) for file in out.glob("*.png")}
    drawn = {figure["key"] for figure in content["figures"]} - {"parameters"}
    assert pictures.keys() == drawn | {"architecture"}
    assert all(pixels[..., :3].std() > 0.02 for pixels in pictures.values())
    reading = [event for event in events if isinstance(event, Phase) and event.unit == "B"]
    total = sum(4 * tensor.numel() for tensor in random_weights(FULL).values())
    assert [event.done for event in reading] == sorted({event.done for event in reading})
    assert (reading[0].done, reading[-1].done, reading[-1].total) == (0, total, total)
    assert list(tmp_path.iterdir()) == [out]


def test_names_of_checkpoints_are_words_not_formulas_or_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "DOTS_PER_INCH", 20)
    monkeypatch.setattr("cavelight.see.look.is_drawn", lambda figure: False)  # they are seen above
    name = r"$\frac$ --><script>alert(1)<img src=x>"
    page = look(written(tmp_path / name, FULL, random_weights(FULL)), tmp_path / "out").read_text(encoding="utf-8")
    assert "alert(1)" in page and "<script>alert" not in page and "<img src=x" not in page


def test_many_layers_and_experts_keep_their_words_apart(tmp_path: Path, coarse: list[str]) -> None:
    names = (*(f"layer {n}" for n in range(3, 61)), "MTP")
    experts = tuple(str(e) for e in range(384))
    values = np.random.default_rng(0).uniform(-1, 1, (59, 384))
    ends = ("2.34e−5 below", "median", "2.34e−5 above")
    heat = Heat("Bias of each expert", "a unit", names, experts, values, values, ends, "expert", values < -0.9, "below")
    lines = tuple(Line(f"line {n}", 1e-3 * values[:, n] ** 2, named=n < 6) for n in range(64))
    curves = Curves("Singular values", "a unit", names, lines, ((2e-3, "initializer_range"),), log=True)
    draw_figure(Figure("many", "Many", "How.", "What stands out. " * 20, (heat, curves)), tmp_path / "many.png")
    assert {"layer 3", "layer 20", "MTP", "50", "383", "line 5", "initializer_range"} <= set(coarse)
    assert "line 6" not in coarse


def test_names_along_an_axis_are_round_and_apart() -> None:
    layers = [f"layer {n}" for n in range(3, 61)] + ["MTP"]
    assert [layers[i] for i in chosen(layers, 9)] == [f"layer {n}" for n in (3, 10, 20, 30, 40, 50)] + ["MTP"]
    assert chosen(["layer 0"], 9) == [0] and chosen(["layer 0", "MTP"], 9) == [0, 1]
    experts = [str(e) for e in range(64)]
    assert [experts[i] for i in chosen(experts, 9)] == ["0", "10", "20", "30", "40", "50", "60"]
    for count in range(1, 400, 7):
        kept = chosen([str(e) for e in range(count)], 9)
        assert kept[0] == 0 and len(kept) <= 12 and kept == sorted(set(kept))


@pytest.mark.parametrize("log", [False, True])
def test_scales_hold_all_values_and_some_round_numbers(log: bool) -> None:
    for values in ([0.0213, 0.0214], [1e-6, 1.0], [3.0], [0.4, 7.0, np.nan], [-2.0, 5.0], [np.nan], [1.0, 9e8]):
        low, high = limits([Line("a line", np.array(values))], [], log)
        inside = [value for value in values if np.isfinite(value) and (value > 0 or not log)]
        assert low < high and all(low <= value <= high for value in inside)
        marks = ticks(low, high, log)
        assert 2 <= len(marks) <= 8 and all(low * 0.999 <= mark <= high * 1.001 for mark in marks if mark > 0)
        assert len({short(mark) for mark in marks}) == len(marks)


def test_no_folder_of_others_is_replaced(tmp_path: Path, checkpoint: Checkpoint) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("thesis.tex", "config.json"):
        (mine / name).write_text("precious")
        with pytest.raises(UserError, match="something other than the pictures"):
            look(checkpoint, mine)
        assert (mine / name).read_text() == "precious"
        (mine / name).unlink()
    with pytest.raises(UserError, match="something other than the pictures"):
        look(checkpoint, checkpoint.folder)
    (mine / "look.json").write_text('{"figures": [{"key": "bias"}]}')
    (mine / "bias.png").write_text("an earlier look's")
    (mine / "holiday.png").write_text("precious")
    with pytest.raises(UserError, match=r"holiday\.png"):
        look(checkpoint, mine)
    (mine / "holiday.png").unlink()
    (mine / "look.json").write_text("[]")
    with pytest.raises(UserError, match=r"bias\.png"):
        look(checkpoint, mine)
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file", tmp_path / "file" / "inside" / "deep"):
        with pytest.raises(UserError, match=r"something other|cannot be written"):
            look(checkpoint, place)


def test_the_command_tells_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    monkeypatch.setattr(style, "DOTS_PER_INCH", 20)
    monkeypatch.setattr("cavelight.see.look.is_drawn", lambda figure: False)  # they are seen above
    run = tmp_path / "run"
    written(run / "model", FULL, random_weights(FULL))
    result = CliRunner().invoke(app, ["look", str(run), "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert lines[0] == {"kind": "phase", "name": "reading weights", "done": 0, "unit": "B"} | {
        "total": lines[0]["total"]
    }
    assert lines[-1]["page"] == str(tmp_path / "run-look" / "index.html") and lines[-1]["checkpoint"] == "run"
    assert [figure["key"] for figure in lines[-1]["figures"]][:3] == ["parameters", "bias", "experts"]
    assert len(lines[-1]["figures"][1]["panels"][0]["values"]) == 3
    result = CliRunner().invoke(app, ["look", str(run), "--out", str(tmp_path / "run-look")])  # replaces what it wrote
    assert result.exit_code == 0, result.output
    assert "Routing bias" in result.output and "index.html" in result.output
    result = CliRunner().invoke(app, ["look", str(tmp_path / "nowhere")])
    assert result.exit_code == 2


def test_pictures_are_made_of_panels_only(found: Measures) -> None:
    assert [figure.key for figure in figures(found) if not is_drawn(figure)] == ["parameters"]
