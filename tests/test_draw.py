"""Figures: what they say is what was logged, no words overlap or leave the sheet, and runs of every kind are drawn."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from bench import balance
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import load_file

from cavelight.errors import UserError
from cavelight.see import style
from cavelight.see.architecture import cells, draw_architecture, example
from cavelight.see.draw import draw_comparison, draw_run, draw_speculation
from cavelight.see.run_log import RunLog
from cavelight.see.series import Series, last_tenth, moe_layer_names, smooth
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset, preset_names
from cavelight.train.checkpoints import folder_of, saved_steps
from cavelight.train.state import RunFolder, read_metrics

SIX_LAYERS = preset("demo").replace(num_hidden_layers=6, n_routed_experts=16)

REFERENCE = {"xz -9e": 1.79, "xz that has seen the training files": 1.29}
SIGNATURE = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def metrics(
    steps: int = 40, layers: int = 6, experts: int = 16, mtp: bool = True, looks: bool = True, skew: float = 0.0
) -> list[dict[str, Any]]:
    """Lines like those of metrics.jsonl; with `skew` some experts get more to do than others."""
    dice, lines = np.random.default_rng(0), []
    wanted = np.exp(skew * dice.normal(size=(layers, experts)))
    for step in range(1, steps + 1):
        loss = 1.4 + 5 / step**0.5 + float(dice.normal(0, 0.05))
        counts = (1000 * wanted * dice.uniform(0.95, 1.05, size=wanted.shape)).astype(int)
        lines.append(
            {"kind": "step", "step": step, "steps": steps, "tokens": 2048 * step, "loss": loss, "balance_loss": 1.0}
            | {"mtp_loss": (loss + 0.5) * mtp, "grad_norm": 1.0, "learning_rate": 3e-3 * (1 - step / steps)}
            | {"tokens_per_second": 8e3, "seconds_left": 0.0, "seconds": 0.2 * step, "counts": counts.tolist()}
            | {"max_vio": [float(load.max() / load.mean() - 1) for load in counts]}
            | {"rows": min(8, 2 + step // 4), "skipped": False, "bias_range": [step / steps] * layers}
            | {"mtp_losses": [loss + 0.5] * mtp, "peak_share": 0.3 + float(dice.normal(0, 0.01))}
        )
        if looks and step % max(steps // 8, 1) == 0:
            lines.append({"kind": "evaluated", "step": step, "bits_per_byte": loss / 2 + 0.8, "whole": False})
    if looks:
        lines.append({"kind": "evaluated", "step": steps, "bits_per_byte": 1.5, "whole": True})
    return lines


def stats(**changes: Any) -> dict[str, Any]:
    return {
        "new_tokens": 200,
        "tokens_per_second": 66.0,
        "tokens_per_round": 2.3,
        "rounds": 80,
        "proposed": [80, 70, 60],
        "accepted": [60, 35, 15],
        "off": None,
    } | changes


def run(lines: Sequence[Mapping[str, Any]], config: ModelConfig | None = None) -> RunLog:
    return RunLog("A run", Series.of(lines), config=config, reference=REFERENCE)


PLAIN = stats(rounds=0, proposed=[], accepted=[], tokens_per_second=44.0, tokens_per_round=1.0)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All words of the figures that a test draws; checks each figure when it is saved."""
    seen: list[str] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and shown(text)]
        seen.extend(text.get_text() for text in texts)
        check_places(figure, texts)
        save(figure, *arguments, **options | {"dpi": 20})  # what is tested is seen already

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def shown(text: Text) -> bool:
    """Ticks beyond an axis' limits, and those of a hidden axis, exist but are not drawn."""
    figure = text.get_figure()
    assert figure is not None
    for axes in figure.findobj(Axes):
        for axis, centre in ((axes.xaxis, 0), (axes.yaxis, 1)):
            if text in (tick.label1 for tick in axis.majorTicks):  # which does not know its axes itself
                place, area = text.get_window_extent().get_points().mean(axis=0), axes.bbox.padded(2).get_points()
                inside = area[0, centre] <= place[centre] <= area[1, centre]
                return text.get_visible() and axes.axison and bool(inside)
    return text.get_visible() and (text.axes is None or text.axes.axison or text in text.axes.texts)


