"""Chat templates, rendered so that only the template itself can write a control token.

A message may hold any text, also the text of a control token: `<｜User｜>` inside a message must stay seven letters
and some signs, or whoever writes a message could speak for somebody else. The template is therefore parsed, and every
control token that stands in *it* is replaced by a mark nobody can guess. After rendering, the marks become ids and
everything else is ordinary text. Messages are handed to the template untouched, so it can search and split them.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cavelight.errors import UserError

Message = Mapping[str, Any]

# A string that a template hands to these is looked for in the messages, not written: it has to stay as it is.
_SEARCHES = {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix"}
_SEARCHES |= {"strip", "lstrip", "rstrip", "trim", "find", "rfind", "index", "count", "replace"}


MOST_PRODUCT = 10**6  # characters, or items of a list
MOST_EXPONENT = 1000


class ChatTemplate:
    """A checkpoint's Jinja template over `control`, the map from a control token's text to its id.

    `variables` are handed to the template beside the messages (`bos_token`, `eos_token`, ...).
    """

    def __init__(self, source: str, control: Mapping[str, int], variables: Mapping[str, str]) -> None:
        self._control = control
        # Nobody can guess the mark, so no message holds it; trim, strip and tojson leave private-use characters alone.
        nonce = secrets.token_hex(16)
        self._marks = re.compile(f"\ue000{nonce}([0-9]+)\ue001")
        longest_first = sorted(control, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        def mark(text: str) -> str:
            return self._tokens.sub(lambda found: f"\ue000{nonce}{control[found[0]]}\ue001", text)

        environment = _environment()
        try:
            tree = environment.parse(source)
            _mark_written(tree, mark)
            self._marked = environment.from_string(tree, {name: mark(text) for name, text in variables.items()})
            self._plain = environment.from_string(source, dict(variables))
        except jinja2.TemplateError as error:
            raise UserError("The chat template cannot be read", got=str(error), do="mend chat_template") from error

    def render(self, messages: Sequence[Message], **options: Any) -> list[int | str]:
        """The prompt in pieces: an int is a control token's id, a str is ordinary text whatever it looks like.

        Raises UserError when the template refuses the messages, or when it makes control tokens in a way that
        cannot be told from text of the messages (say, from pieces of them).
        """
        now = datetime.datetime.now().strftime  # one moment for both renderings
        try:
            plain = self._plain.render(messages=messages, strftime_now=now, **options)
            marked = self._marked.render(messages=messages, strftime_now=now, **options)
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: a message of a shape it does not know
            raise UserError(
                "The chat template refuses these messages", got=str(error), do="check their roles, order and content"
            ) from error
        text_of = {token_id: text for text, token_id in self._control.items()}
        pieces: list[int | str] = []
        for index, part in enumerate(self._marks.split(marked)):  # odd parts are the ids between the marks
            if part:
                pieces.append(int(part) if index % 2 else part)
        given = json.dumps([messages, options], ensure_ascii=False, default=str)
        of_neither = {
            found for piece in pieces if isinstance(piece, str) for found in self._tokens.findall(piece)
        } - set(self._tokens.findall(given))
        if of_neither or "".join(text_of[p] if isinstance(p, int) else p for p in pieces) != plain:
            raise UserError(
                "The chat template makes control tokens out of pieces",
                got=", ".join(sorted(of_neither)) or "a prompt that changes when its control tokens are marked",
                why="they could not be told from the same text inside a message",
                do="write each control token in one piece in the template",
            )
        return pieces


def _mark_written(node: nodes.Node, mark: Callable[[str], str], searched: bool = False) -> None:
    """Replace control tokens in all text the template writes; `searched` text is only compared with messages."""
    if isinstance(node, nodes.TemplateData):
        node.data = mark(node.data)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str) and not searched:
        node.value = mark(node.value)
    looked_for = {id(child) for child in _looked_for(node)}
    for child in node.iter_child_nodes():
        _mark_written(child, mark, searched or id(child) in looked_for)


def _looked_for(node: nodes.Node) -> list[nodes.Node]:
    """The children of `node` that are patterns or keys."""
    match node:
        case nodes.Compare():
            return list(node.iter_child_nodes())
        case nodes.Getitem():
            return [node.arg]
        case nodes.Test():
            return list(node.args)
        case nodes.Call(node=nodes.Getattr(attr=name)) | nodes.Filter(name=name) if name in _SEARCHES:
            return list(node.args[:1] if name == "replace" else node.args)
        case _:
            return []


class _Environment(ImmutableSandboxedEnvironment):
    """Templates come with checkpoints, from anyone: a product of a few characters must not fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple | bytes)]
        factors = [side for side in (left, right) if isinstance(side, int)]
        large = sizes and factors and sizes[0] * factors[0] > MOST_PRODUCT
        large = large or (operator == "**" and any(abs(factor) > MOST_EXPONENT for factor in factors))
        if large:
            raise jinja2.TemplateError(f"a product that is too large for a chat template ({operator})")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what templates on the Hugging Face hub count on."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)

    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    return environment
