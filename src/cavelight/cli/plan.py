"""`cavelight plan`: what a model costs, and what it needs on devices, without building it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from cavelight.cli.screen import OUT, say_json
from cavelight.disk import checkpoint_folder
from cavelight.errors import UserError
from cavelight.plan import lines, plans, serving, training
from cavelight.plan.devices import Device, find, read_devices
from cavelight.plan.layout import Layout
from cavelight.plan.memory import Cache
from cavelight.plan.serving import Serving
from cavelight.plan.share import Form
from cavelight.plan.table import amount_of, facts, rows, tokens_of
from cavelight.plan.training import Plan
from cavelight.spec.config import ModelConfig
from cavelight.spec.formats import Format
from cavelight.spec.presets import preset

PURPOSES = ("serve", "train")
ACCEPTANCE = 0.85  # the V3 report's 85 to 90 % of second tokens
MICRO_BATCHES = 8  # for each stage of a pipeline, unless a batch is given


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asks for; None leaves it to the planner. purpose is `--for`."""

    context: str | None = None
    device: str | None = None
    devices: Path | None = None
    count: int | None = None
    purpose: str = "serve"
    layout: str | None = None
    batch: int | None = None
    format: str = "auto"
    acceptance: float | None = None
    tokens: str | None = None
    price: float | None = None
    utilisation: float | None = None
    picture: Path | None = None

    @property
    def drafted(self) -> float | None:
        """The acceptance to count with; None for plain decoding."""
        return (ACCEPTANCE if self.acceptance is None else self.acceptance) or None


def plan(model: str, options: PlanOptions, as_json: bool) -> None:
    """`model` is a preset's name, a config.json, a folder that holds one, or a run's folder."""
    _check(options)
    config = ModelConfig.read(checkpoint_folder(model)) if Path(model).exists() else preset(model)
    devices = read_devices(options.devices)
    found = facts(config, tokens_of(options.context) if options.context else None)
    if options.device is None:
        found["fits_on"] = plans.fits_on(config, devices, found["context"], options.drafted)
    else:
        device = find(options.device, devices)
        asked = _trained if options.purpose == "train" else _served
        found |= asked(config, device, options, found)
    if options.picture is not None:
        from cavelight.see.plan_picture import draw_plan

        draw_plan(config, devices, options.picture, model, found["context"], options.drafted)
    if as_json:
        say_json({"model": model, **found})
    else:
        _show(model, config, found)
        if options.picture is not None:
            OUT.print(f"drew {options.picture}", soft_wrap=True)


def _check(options: PlanOptions) -> None:
    """Raise UserError for options that no plan can follow."""
    if options.purpose not in PURPOSES:
        raise UserError("--for says serve or train", got=options.purpose, do="choose one of them")
    if options.format not in ("auto", *get_args(Form)):
        raise UserError(
            "That is no format of weights", got=options.format, do=f"choose auto or one of {', '.join(get_args(Form))}"
        )
    if options.purpose == "train" and options.format not in ("auto", "bf16", "fp8"):
        raise UserError("Training is planned in bf16 or fp8", got=options.format, do="leave --format at auto")
    for name, value in (("acceptance", options.acceptance), ("utilisation", options.utilisation)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} is a share", got=str(value), do="give a number from 0 to 1")
    if options.utilisation == 0:
        raise UserError("--utilisation is a share above 0", got="0", do="give a number above 0, at most 1")
    for name, whole in (("count", options.count), ("batch", options.batch)):
        if whole is not None and whole < 1:
            raise UserError(f"--{name} is at least 1", got=str(whole), do="give a positive number")
    if options.price is not None and not 0 <= options.price < 1e9:
        raise UserError("That is no price", got=str(options.price), do="give dollars an hour and device")
    told = (options.count, options.layout, options.batch, options.price, options.tokens, options.utilisation)
    if options.device is None and (options.purpose == "train" or any(value is not None for value in told)):
        raise UserError("That plan needs a device", do="name one with --device, as in --device H800")


def _layout(options: PlanOptions, config: ModelConfig, device: Device) -> Layout | None:
    """The layout told, which is to be one of as many devices as told."""
    devices = Layout.of(options.layout).devices if options.layout else options.count or 1
    if devices > device.per_node and not device.network:
        raise UserError(
            f"{device.name} stands alone",
            got=f"{devices} of them",
            why="its row has no network",
            do=f"plan with up to {device.per_node}, or give the row its network_gbs",
        )
    if options.layout is None:
        return None
    layout = Layout.of(options.layout).checked(config)
    if options.count is not None and layout.devices != options.count:
        raise UserError(
            "Layout and number of devices differ",
            got=f"{layout} on {options.count} x {device.name}",
            why=f"that layout has dp*pp*tp*cp = {layout.devices} devices",
            do=f"give --count {layout.devices}, or change dp",
        )
    return layout


