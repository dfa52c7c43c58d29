"""The last level: the model is loaded and runs on a text, as configured, in other readings, and beside others."""

from collections.abc import Callable, Iterator

from cavelight.data.corpus import stdlib_corpus
from cavelight.data.tokenizer import Tokenizer
from cavelight.doctor.against import against_transformers
from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, warned
from cavelight.doctor.mtp import settle_mtp
from cavelight.doctor.probes import probe
from cavelight.errors import UserError
from cavelight.memory import machine_memory
from cavelight.spec.events import Event, Phase
from cavelight.weights.snapshot import read_checkpoint
from cavelight.weights.stored import FP8

MOST_TOKENS = 10_000
ENGINES = ("transformers",)


def on_model(case: Case, text: str | None, on_event: Callable[[Event], None]) -> Iterator[Finding]:
    """All checks that run the model as it reads a text, if it can be loaded and there is a tokenizer."""
    if case.config is not None and case.config.attention != "mla":
        yield warned("model", "The model was not run: its readings to compare with are those of latent attention.")
        return
    entries = (case.entries or {}).values()
    size = sum(entry.nbytes * (2 if entry.dtype == FP8 else 1) for entry in entries)  # fp8 is unpacked to bfloat16
    memory = machine_memory()
    if size > memory:
        yield warned(
            "model",
            f"The model was not run: its weights have {size / 1e9:,.0f} GB and this machine {memory / 1e9:,.0f} GB of "
            "memory; run this level on a larger one.",
        )
        return
    try:
        tokens_T = tokens_of(case, text)
    except UserError as refusal:
        yield warned("model", f"The model was not run, since there is no way to give it a text: {refusal}")
        return
    try:
        on_event(Phase("loading the model", 0, size, "B"))
        model = read_checkpoint(case.folder)
    except UserError as refusal:
        yield failed("model", f"The model was not run: {refusal}")
        return
    on_event(Phase("loading the model", size, size, "B"))
    yield from probe(model, tokens_T, on_event)
    yield from settle_mtp(model, tokens_T, on_event).findings


def beside_another(case: Case, engine: str, text: str | None, on_event: Callable[[Event], None]) -> Iterator[Finding]:
    """The comparison with another engine, part by part; on random tokens where there is no tokenizer."""
    assert engine in ENGINES, engine
    has_tokenizer = (case.folder / "tokenizer.json").is_file()
    try:
        tokens_T = tokens_of(case, text) if has_tokenizer else None
        yield from against_transformers(case.folder, tokens_T, on_event)
    except UserError as refusal:
        yield warned("against", f"Nothing was compared with {engine}: {refusal}")


def tokens_of(case: Case, text: str | None) -> list[int]:
    """Some thousands of tokens of `text`, or of modules of Python's library that our own training never sees.

    Raises UserError where there is no tokenizer, and where it is another model's.
    """
    tokenizer = Tokenizer.load(case.folder)
    texts = (document.text for document in stdlib_corpus().held) if text is None else iter((text,))
    tokens_T: list[int] = []
    for one in texts:
        tokens_T += [tokenizer.bos_id, *tokenizer.encode(one[: 8 * MOST_TOKENS])]
        if len(tokens_T) >= MOST_TOKENS:
            break
    tokens_T = tokens_T[:MOST_TOKENS]
    if case.config is not None and max(tokens_T) >= case.config.vocab_size:
        raise UserError(
            "The tokenizer makes ids that the model has not",
            got=f"{max(tokens_T):,} with a vocab_size of {case.config.vocab_size:,}",
            do="use the tokenizer that the model was trained with",
        )
    return tokens_T
