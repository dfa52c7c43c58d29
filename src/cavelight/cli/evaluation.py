"""`cavelight eval`: held-out text in bits per byte, the same by position, and needles in a haystack."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cavelight.cli.generation import cache_of, load
from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note
from cavelight.spec.recipe import absolute
from cavelight.spec.sections import DataSection

if TYPE_CHECKING:
    from cavelight.data.store import TokenStore
    from cavelight.data.tokenizer import Tokenizer
    from cavelight.run.rows import CacheDtype
    from cavelight.spec.config import ModelConfig
    from cavelight.train.needle import Found

ROW_LENGTH = 512  # tokens of context at most, for checkpoints that come without the recipe of their run
SHORTEST = 512  # of the haystacks that are tried unless told, a quarter of the next one each

MEANT_FOR = {  # what each way of evaluating minds of the options that not all of them do
    "held-out text": ("--data", "--text-key"),
    "--by-position": ("--data", "--text-key", "--out", "--cache"),
    "--needle": ("--data", "--text-key", "--lengths", "--depths", "--trials", "--out", "--cache"),
    "--tasks": ("--shots", "--limit", "--include"),
}


def check_options(wanted: Mapping[str, bool], options: Mapping[str, object]) -> None:
    """UserError for more than one way of evaluating, and for options that the one asked for does not mind.

    wanted: whether each way is asked for; options: their values, None where not given.
    """
    ways = [way for way, asked in wanted.items() if asked] or ["held-out text"]
    if len(ways) > 1:
        raise UserError("eval does one thing at a time", got=" and ".join(ways), do="call it once for each")
    given = [option for option, value in options.items() if value is not None]
    idle = [option for option in given if option not in MEANT_FOR[ways[0]]]
    if idle:
        others = [way for way, minded in MEANT_FOR.items() if idle[0] in minded]
        raise UserError(
            f"{', '.join(idle)} would do nothing here",
            got=f"{', '.join(idle)} with {ways[0]}",
            do=f"leave it out; {idle[0]} is for {' or '.join(others)}",
        )
    if "--text-key" in given and "--data" not in given:
        raise UserError("--text-key is for the text that --data names", do="name it, or leave --text-key out")


def evaluate(
    path: Path, corpus: str | None, text_key: str | None, dtype: str, without_mtp: bool, as_json: bool
) -> None:
    """The run's own corpus and row length unless `corpus` names another; the standard library where there is no run."""
    model, tokenizer = load(path, dtype, without_mtp)

    import torch

    from cavelight.train.evaluate import held_out_bits_per_byte
    from cavelight.train.workers import Workers

    data = data_of(path)
    row_length = data.row_length if data else min(ROW_LENGTH, model.config.max_position_embeddings)
    began = time.monotonic()
    with screen(f"{path} on held-out text of {name_of(path, corpus)}", as_json) as listen:
        store = held_out_tokens(path, corpus, tokenizer, listen, text_key)
        bits = held_out_bits_per_byte(model, store, row_length, None, listen, Workers(torch.get_num_threads()))
    size, seconds = int(store.bytes_M.sum()), time.monotonic() - began
    if as_json:
        say_json({"kind": "result", "bits_per_byte": bits, "bytes": size, "tokens": len(store), "seconds": seconds})
        return
    OUT.print(f"[bold]{bits:.4f} bits per byte[/] on {size:,} bytes ({len(store):,} tokens), in {duration(seconds)}")


def by_position(
    path: Path,
    corpus: str | None,
    text_key: str | None,
    out: Path | None,
    dtype: str,
    cache: str | None,
    without_mtp: bool,
    as_json: bool,
) -> None:
    """What context is worth, up to the model's longest: a table, by-position.json and a figure."""
    kept_in = cache_of(cache or "auto")
    model, tokenizer = load(path, dtype, without_mtp)

    from cavelight.see.context import draw_by_position
    from cavelight.train.evaluate import loss_by_position

    with screen(f"{path} by position, on held-out text of {name_of(path, corpus)}", as_json) as listen:
        store = held_out_tokens(path, corpus, tokenizer, listen, text_key)
        length = min(model.config.max_position_embeddings, len(store) - 1)
        buckets = loss_by_position(model, tokenizer, store, length, on_event=listen, cache=kept_in)
    rows = [{**asdict(bucket), "loss": bucket.loss, "bits_per_byte": bucket.bits_per_byte} for bucket in buckets]
    folder = out or beside(path)
    write_json(folder / "by-position.json", {"length": length, "cache": kept_in, "buckets": rows})
    picture = folder / "by-position.png"
    facts = [path.resolve().name, f"{length:,} tokens", *told_of(kept_in)]
    draw_by_position(buckets, picture, "What context is worth", facts)
    if as_json:
        say_json({"kind": "result", "length": length, "cache": kept_in, "buckets": rows, "figure": picture})
        return
    table = Table("tokens of context", "predictions", "nats a token", "bits per byte", box=None)
    for column in table.columns:
        column.justify = "right"
    for bucket in buckets:
        span = f"{bucket.first:,} to {bucket.last:,}"
        table.add_row(span, f"{bucket.tokens:,}", f"{bucket.loss:.4f}", f"{bucket.bits_per_byte:.4f}")
    OUT.print(table)
    OUT.print(f"The figure: {picture}", soft_wrap=True)


