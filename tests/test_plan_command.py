"""`cavelight plan` with devices: what it shows, as data and on a screen of 100 columns, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cavelight.cli.plan import PlanOptions, plan
from cavelight.errors import UserError
from cavelight.plan.devices import table
from cavelight.plan.plans import fits_on
from cavelight.plan.table import amount_of
from cavelight.see.plan_picture import draw_plan
from cavelight.spec.formats import FP8, INT4, INT8
from cavelight.spec.presets import preset

REPORT = "dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe"
SERVE = PlanOptions(context="128k", device="H800")
TRAIN = PlanOptions(device="h800", purpose="train", count=2048, batch=15360, tokens="14.8T")


def told(capsys: pytest.CaptureFixture[str], options: PlanOptions, model: str = "deepseek-v3") -> dict:  # type: ignore[type-arg]
    plan(model, options, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_without_a_device_it_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, PlanOptions(context="128k"))
    h800 = next(row for row in found["fits_on"] if row["device"] == "H800")
    assert h800["devices"] == {"bf16": 32, "fp8": 16, "int4": 8}
    assert h800["largest_context"] > 131_072
    assert found["cache_bytes_per_token"]["mla"] == 70_272


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, SERVE)["serving"]
    assert (found["count"], found["format"], found["acceptance"]) == (16, "fp8", 0.85)
    assert sum(found["memory"].values()) <= found["memory_usable"] < found["memory_device"]
    assert found["busy"]["tokens_per_second"] == pytest.approx(16 * found["busy"]["per_device"])
    dollars = found["dollars_per_million"]["out"]
    assert dollars == pytest.approx(2.0 * 16 / 3600 / found["busy"]["tokens_per_second"] * 1e6)
    assert told(capsys, replace(SERVE, price=4.0))["serving"]["dollars_per_million"]["out"] == pytest.approx(
        2 * dollars
    )
    assert told(capsys, replace(SERVE, acceptance=0.0))["serving"]["acceptance"] is None


def test_training_as_the_report_did(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, replace(TRAIN, layout=REPORT, count=None, utilisation=0.406706))["training"]
    assert found["count"] == 2048
    assert found["step"]["tokens"] == 62_914_560
    assert found["device_hours"] == pytest.approx(2.664e6, rel=1e-4)
    assert found["dollars"] == pytest.approx(5.328e6, rel=1e-4)
    assert found["fits"]
    assert [row["schedule"] for row in told(capsys, TRAIN)["training"]["schedules"]] == [
        "1F1B",
        "ZB1P",
        "DualPipe",
        "DualPipeV",
    ]


def test_too_few_devices_are_planned_and_told_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, replace(SERVE, count=4))
    assert found["serving"]["most_sequences"] == 0
    assert sum(found["serving"]["memory"].values()) > found["serving"]["memory_usable"]
    assert found["advice"]
    assert not told(capsys, replace(TRAIN, count=128, batch=1024))["training"]["fits"]


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("model", ["deepseek-v3", "demo"])
@pytest.mark.parametrize("options", [PlanOptions(context="128k"), SERVE, TRAIN, replace(SERVE, count=4)])
def test_screens_lose_nothing(
    options: PlanOptions, model: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    plan(model, options, as_json=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    if model == "deepseek-v3":
        assert ("what to change first" in shown) == (options.device is not None)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_batch_is_planned_as_told(batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, replace(SERVE, context="8k", batch=batch))["serving"]
    assert found["sequences"] == batch
    assert found["busy"]["tokens_per_second"] == pytest.approx(batch * found["busy"]["per_user"])
    busiest = told(capsys, replace(SERVE, context="8k"))["serving"]
    assert found["busy"]["per_user"] > busiest["busy"]["per_user"]


def test_a_checkpoint_is_planned_as_it_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    for form, stored in ((FP8, "fp8"), (INT8, "int8"), (INT4, "int4")):
        raw = preset("deepseek-v2-lite").to_hf() | {"quantization_config": form.quantization_config()}
        file.write_text(json.dumps(raw), encoding="utf-8")
        assert told(capsys, PlanOptions(device="A100-80GB"), str(tmp_path))["serving"]["format"] == stored
    file.write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}), encoding="utf-8")
    assert told(capsys, PlanOptions(device="A100-80GB"), str(tmp_path))["serving"]["format"] == "bf16"


def test_this_projects_own_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, PlanOptions(device="cpu"), "demo")["serving"]
    assert (found["format"], found["cache"], found["count"]) == ("fp32", "fp32", 1)
    found = told(capsys, PlanOptions(device="cpu", purpose="train", batch=4), "demo")["training"]
    assert 3_000 < found["per_device"] < 6_000  # docs/results/demo.md: 3,300 to 4,500


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "kimi-k2", "demo"])
def test_other_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, PlanOptions(device="B200"), name)["serving"]["busy"]["per_device"] > 0
    assert told(capsys, PlanOptions(device="B200", purpose="train"), name)["training"]["fits"]


@pytest.mark.parametrize(
    "options, says",
    [
        (PlanOptions(device="H801"), r"There is no device 'H801'.*did you mean"),
        (PlanOptions(count=8), "That plan needs a device"),
        (PlanOptions(purpose="train"), "That plan needs a device"),
        (replace(SERVE, purpose="teach"), "serve or train"),
        (replace(SERVE, format="fp4"), "no format of weights"),
        (replace(TRAIN, format="int4"), "planned in bf16 or fp8"),
        (replace(SERVE, acceptance=1.5), "--acceptance is a share"),
        (replace(TRAIN, utilisation=0.0), "a share above 0"),
        (replace(SERVE, count=0), "--count is at least 1"),
        (replace(SERVE, price=float("nan")), "That is no price"),
        (replace(SERVE, price=-1.0), "That is no price"),
        (replace(SERVE, layout="dp=16,ep=16,zero=1"), "serving has no zero"),
        (PlanOptions(device="cpu"), "Up to 1 x CPU-2-cores"),
        (replace(SERVE, layout="dp=3,ep=3"), "does not divide 256 experts"),
        (replace(SERVE, layout="dp=8,ep=8", count=16), "--count 8"),
        (replace(SERVE, batch=10**6), "So many sequences do not fit"),
        (replace(TRAIN, batch=3), "a row for each data rank"),
        (replace(TRAIN, layout="dp=2", count=None, device="cpu"), "stands alone"),
        (replace(TRAIN, tokens="lots"), "no number of tokens"),
        (replace(SERVE, devices=Path("nowhere.toml")), "cannot be read"),
        (replace(SERVE, context="1000m"), "do not hold one sequence"),
        (replace(SERVE, context="9" * 5000), "no number of tokens"),
    ],
)
def test_mistakes(options: PlanOptions, says: str) -> None:
    with pytest.raises(UserError, match=f"(?s){says}"):
        plan("deepseek-v3", options, as_json=True)


@pytest.mark.parametrize("text, tokens", [("14.8T", 14.8e12), (" 300b", 3e11), ("5e9", 5e9), ("2M", 2e6)])
def test_amounts_as_people_write_them(text: str, tokens: float) -> None:
    assert amount_of(text) == pytest.approx(tokens)


@pytest.mark.parametrize("text", ["", "T", "-1B", "0", "nan", "inf", "1.2.3"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="no number of tokens"):
        amount_of(text)


def test_a_model_that_fits_everywhere_takes_one_of_each() -> None:
    rows = fits_on(preset("demo"), table(), 256, None)
    assert {count for row in rows for count in row["devices"].values()} == {1}


def test_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    draw_plan(preset("deepseek-v3"), table(), file, "deepseek-v3", 131_072, 0.85)
    assert file.read_bytes().startswith(b"\x89PNG")
    draw_plan(preset("demo"), {"H800": table()["H800"]}, tmp_path / "one.svg", "demo", 256, None)
    assert "<svg" in (tmp_path / "one.svg").read_text(encoding="utf-8")
    tiny = {"tiny": replace(table()["H800"], memory=1e9)}
    with pytest.raises(UserError, match="fits on no device"):
        draw_plan(preset("deepseek-v3"), tiny, file, "deepseek-v3", 131_072, None)
