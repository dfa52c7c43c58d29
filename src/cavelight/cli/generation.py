"""`cavelight generate` and `cavelight chat`: text as it is made, then how it went."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from cavelight.cli.screen import ERR, OUT, say_json
from cavelight.errors import UserError

if TYPE_CHECKING:
    import torch

    from cavelight.data.tokenizer import Tokenizer
    from cavelight.model.transformer import Transformer
    from cavelight.run.rows import CacheDtype
    from cavelight.run.text import TextStream


Drafts = int | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """How to generate; the names are those of cavelight.generate."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    drafts: Drafts
    cache: "CacheDtype"

    def check(self) -> None:
        """Raises UserError before anything is loaded."""
        from cavelight.run.sample import Sampling
        from cavelight.run.text import StopStrings

        Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)
        StopStrings(self.stop)

    def stream(self, model: "Transformer", tokenizer: "Tokenizer", prompt: str | list[int]) -> "TextStream":
        from cavelight.api import generate

        return generate(model, tokenizer, prompt, **asdict(self))


def drafts_of(text: str) -> Drafts:
    """`auto`, or a number."""
    if text == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:  # also for thousands of digits
        number = -1
    if number < 0:
        raise UserError("--drafts is a number or auto", got=text[:100], do="write for example --drafts 2")
    return number


def cache_of(text: str) -> "CacheDtype":
    """`auto`, or a type of number that is smaller than the weights'."""
    from cavelight.run.rows import named

    return named(text)


def load(path: Path, dtype: str, without_mtp: bool = False) -> "tuple[Transformer, Tokenizer]":
    """Model and tokenizer; `dtype` as on the command line, `auto` for the checkpoint's own."""
    from cavelight.api import load as load_checkpoint

    wanted = dtype_of(dtype)
    with ERR.status(f"loading {path}"):
        return load_checkpoint(path, wanted, without_mtp=without_mtp)


def dtype_of(text: str) -> "torch.dtype | None":
    """A type of number by its name on the command line, None for `auto`."""
    import torch

    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if text not in dtypes:
        raise UserError("There is no such type of number here", got=text, do=f"choose one of {', '.join(dtypes)}")
    return dtypes[text]


def generate(path: Path, prompt: str | None, options: Options, dtype: str, without_mtp: bool, as_json: bool) -> None:
    """Stream what follows `prompt` (standard input where None) to stdout; what it took goes to stderr."""
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("There is no prompt", do="give one with -p, or pipe it in")
        prompt = sys.stdin.read()
    options.check()
    model, tokenizer = load(path, dtype, without_mtp)
    stream = options.stream(model, tokenizer, prompt)
    if as_json:
        pieces: list[str] = []
        try:
            pieces.extend(stream)
        finally:  # Ctrl-C and an error leave what was made before them
            if pieces or stream.stats.finish:
                say_json({"prompt": prompt, "text": "".join(pieces), "stats": stream.stats.as_dict()})
        return
    if OUT.is_terminal:
        OUT.print(Text(prompt, style="dim"), end="", soft_wrap=True)
    show(stream, [])
    ERR.print(Text(stream.stats.report(), style="cyan"), soft_wrap=True)


def show(stream: "TextStream", shown: list[str]) -> None:
    """Print pieces as they come, untouched, and note them in `shown`, which keeps them if Ctrl-C breaks this off."""
    try:
        for piece in stream:
            shown.append(piece)
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def chat(path: Path, system: str | None, options: Options, dtype: str, without_mtp: bool, as_json: bool) -> None:
    """A conversation in the checkpoint's own format: a line in, an answer out. /new begins anew, /exit leaves."""
    options.check()
    model, tokenizer = load(path, dtype, without_mtp)
    opening: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    tokenizer.chat_prompt(
        [*opening, {"role": "user", "content": ""}]
    )  # a missing template is told before the first line
    if not as_json:
        ERR.print("Ctrl-D or /exit leaves, /new forgets what was said, Ctrl-C stops an answer.", style="dim")
    while (line := _next_line(as_json)) is not None:
        if line == "/exit":
            return
        if line == "/new":
            messages = list(opening)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            stream = options.stream(model, tokenizer, tokenizer.chat_prompt(messages))
        except UserError as error:  # above all a conversation longer than the context: it need not end all
            messages.pop()
            say_json({"error": str(error)}) if as_json else ERR.print(f"{error} Or begin anew with /new.", style="red")
            continue
        if as_json:
            answer = "".join(stream)
            say_json({"answer": answer, "stats": stream.stats.as_dict()})
        else:
            shown: list[str] = []
            with suppress(KeyboardInterrupt):
                show(stream, shown)
            answer = "".join(shown)
            ERR.print(Text(stream.stats.report(), style="cyan"), soft_wrap=True)
        messages.append({"role": "assistant", "content": answer})


def _next_line(as_json: bool) -> str | None:
    """What was typed, without spaces around it; None at the end of input."""
    if sys.stdin is None:
        return None
    try:
        return (input() if as_json or not sys.stdin.isatty() else OUT.input("[bold green]> ")).strip()
    except EOFError:
        if OUT.is_terminal:
            OUT.print()
        return None