def _served(config: ModelConfig, device: Device, options: PlanOptions, found: dict[str, Any]) -> dict[str, Any]:
    form: Form = next((known for known in get_args(Form) if known == options.format), _stored(config) or device.native)
    cache: Cache = "fp32" if form == "fp32" else "bf16"
    asked = Serving(config, device, Layout(), found["context"], form, cache, options.drafted)
    layout = _layout(options, config, device)
    chosen: Serving | None
    if layout is not None:
        chosen = asked.with_(layout=_for_serving(layout))
    else:
        fewest = None if options.count else serving.smallest(asked)
        count = options.count or (fewest.layout.devices if fewest else 0)
        chosen = serving.best(asked, count, options.batch) or serving.roomiest(asked, count) if count else None
    if chosen is None:
        raise _too_large(device, f"one sequence of {asked.context:,} tokens with weights in {form}")
    sequences = serving.sequences_per_rank(chosen, options.batch)
    price = device.price if options.price is None else options.price
    return {
        "serving": plans.served(chosen, sequences, price),
        "advice": plans.advice(chosen, options.batch),
    }


def _stored(config: ModelConfig) -> Form | None:
    """The format that a checkpoint's weights are packed in, as its config.json says; None for plain or unknown ones."""
    try:
        form = Format.of(config.extra.get("quantization_config"))
    except UserError:
        return None
    forms: dict[tuple[str, int], Form] = {("fp8", 0): "fp8", ("int", 8): "int8", ("int", 4): "int4"}
    return forms.get((form.kind, form.bits))


def _for_serving(layout: Layout) -> Layout:
    """Raise UserError for what only training has."""
    plain = Layout()
    told = [name for name in ("zero", "recompute", "schedule") if getattr(layout, name) != getattr(plain, name)]
    if told:
        raise UserError(
            "That layout is one of training",
            got=str(layout),
            why=f"serving has no {' and no '.join(told)}",
            do="leave it out, or plan with --for train",
        )
    return layout


def _trained(config: ModelConfig, device: Device, options: PlanOptions, found: dict[str, Any]) -> dict[str, Any]:
    row = found["context"] if options.context else found["training_row"]
    form: Form = device.native if options.format == "auto" else "fp8" if options.format == "fp8" else "bf16"
    layout = _layout(options, config, device)
    count = layout.devices if layout else options.count
    batch = options.batch or MICRO_BATCHES * max(count or 1, 1)
    asked = Plan(config, device, layout or Layout(), row, batch, form=form, utilisation=options.utilisation)
    chosen: Plan | None
    if layout is not None:
        chosen = asked
    elif count is not None:
        chosen = training.best(asked, count) or training.roomiest(asked, count)
    else:
        chosen = training.smallest(asked, 1 if options.batch else MICRO_BATCHES)
    if chosen is None:
        raise _too_large(device, f"a training step of rows of {row:,} tokens")
    if chosen.sequences < chosen.layout.dp:
        raise UserError(
            "A step needs a row for each data rank",
            got=f"{chosen.sequences:,} rows for {chosen.layout}",
            do=f"give --batch {chosen.layout.dp} or more, or fewer devices",
        )
    price = device.price if options.price is None else options.price
    tokens = amount_of(options.tokens) if options.tokens else None
    return {"training": plans.trained(chosen, tokens, price), "advice": plans.advice(chosen)}


def _too_large(device: Device, what: str) -> UserError:
    most = serving.MOST_DEVICES if device.network else device.per_node
    return UserError(
        f"Up to {most:,} x {device.name} do not hold {what}",
        do="take a device with more memory, a shorter context" + (", or a --layout with pp" if most > 1 else ""),
    )


def _show(model: str, config: ModelConfig, found: dict[str, Any]) -> None:
    if "serving" not in found and "training" not in found:
        _print_lines(f"{model} ({found['model_type']})", rows(found))
        _print_fits(found)
        return
    purpose = "serving" if "serving" in found else "training"
    plan = found[purpose]
    title = f"{purpose} {model} on {plan['count']:,} x {plan['device']}"
    if purpose == "serving":
        _print_lines(title, lines.serving_lines(plan, config.max_position_embeddings))
        heads: tuple[str, ...] = ("what to change first", "per device", "one user", "context")
    else:
        _print_lines(title, lines.training_lines(plan))
        if plan["schedules"]:
            names = ("pipeline schedule", "idle a step", "share", "weights", "activations", "devices")
            _print_cells("", names, lines.schedule_rows(plan))
        heads = ("what to change first", "per device")
    fits = plan["fits"] if purpose == "training" else plan["most_sequences"] > 0
    cells: Sequence[Sequence[str]] = lines.advice_rows(found["advice"], purpose == "serving", fits)
    if cells:
        _print_cells("", heads if fits else ("what to change first", "then", "of a device left"), cells)
    OUT.print(
        "An estimate from data sheets: docs/plan.md has every formula and docs/results/planner.md how near it comes."
    )


def _print_fits(found: dict[str, Any]) -> None:
    title = f"fewest devices that serve one sequence of {found['context']:,} tokens, by format of the weights"
    names = ("device", "memory", "bf16", "fp8", "int4", "format", "one user tokens/s", "largest context")
    _print_cells(title, names, lines.fits_rows(found["fits_on"]))
    starred = any(not row["checked"] for row in found["fits_on"])
    star = "* figures not looked up. " if starred else ""
    OUT.print(f"{star}More of one device with --device NAME [--for train].")


def _print_lines(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(label, Text(value))
    OUT.print(table)


def _print_cells(title: str, names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(names):
        table.add_column(
            name, justify="right" if place else "left", style="cyan" if place == 0 else "", no_wrap=place == 0
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    OUT.print(table)
