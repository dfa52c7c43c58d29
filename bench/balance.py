"""What balancing does: the same recipe trained twice, with the bias and the sequence loss and without either.

python -m bench.balance --steps 1000 writes docs/results/balance.md and balance.png. The runs stay in runs/balance: one
that was stopped goes on when the same command comes again, one that is finished is only read.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.provenance import commit, leave_with, machine, some
from cavelight.cli.progress import screen
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.see.draw import EVEN_ENOUGH, draw_comparison
from cavelight.see.series import Series, moe_layer_names
from cavelight.spec.recipe import Recipe
from cavelight.train.loop import train
from cavelight.train.optim import pick_dtype
from cavelight.train.state import RunFolder, read_metrics

ON, OFF = "balancing on", "balancing off"


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    recipes = both(options.recipe, options.steps, options.set)
    runs = {}
    for label, recipe in recipes.items():
        folder = RunFolder(options.runs / label.split()[-1])
        if not go_through(recipe, folder, label):
            return 130
        runs[label] = read_metrics(folder.metrics)
    figure, page = options.out / "balance.png", options.out / "balance.md"
    config = recipes[ON].config
    draw_comparison(runs, figure, config=config)
    called = list(sys.argv[1:] if arguments is None else arguments)
    text = report(recipes, {label: Series.of(run) for label, run in runs.items()}, figure.name, called)
    with file_beside(page) as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {page} and {figure}")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train with balancing and without, and compare.")
    parser.add_argument("--recipe", default="demo", help="a recipe's name or file (default: demo)")
    parser.add_argument("--steps", type=some, default=1000, help="optimizer steps of each run (default: 1000)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change both recipes")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where table and figure go")
    parser.add_argument("--runs", type=Path, default=Path("runs/balance"), help="where the two runs go")
    return parser.parse_args(arguments)


def both(name: str, steps: int, changes: Sequence[str]) -> dict[str, Recipe]:
    """The recipe with a number of steps for its only end, and the same without balancing."""
    on = Recipe.read(name, [*changes, f"train.steps={steps}"])
    on = on.model_copy(update={"train": on.train.model_copy(update={"minutes": None})})
    unbalanced = on.train.model_copy(update={"bias_speed": 0.0, "balance_alpha": 0.0})
    return {ON: on, OFF: on.model_copy(update={"train": unbalanced})}


def go_through(recipe: Recipe, folder: RunFolder, label: str) -> bool:
    """Train, or go on with what the folder holds; False when Ctrl-C ended it."""
    begun = folder.holds_a_run
    if begun and folder.read_recipe() != recipe:
        raise UserError(
            f"{folder.path} holds a run of another recipe", do="remove it, or choose another folder with --runs"
        )
    if begun and Series.of(read_metrics(folder.metrics)).final:
        return True
    with screen(f"{label}: {recipe.train.steps} steps into {folder.path}", as_json=False) as listen:
        return not train(recipe, folder.path, listen, resume=begun).interrupted


def report(recipes: Mapping[str, Recipe], runs: Mapping[str, Series], figure: str, called: Sequence[str]) -> str:
    """The page for docs/results: how it was made, what was found, layer by layer."""
    on, off = runs[ON], runs[OFF]
    names, experts = moe_layer_names(recipes[ON].config), on.load_ME.shape[1]
    columns = zip(names, on.mean_max_vio_M(), off.mean_max_vio_M(), on.used_M(), off.used_M(), strict=True)
    rows = [
        f"| {name} | {vio:.2f} | {vio_off:.2f} | {used} of {experts} | {used_off} of {experts} |"
        for name, vio, vio_off, used, used_off in columns
    ]
    lines = [
        "# Balancing on and off",
        f"Two runs of one recipe, equal in data, seed and number of steps ({on.step_P[-1]:,}). {settings(recipes)}",
        f"![MaxVio over the steps, held-out bits per byte, and the load of each expert, on and off]({figure})",
        f"MaxVio is the load of a layer's busiest expert over the mean load, minus one: its mean over the steps of the "
        f"run's last tenth. An expert is used if it was chosen at least once in that time. {verdict(on)}",
        "| layer | MaxVio, on | MaxVio, off | experts used, on | experts used, off |\n|---|--:|--:|--:|--:|\n"
        + "\n".join(rows),
        "| | on | off |\n|---|--:|--:|\n"
        f"| bits per byte on all held-out text | {bits(on):.4f} | {bits(off):.4f} |\n"
        f"| training tokens | {on.tokens_P[-1]:,} | {off.tokens_P[-1]:,} |\n"
        f"| minutes | {on.seconds / 60:.1f} | {off.seconds / 60:.1f} |",
        f"Command: `{shlex.join(['python', '-m', 'bench.balance', *called])}`  \nCommit: {commit()}  \n"
        f"Machine: {machine(pick_dtype(recipes[ON].train.dtype))}",
    ]
    return "\n\n".join(lines) + "\n"


def settings(recipes: Mapping[str, Recipe]) -> str:
    def of(recipe: Recipe) -> str:
        return f"`bias_speed = {recipe.train.bias_speed:g}` and `balance_alpha = {recipe.train.balance_alpha:g}`"

    return f"On: {of(recipes[ON])}. Off: {of(recipes[OFF])}."


def verdict(on: Series) -> str:
    worst, idle = float(on.mean_max_vio_M().max()), int((on.load_ME == 0).sum())
    balanced = f"With balancing the worst layer has {worst:.2f}, {'below' if worst < EVEN_ENOUGH else 'NOT below'} 0.5"
    return f"{balanced}, and {'every expert is used' if not idle else f'{idle} experts are NOT used'}."


def bits(series: Series) -> float:
    assert series.final is not None  # both runs went to their end
    return series.final[1]


if __name__ == "__main__":
    leave_with(main)
