"""Trap 10: tokenizer, chat template and the ids that three files give of the same tokens."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cavelight.data.tokenizer import Tokenizer
from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.errors import UserError

ROLES = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
GREETING = ({"role": "user", "content": "Hello"},)


def tokens(case: Case) -> Iterator[Finding]:
    """All that can be seen without the model, where there is a tokenizer.json."""
    if not (case.folder / "tokenizer.json").is_file():
        yield passed("tokenizer", "There is no tokenizer.json here, so nothing is said of tokens.")
        return
    try:
        tokenizer = Tokenizer.load(case.folder)
        settings = _json(case.folder / "tokenizer_config.json")
        definition = _json(case.folder / "tokenizer.json")
        generation = _json(case.folder / "generation_config.json")
    except UserError as refusal:
        yield failed("tokenizer", str(refusal))
        return
    yield from _size(case, tokenizer)
    yield from _ids(case, tokenizer, generation)
    yield from _padding(case, tokenizer, settings)
    if settings.get("chat_template") or (case.folder / "chat_template.jinja").is_file():
        yield from _chat(tokenizer, adds_bos(definition, settings))
    else:
        yield passed("chat", "There is no chat template, as for a base model.", 10)


def _size(case: Case, tokenizer: Tokenizer) -> Iterator[Finding]:
    embedding = (case.entries or {}).get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else case.raw.get("vocab_size")
    if not isinstance(rows, int):
        return
    if tokenizer.vocab_size > rows:
        yield failed(
            "vocabulary",
            f"The tokenizer has ids up to {tokenizer.vocab_size - 1:,}, but the embedding only {rows:,} rows: some "
            "text would stop the model, or read beyond its end; use the tokenizer it was trained with.",
            10,
        )
    elif rows > tokenizer.vocab_size + max(1024, rows // 8):
        yield warned(
            "vocabulary",
            f"The embedding has {rows:,} rows for {tokenizer.vocab_size:,} ids, more than padding explains: check that "
            "this is the tokenizer it was trained with.",
            10,
        )
    else:
        said = f"The tokenizer's {tokenizer.vocab_size:,} ids fit the embedding's {rows:,} rows."
        yield passed("vocabulary", said, 10)


def _ids(case: Case, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> Iterator[Finding]:
    """bos, eos and pad, as config.json, generation_config.json and the tokenizer have them."""
    wrong = []
    for key, attribute in ROLES.items():
        own = getattr(tokenizer, attribute)
        if key == "pad_token_id" and own == tokenizer.eos_id:  # also what it says where there is none
            continue
        for file, content in (("config.json", case.raw), ("generation_config.json", generation)):
            said = _ids_in(content.get(key))
            if said and own not in said:
                ids = " or ".join(map(str, sorted(said)))
                wrong.append(f"{key} is {ids} in {file} and {own} ({tokenizer.token(own)}) for the tokenizer")
    rows = case.raw.get("vocab_size")
    outside = [n for name, n in tokenizer.control.items() if isinstance(rows, int) and n >= rows]
    if outside:
        yield failed(
            "token-ids",
            f"{len(outside)} control tokens have ids beyond vocab_size ({rows}), such as {outside[0]}: they cannot be "
            "given to the model; use the tokenizer it was trained with.",
            10,
        )
    elif wrong:
        yield warned(
            "token-ids",
            f"{'; '.join(wrong)}: what ends an answer, or begins a text, then depends on the engine; make them agree.",
            10,
        )
    else:
        yield passed("token-ids", "All files agree on the ids that begin, end and pad a text.", 10)


def _padding(case: Case, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Iterator[Finding]:
    pads = _ids_in(case.raw.get("pad_token_id")) | ({tokenizer.pad_id} if settings.get("pad_token") else set())
    both = pads & (_ids_in(case.raw.get("eos_token_id")) | {tokenizer.eos_id})
    if both:
        yield warned(
            "padding",
            f"A pad token is an end token (id {min(both)}): whoever masks padding by its id "
            "masks the end of every answer too, and the model never learns to stop; name another pad token.",
            10,
        )
    else:
        yield passed("padding", "Padding cannot be taken for the end of a text.", 10)


def _chat(tokenizer: Tokenizer, adds: bool) -> Iterator[Finding]:
    try:
        prompt = tokenizer.chat_prompt(GREETING)
    except UserError as refusal:
        yield failed("chat", f"The chat template does not render a greeting: {refusal}", 10)
        return
    starts = next((n for n, token in enumerate(prompt) if token != tokenizer.bos_id), len(prompt))
    if starts > 1 or (starts == 1 and adds):
        if starts > 1:
            why, do = "the template writes it twice", "take one out of the template"
        else:
            why = "the template writes it and the tokenizer adds it"
            do = "set add_bos_token to false, or take it out of the template"
        yield warned(
            "chat",
            f"A prompt begins with {tokenizer.token(tokenizer.bos_id)} twice, since {why}, which the model never saw: "
            f"{do}.",
            10,
        )
    else:
        begun = "with the beginning token once" if starts or adds else "without a beginning token"
        yield passed("chat", f"The chat template renders, and a prompt begins {begun}.", 10)


def adds_bos(definition: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether transformers' tokenizer puts the beginning token before any text that it encodes.

    Its Llama class, which DeepSeek's files name, does unless told not to; any class does where tokenizer.json ends in
    a template that says so.
    """
    named = settings.get("bos_token")
    bos = named.get("content") if isinstance(named, Mapping) else named
    steps = definition.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        first = next(iter(step.get("single") or [{}]))
        if "SpecialToken" in first and first["SpecialToken"].get("id") == bos:
            return True
    return bool(settings.get("add_bos_token", "Llama" in str(settings.get("tokenizer_class"))))


def _ids_in(value: object) -> set[int]:
    """One id or several, as these files have it; anything else is for the configuration's own check."""
    return {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}


def _json(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON", got=str(error), do="fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object", got=type(content).__name__, do="fetch the file again")
    return content


CHECKS = (tokens,)
