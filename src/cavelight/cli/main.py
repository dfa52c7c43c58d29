"""The commands and their options. Each imports what it needs when it runs, so that help and plan answer at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cavelight import __version__

app = typer.Typer(
    name="cavelight",
    help="Train, run and see into DeepSeek-V3-style language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line, instead of the screen.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: train.steps=2000.")
]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory, such as an export of ours.")]
WithoutMTP = Annotated[
    bool, typer.Option("--without-mtp", help="Leave the prediction modules out, as for files without.")
]
Dtype = Annotated[str, typer.Option(help="Numbers to compute in: auto, float32 or bfloat16.")]

MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Stop after so many new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the fewest tokens that together are so likely; 1 keeps all.")]
MinP = Annotated[float, typer.Option(help="Keep tokens so likely relative to the likeliest; 0 keeps all.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens that were there before become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.")]
DraftCount = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Tokens to draft ahead with MTP: a number, 0 for none, or auto, which stops when drafts do not pay.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cavelight {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """The tour: train a small true V3, export it, generate with its own drafts, draw the report."""
    from cavelight.cli import demo as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.demo(out, changes or [], as_json)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A TOML file, or a recipe that comes along: demo.")
    ] = None,
    changes: Changes = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run goes; runs/RECIPE unless told.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model. Ctrl-C saves and says how to go on."""
    from cavelight.cli import training as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.train(recipe, changes or [], out, resume, as_json)


@app.command("eval")
def evaluate(
    model: Checkpoint,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="PATH", help="File, folder or glob whose held-out part is read; else the run's."
        ),
    ] = None,
    dtype: Dtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """Bits per byte on held-out text."""
    from cavelight.cli import evaluation as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.evaluate(model, corpus, dtype, without_mtp, as_json)


@app.command()
def generate(
    model: Checkpoint,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to go on from; else stdin.")] = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    drafts: DraftCount = "auto",
    dtype: Dtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, drafting with the model's MTP modules; says what the drafts gained."""
    from cavelight.cli import generation as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        chance = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = command.Options(max_new_tokens, *chance, stop or [], command.drafts_of(drafts))
        command.generate(model, prompt, options, dtype, without_mtp, as_json)


@app.command()
def chat(
    model: Checkpoint,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: MaxNewTokens = 1000,
    temperature: Temperature = 0.6,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    drafts: DraftCount = "auto",
    dtype: Dtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """Talk with a model that has a chat template."""
    from cavelight.cli import generation as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        chance = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = command.Options(max_new_tokens, *chance, stop or [], command.drafts_of(drafts))
        command.chat(model, system, options, dtype, without_mtp, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset such as deepseek-v3, or a config.json.")],
    context: Annotated[
        str | None, typer.Option(help="Tokens of context, as in 128k; the model's longest unless told.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a model costs: parameters, weights, cache, operations."""
    from cavelight.cli import plan as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.plan(model, context, as_json)


def run() -> None:
    """The console script. It leaves with 2 after a mistake of the user's, 130 after Ctrl-C; tracebacks are our bugs."""
    sys.exit(app())
