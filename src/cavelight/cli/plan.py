"""`cavelight plan`: what a model costs in parameters, bytes and operations, without building it."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from cavelight.cli.screen import OUT, say_json
from cavelight.plan.table import facts, rows, tokens_of
from cavelight.spec.config import ModelConfig
from cavelight.spec.presets import preset


def plan(model: str, context: str | None, as_json: bool) -> None:
    """`model` is a preset's name, a config.json, or a folder that holds one."""
    config = ModelConfig.read(model) if Path(model).exists() else preset(model)
    found = facts(config, tokens_of(context) if context else None)
    if as_json:
        say_json({"model": model, **found})
        return
    table = Table(title=f"{model} ({found['model_type']})", title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for label, value in rows(found):
        table.add_row(label, Text(value))
    OUT.print(table)
