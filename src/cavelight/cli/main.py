"""The commands and their options. Each imports what it needs when it runs, so that help and plan answer at once."""

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
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
Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A Hugging Face directory, a run of ours, or owner/name on the hub.")
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub; it is pinned to its commit.")
]
Dtype = Annotated[str, typer.Option(help="Numbers to compute in: auto, float32 or bfloat16.")]
CacheDtype = Annotated[
    str, typer.Option(help="What the latent cache is kept in: auto, as the weights are, or int8, in less memory.")
]

MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=0, help="Stop after so many new tokens.")]
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
    text_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Where JSONL or Parquet of --data holds its text; the run's unless told."),
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Bits per byte by the position in the context, with a figure.")
    ] = False,
    needle: Annotated[
        bool, typer.Option("--needle", help="Whether a fact is found again, by length and depth, with a heat map.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Contexts of --needle, as in 4k,32k; up to the model's longest.")
    ] = None,
    depths: Annotated[
        int | None, typer.Option(metavar="N", help="Depths of --needle, evenly from first to last; 10 unless told.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Needles at each length and depth; 10 unless told.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Tasks of lm-evaluation-harness, as in arc_easy,hellaswag.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(metavar="N", help="Examples before each question; the task's own number unless told.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="At most so many questions a task.")] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own, for --tasks.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where figures go; beside the model unless told.")
    ] = None,
    dtype: Dtype = "auto",
    cache: Annotated[
        str | None, typer.Option(help="What --by-position and --needle keep the past in: auto, or int8.")
    ] = None,
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """How well a model predicts held-out text; or finds needles, or answers the tasks that people know."""
    from cavelight.cli.screen import telling

    with telling(as_json):
        from cavelight.cli import evaluation as command

        wanted = {"--by-position": by_position, "--needle": needle, "--tasks": tasks is not None}
        text = {"--data": corpus, "--text-key": text_key, "--out": out, "--cache": cache}
        needles = {"--lengths": lengths, "--depths": depths, "--trials": trials}
        command.check_options(wanted, text | needles | {"--shots": shots, "--limit": limit, "--include": include})
        if tasks is not None:
            from cavelight.cli import tasks as harness

            names = [name.strip() for name in tasks.split(",")]
            harness.tasks(model, names, limit, include, shots, dtype, without_mtp, as_json)
        elif needle:
            numbers = (10 if depths is None else depths, 10 if trials is None else trials)
            command.needle(model, corpus, text_key, lengths, *numbers, out, dtype, cache, without_mtp, as_json)
        elif by_position:
            command.by_position(model, corpus, text_key, out, dtype, cache, without_mtp, as_json)
        else:
            command.evaluate(model, corpus, text_key, dtype, without_mtp, as_json)


@app.command()
def extend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of ours, or a checkpoint.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="N", help="A longer context, as in 32k; repeated, one phase after another."),
    ] = None,
    changes: Changes = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the phases go; RUN/extended unless told.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a model a longer context with YaRN, in phases (the report's: 32k, then 128k)."""
    from cavelight.cli import extend as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.extend(run, to or ["32k", "128k"], changes or [], out, as_json)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="attention, mtp, balance, specialisation, fp8 or shape.")],
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each variant, with different seeds.")] = 3,
    changes: Changes = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where table and figure go.")] = Path(
        "docs/results/experiments"
    ),
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs go.")] = Path("runs/experiments"),
    as_json: Json = False,
) -> None:
    """Show one of the report's claims in small: variants trained side by side, a table, a figure."""
    from cavelight.cli import experiment as command
    from cavelight.cli.screen import telling

    with telling(as_json, "Stopped by Ctrl-C; the same command goes on from here."):
        command.experiment(name, seeds, changes or [], out, runs, as_json)


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
    cache: CacheDtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, drafting with the model's MTP modules; says what the drafts gained."""
    from cavelight.cli import generation as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        chance = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = command.Options(
            max_new_tokens, *chance, stop or [], command.drafts_of(drafts), command.cache_of(cache)
        )
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
    cache: CacheDtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """Talk with a model that has a chat template."""
    from cavelight.cli import generation as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        chance = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = command.Options(
            max_new_tokens, *chance, stop or [], command.drafts_of(drafts), command.cache_of(cache)
        )
        command.chat(model, system, options, dtype, without_mtp, as_json)