def needle(
    path: Path,
    corpus: str | None,
    text_key: str | None,
    lengths: str | None,
    depths: int,
    trials: int,
    out: Path | None,
    dtype: str,
    cache: str | None,
    without_mtp: bool,
    as_json: bool,
) -> None:
    """Needles in held-out text, chosen as for the others: a table, needle.json, a heat map."""
    kept_in = cache_of(cache or "auto")
    model, tokenizer = load(path, dtype, without_mtp)

    from cavelight.plan.table import tokens_of
    from cavelight.train.needle import find_needles, plain_text

    if depths < 1 or trials < 1:
        raise UserError("Needles are counted from one", got=f"{depths} depths, {trials} trials")
    chosen = [tokens_of(part) for part in lengths.split(",")] if lengths else steps_to(model.config)
    with screen(f"{path}: needles in held-out text of {name_of(path, corpus)}", as_json) as listen:
        store = held_out_tokens(path, corpus, tokenizer, listen, text_key)
        text = plain_text(tokenizer, store.tokens_N[: max(chosen)].tolist())
        how = {"depths": depths, "trials": trials}
        results = find_needles(model, tokenizer, text, chosen, **how, cache=kept_in, on_event=listen)
    found, picture = report_needles(results, model.config, out or beside(path), path.resolve().name, kept_in)
    if as_json:
        say_json({"kind": "result", "cache": kept_in, "lengths": found, "figure": picture})
        return
    OUT.print(needle_table(found))
    OUT.print(f"The heat map: {picture}", soft_wrap=True)


def told_of(kept_in: "CacheDtype") -> list[str]:
    """For a figure: what the cache is kept in, where that is not as usual."""
    return [] if kept_in == "auto" else [f"cache in {kept_in}"]


def report_needles(
    results: "Sequence[Found]", config: "ModelConfig", folder: Path, name: str, kept_in: "CacheDtype" = "auto"
) -> tuple[list[dict[str, Any]], Path]:
    """Write needle.json and needle.png into `folder`; what is in the one, and where the other is.

    Beside each cache's bytes stands what the planner says that decoding at this length takes for it: in float32, or in
    fp8, which has as many bytes as int8.
    """
    from cavelight.plan.memory import decoding_memory
    from cavelight.see.context import draw_needles

    def planned(length: int) -> int:
        return decoding_memory(config, context=length, cache="fp8" if kept_in == "int8" else "fp32").parts["cache"]

    found = [{**asdict(result), "planned_cache_bytes": planned(result.length)} for result in results]
    write_json(folder / "needle.json", {"cache": kept_in, "lengths": found})
    shares = [share for result in results for share in result.shares]
    facts = [name, f"{min(sum(result.asked) for result in results):,} needles a length or more", *told_of(kept_in)]
    draw_needles(results, folder / "needle.png", "Needles in a haystack", [*facts, f"worst cell {min(shares):.0%}"])
    return found, folder / "needle.png"


def needle_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each length: needles found, in all and in the worst depth, the time and the cache."""
    heads = ("tokens", "haystacks", "found", "worst depth", "time", "latent cache", "planned")
    table = Table(*heads, box=None)
    for column in table.columns:
        column.justify = "right"
    for row in found:
        shares = [found / asked for found, asked in zip(row["found"], row["asked"], strict=True)]
        table.add_row(
            f"{row['length']:,}",
            f"{row['haystacks']:,}",
            f"{sum(row['found']):,} of {sum(row['asked']):,}",
            f"{min(shares):.1%}",
            duration(row["seconds"]),
            f"{row['cache_bytes'] / 1e6:.1f} MB",
            f"{row['planned_cache_bytes'] / 1e6:.1f} MB",
        )
    return table


def steps_to(config: "ModelConfig") -> list[int]:
    """The model's longest context and quarters of quarters of it."""
    lengths = [config.max_position_embeddings]
    while lengths[0] // 4 >= SHORTEST:
        lengths.insert(0, lengths[0] // 4)
    return lengths


def held_out_tokens(
    path: Path,
    corpus: str | None,
    tokenizer: "Tokenizer",
    listen: Callable[[Event], None],
    text_key: str | None = None,
) -> "TokenStore":
    """Held-out text of `corpus`, or of the run's own, or of the standard library."""
    from cavelight.train.origin import changed_texts
    from cavelight.train.prepare import held_out, read_corpora

    corpora = read_corpora(data_to_read(path, corpus, text_key))
    for sentence in changed_texts(path, corpora):
        listen(Note(sentence))
    return held_out(corpora, tokenizer, listen)[0]


def data_to_read(path: Path, corpus: str | None, text_key: str | None = None) -> DataSection:
    """The run's own data; `corpus` is divided and read by the run's rules, else text that it learnt is held out."""
    own = data_of(path) or DataSection()
    if corpus is None:
        return own
    corpus = absolute(corpus)
    keys = {source.text_key for source in own.sources if source.corpus == corpus}
    keys = keys or {source.text_key for source in own.sources}
    key = text_key or (keys.pop() if len(keys) == 1 else own.text_key)
    return own.model_copy(update={"corpus": corpus, "text_key": key})


def data_of(path: Path) -> DataSection | None:
    """The data that the run in `path`, or around it, learns from; None for a checkpoint that is no run's."""
    from cavelight.train.state import RunFolder

    run = RunFolder.of(path)
    return run.read_recipe().data if run.recipe.is_file() else None


def name_of(path: Path, corpus: str | None) -> str:
    """What the text is called on the screen."""
    data = data_of(path)
    return corpus or (", ".join(source.corpus for source in data.sources) if data else "stdlib")


def beside(path: Path) -> Path:
    """Where figures go unless told: NAME-eval beside the folder."""
    folder = path.resolve()
    return folder.with_name(f"{folder.name}-eval")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with file_beside(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