def check_places(figure: Figure, texts: list[Text]) -> None:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text!r} leaves the sheet"
    for (one, a), (other, b) in combinations(boxes, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes of lines that follow one another touch by a pixel or two of empty space above the letters.
        assert across <= 0 or up <= 2.5, f"{one!r} and {other!r} overlap"


@pytest.mark.parametrize("suffix", style.FORMATS)
def test_a_run_is_drawn_in_every_format_and_twice_alike(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        draw_run(run(metrics(), SIX_LAYERS), path)
    assert first.read_bytes().startswith(SIGNATURE[suffix])
    assert first.read_bytes() == second.read_bytes()


def test_a_run_says_what_was_logged(tmp_path: Path, words: list[str]) -> None:
    draw_run(run(metrics(), SIX_LAYERS), tmp_path / "run.png")
    together = "\n".join(words)
    for part in ("A run", "40 steps", "81.9k tokens", "1.500 bits per byte on all held-out text", "1.50  all text"):
        assert part in together
    for part in ("xz -9e  1.79", "xz that has seen the training files  1.29", "layer 5", "MTP  ", "all 96 in use"):
        assert part in together


@pytest.mark.parametrize(
    "lines",
    [
        metrics(steps=1),
        metrics(steps=10, mtp=False, looks=False),
        metrics(steps=900, layers=59, experts=32),
        metrics(layers=8, skew=2.0),
        [line | {"max_vio": [], "counts": []} for line in metrics()],
        [line | {"loss": float("nan"), "grad_norm": float("inf")} if line["step"] == 7 else line for line in metrics()],
        [line | {"loss": float("nan"), "mtp_loss": float("nan"), "grad_norm": float("nan")} for line in metrics()],
        metrics()[:-1],
    ],
    ids=["one step", "no MTP", "many layers", "skewed", "dense", "a NaN", "all NaN", "interrupted"],
)
def test_every_kind_of_run_is_drawn(tmp_path: Path, words: list[str], lines: list[dict[str, Any]]) -> None:
    draw_run(run(lines), tmp_path / "run.png")
    together = "\n".join(words)
    assert "next token" in together and ("MTP  " in together) == any(line.get("mtp_loss") for line in lines)


def test_what_is_missing_is_said(tmp_path: Path, words: list[str]) -> None:
    bare = [line | {"max_vio": [], "counts": []} for line in metrics(looks=False)]
    draw_run(run(bare), tmp_path / "run.png")
    draw_speculation(stats(rounds=0, off="the model has no MTP modules"), PLAIN, tmp_path / "speed.png")
    for sentence in ("not evaluated in this run", "no layer has experts", "the model has no MTP modules"):
        assert sentence in words


def test_runs_stand_side_by_side(tmp_path: Path, words: list[str]) -> None:
    runs = {balance.ON: metrics(), balance.OFF: metrics(skew=1.5)}
    draw_comparison(runs, tmp_path / "two.png", config=SIX_LAYERS)
    assert words.count(balance.ON) == words.count(balance.OFF) == 2  # at its curve, above its map
    assert {f"{balance.ON}  1.50", f"{balance.OFF}  1.50", "its worst layer"} <= set(words)


def test_speculation_shows_acceptance_and_speed(tmp_path: Path, words: list[str]) -> None:
    draw_speculation(stats(), PLAIN, tmp_path / "speed.png")
    assert {"75%", "50%", "25%", "44.0", "66.0   1.50×", "+1", "+3"} <= set(words)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_seen(tmp_path: Path, words: list[str], name: str) -> None:
    draw_architecture(preset(name), tmp_path / "model.png", name)
    assert name in words


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 5},
        {"first_k_dense_replace": 6},
        {"n_shared_experts": None, "n_group": 1, "topk_group": 1, "n_routed_experts": 7},
        {"num_hidden_layers": 1, "first_k_dense_replace": 0},
        {"moe_layer_freq": 2},
        {"kv_lora_rank": 4096},
    ],
    ids=str,
)
def test_unusual_models_can_be_seen(tmp_path: Path, words: list[str], changes: dict[str, Any]) -> None:
    config = SIX_LAYERS.replace(**changes)
    draw_architecture(config, tmp_path / "model.png")
    modules = config.num_nextn_predict_layers
    assert [f"t + {j}" in words for j in (1, modules + 1, modules + 2)] == [True, True, False]
    has_experts = any(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    assert ("Mixture of experts" in words, "Feed-forward network" in words) == (has_experts, not has_experts)


def test_the_picture_of_v3_has_its_numbers(tmp_path: Path, words: list[str]) -> None:
    draw_architecture(preset("deepseek-v3"), tmp_path / "v3.png")
    together = "\n".join(words)
    for part in ("671 billion", "37.6 billion", "11.6 billion", "58 layers with experts", "8 of 256 experts"):
        assert part in together
    for part in ("576 numbers a token", "32,768", "70.3 kB a token, not 4 MB", "44 million", "4 of 8 groups"):
        assert part in together


@pytest.mark.parametrize(("E", "G"), [(256, 8), (16, 4), (384, 1), (7, 1), (1, 1), (160, 8)])
def test_experts_lie_apart_and_inside(E: int, G: int) -> None:
    squares = list(cells(E, G, 1.0, 2.0, 1.8, 1.3))
    assert len(squares) == E
    for x, y, size in squares:
        assert 1.0 <= x < x + size < 2.8 + 1e-9 and 2.0 - 1e-9 <= y < y + size <= 3.3 + 1e-9
    for (x, y, size), (u, v, _) in combinations(squares, 2):
        assert max(abs(x - u), abs(y - v)) > 1.1 * size


def test_theexample_keeps_to_its_groups() -> None:
    chosen, groups = example(256, 8, 8, 4)
    assert len(chosen) == 8 and len(groups) == 4 and {e // 32 for e in chosen} <= groups


def test_series_read_a_run() -> None:
    lines = metrics(steps=50, layers=2, experts=4)
    for line in lines:
        if line["kind"] == "step":
            late = line["step"] > 45  # the last tenth
            line["counts"] = [[6, 2, 0, 0], [2, 2, 2, 2]] if late else [[9, 9, 9, 9], [0, 0, 0, 36]]
            line["max_vio"] = [2.0, 0.0] if late else [0.0, 3.0]
    series = Series.of(lines)
    np.testing.assert_allclose(series.load_ME, [[3, 1, 0, 0], [1, 1, 1, 1]])
    assert series.mean_max_vio_M().tolist() == [2.0, 0.0] and series.used_M().tolist() == [2, 4]
    assert series.final == (50, 1.5) and len(series.looks) == 8
    assert (series.tokens_at(10), series.tokens_at(0), series.tokens_at(99)) == (20480, 0, 50 * 2048)
    assert [last_tenth(steps) for steps in (1, 9, 10, 24, 5000)] == [1, 1, 1, 2, 500]


def test_layers_are_named_by_the_configuration() -> None:
    config = SIX_LAYERS.replace(num_hidden_layers=4, moe_layer_freq=2, num_nextn_predict_layers=3)
    assert moe_layer_names(config) == ("layer 2", "MTP 1", "MTP 3")
    assert moe_layer_names(preset("nano")) == ("layer 1", "layer 2", "MTP")


def test_smoothing_keeps_level_and_start() -> None:
    slope = np.arange(600.0)
    assert smooth(slope)[0] == 0 and smooth(slope)[300] == 300
    noise = np.random.default_rng(0).normal(5.0, 1.0, 600)
    assert np.std(smooth(noise)[10:-10]) < 0.5 and abs(smooth(noise).mean() - 5.0) < 0.1
    noise[100:140] = np.nan
    assert np.isnan(smooth(noise)[120]) and np.isfinite(smooth(noise)[[90, 150]]).all()
    np.testing.assert_allclose(smooth(noise[:10]), noise[:10])  # few steps are not averaged


@pytest.mark.parametrize("wanted", [[0.5, 0.5, 0.5], [0.9, 0.1], [0.2, 0.21, 0.8, 0.79, 0.5], []])
def test_labels_are_spread_in_order(wanted: list[float]) -> None:
    placed = style.spread(wanted, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert np.mean(placed or [0]) == pytest.approx(np.mean(wanted or [0]))
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert style.spread(placed, 0.1) == pytest.approx(placed)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (999_600, "1M"), (2.87e6, "2.87M"), (0.0022, "0.0022")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert style.short(number) == text


def test_drawing_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    sys.modules.pop("matplotlib.pyplot", None)
    draw_run(run(metrics()), tmp_path / "run.png")
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in sys.modules
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_matplotlib_waits_until_something_is_drawn() -> None:
    command = "import sys, cavelight.see.draw; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_the_users_own_style_does_not_matter(tmp_path: Path) -> None:
    draw_run(run(metrics()), tmp_path / "a.png")
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30, "savefig.transparent": True}):
        draw_run(run(metrics()), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PNG, SVG or PDF"):
        draw_run(run(metrics()), tmp_path / "run.jpeg")
    with pytest.raises(UserError, match="nothing to draw"):
        draw_comparison({"one": []}, tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano recipe on a few modules, ended by minutes, as the demo's is."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "corpus").mkdir()
    for module in ("abc", "bisect", "cmd", "code", "codeop", "colorsys", "copy", "fnmatch", "heapq", "keyword"):
        shutil.copy(Path(sysconfig.get_path("stdlib"), f"{module}.py"), folder / "corpus")
    (folder / "nano.toml").write_text(
        f"""
        [model]
        preset = "nano"
        [data]
        corpus = "{folder / "corpus"}"
        row_length = 32
        [train]
        minutes = 60
        rows_per_step = 2
        warmup_steps = 0
        dtype = "float32"
        bias_speed = 0.01
        evaluate_every = 3
        evaluate_bytes = 500
        """
    )
    return folder / "nano.toml"


def biases(folder: Path) -> float:
    saves = RunFolder(folder).saves
    weights = load_file(folder_of(saves, saved_steps(saves)[-1]) / "weights.safetensors")
    return max(float(weights[name].abs().max()) for name in weights if name.endswith("e_score_correction_bias"))


def test_the_balance_bench_trains_twice_and_tells(tmp_path: Path, recipe: Path, words: list[str]) -> None:
    out, runs = tmp_path / "results", tmp_path / "runs"
    call = ["--recipe", str(recipe), "--steps", "3", "--out", str(out), "--runs", str(runs)]
    assert balance.main(call) == 0
    assert biases(runs / "on") > 0 and biases(runs / "off") == 0
    page = (out / "balance.md").read_text()
    for side in ("on", "off"):
        lines = read_metrics(RunFolder(runs / side).metrics)
        last = [line for line in lines if line["kind"] == "step"][-1]
        assert last["step"] == 3
        for vio, counts in zip(last["max_vio"], last["counts"], strict=True):
            assert f"| {vio:.2f} |" in page and f"| {sum(c > 0 for c in counts)} of 8 |" in page
        assert f"| {lines[-1]['bits_per_byte']:.4f} |" in page
    assert "`bias_speed = 0.01`" in page and "`bias_speed = 0` and `balance_alpha = 0`" in page
    assert (out / "balance.png").exists() and "](balance.png)" in page and "--steps 3" in page
    before = (runs / "on" / "metrics.jsonl").stat().st_mtime_ns
    assert balance.main(call) == 0  # finished runs are read, not trained again
    assert (runs / "on" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another recipe"):
        balance.main([*call, "--set", "train.seed=1"])


def test_the_balance_verdict_is_not_kind() -> None:
    assert "NOT below 0.5" in balance.verdict(Series.of(metrics(skew=1.5)))
    idle = metrics()
    for line in idle:
        line.update({"counts": [[0, 2], [1, 1]], "max_vio": [0.2, 0.0]} if line["kind"] == "step" else {})
    assert "1 experts are NOT used" in balance.verdict(Series.of(idle))
    assert "below 0.5, and every expert is used" in balance.verdict(Series.of(metrics()))