@app.command()
def bench(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="A run, a checkpoint, or the name of a preset: random weights then.")
    ],
    prompts: Annotated[str, typer.Option(metavar="N,N", help="Lengths of prompts, as in 512,4k.")] = "512,4k",
    depths: Annotated[str, typer.Option(metavar="N,N", help="Positions in the cache before a token.")] = "128,4k,16k",
    batches: Annotated[
        str, typer.Option(metavar="N,N", help="Sequences that decode at once, at the least depth.")
    ] = "4,16",
    against: Annotated[
        str | None, typer.Option(metavar="PEER", help="transformers, llama.cpp or vllm, on the same weights.")
    ] = None,
    peer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of llama-bench, or of the python that has vLLM; else they are looked for."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where figure and numbers go; beside the model unless told.")
    ] = None,
    dtype: Dtype = "auto",
    cache: CacheDtype = "auto",
    without_mtp: WithoutMTP = False,
    as_json: Json = False,
) -> None:
    """How fast a model runs here, next to what memory and processor could do."""
    from cavelight.cli import bench as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.bench(source, prompts, depths, batches, against, peer, out, dtype, cache, without_mtp, as_json)


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder that the converted checkpoint becomes.")],
    to: Annotated[
        str,
        typer.Option(help="hf: plain weights. fp8: blocks of 128 x 128, as DeepSeek-V3. int8, int4: packed integers."),
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(help="Of the plain weights: auto keeps the source's; bfloat16, float16, float32.")
    ] = "auto",
    revision: Revision = None,
    shift_biases: Annotated[
        bool | None,
        typer.Option(
            "--shift-biases/--keep-biases",
            help="Make routing biases non-negative, for engines that mask with 0. Unless told: if any are negative.",
            show_default=False,
        ),
    ] = None,
    scale_fmt: Annotated[str, typer.Option(help="Scales of fp8: float32, or ue8m0 for powers of two.")] = "float32",
    group: Annotated[int, typer.Option(metavar="N", help="Weights that share a scale in int4.")] = 32,
    without_mtp: WithoutMTP = False,
    shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Largest file, as in 500MB or 4GiB, where one matrix of all experts fits."),
    ] = "4GiB",
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another format, in little memory. Interrupted, the same command goes on."""
    from cavelight.cli import convert as command
    from cavelight.cli.screen import telling

    with telling(as_json, "Stopped by Ctrl-C; the same command goes on from here."):
        command.convert(
            source, target, to, dtype, revision, shift_biases, scale_fmt, group, without_mtp, shard_size, as_json
        )


@app.command()
def doctor(
    source: Source,
    level: Annotated[
        str,
        typer.Option("--level", help="headers: in seconds, no weights. weights: all of them. model: runs it too."),
    ] = "weights",
    against: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="Compare part by part with another engine: transformers.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to run the model on; else Python's standard library.")
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Write into config.json what was found about MTP's input.")
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Find what is wrong with a checkpoint. Leaves with 1 if anything fails."""
    from cavelight.cli import doctor as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.doctor(source, level, against, text, store, revision, as_json)


@app.command()
def look(
    source: Source,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where page and pictures go; beside the checkpoint unless told.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Look inside a checkpoint: one page and pictures of its biases, experts, latents and MTP modules."""
    from cavelight.cli import look as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        command.look(source, out, revision, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset such as deepseek-v3, or a config.json.")],
    context: Annotated[
        str | None, typer.Option(help="Tokens of context, as in 128k; the model's longest unless told.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="A device of the data sheet, such as H800 or cpu.")] = None,
    devices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file with more devices; see docs/plan.md.")
    ] = None,
    count: Annotated[int | None, typer.Option(metavar="N", help="How many of them; the fewest unless told.")] = None,
    purpose: Annotated[str, typer.Option("--for", help="serve or train.")] = "serve",
    layout: Annotated[
        str | None, typer.Option(help="How work is parted, as in dp=8,ep=8,pp=2,tp=1,recompute=selective.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences at a time; what fits unless told.")] = None,
    weights: Annotated[
        str, typer.Option("--format", help="Of the weights: bf16, fp8, int8, int4; auto for the device's best.")
    ] = "auto",
    acceptance: Annotated[
        float | None, typer.Option(help="Share of MTP's drafts that hold, 0.85 unless told; 0 for plain decoding.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="To train on, as in 14.8T.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars an hour and device.")] = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of the device's peak that training reaches.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: a .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """What a model costs and needs: parameters, cache, memory, speed, devices, money."""
    from cavelight.cli import plan as command
    from cavelight.cli.screen import telling

    with telling(as_json):
        asked = (purpose, layout, batch, weights, acceptance, tokens, price, utilisation, picture)
        command.plan(model, command.PlanOptions(context, device, devices, count, *asked), as_json)


def run() -> None:
    """The console script. It leaves with 2 after a mistake of the user's, 130 after Ctrl-C; tracebacks are our bugs."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    try:
        sys.exit(app())
    except SystemExit as end:
        from cavelight.cli.screen import INTERRUPTED

        if end.code != INTERRUPTED:
            raise
    # A thread that is still writing a save would not survive the interpreter's end: torch would abort the process.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(INTERRUPTED)
