"""Text to ids and back: any `tokenizer.json`, or a byte-level BPE trained on a corpus.

Ordinary text never becomes a control token (`<｜User｜>`, end of sentence, ...), whatever it looks like; only a chat
template or an explicit id makes one. Byte-level tokenizers are lossless: decode(encode(text)) == text.
"""

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from cavelight.data.chat import ChatTemplate, Message
from cavelight.disk import file_beside
from cavelight.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, FIM_HOLE, FIM_BEGIN, FIM_END)  # ids 0, 1, 2, ...

# A piece is what BPE may join into one token. On the standard library with 4096 tokens this gives 3.80 bytes per token
# on held-out modules; GPT-2's pattern gives 3.49, the pattern of cl100k 3.55, this one without joining a line's last
# signs to the newline 3.61.
_PIECES = "|".join(
    (
        r"(?: |[^\s\p{L}\p{M}\p{N}])?[\p{L}\p{M}]+",  # a word, with the space or the one sign before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+(?:\s*[\r\n]+[ \t]*)?",  # signs, with the line's end and the next line's indentation
        r"\s*[\r\n]+[ \t]*",  # a line's end with the indentation after it
        r"\s+(?!\S)",  # other white space, leaving its last space to the word that follows
        r"\s+",
    )
)

# DeepSeek-V3's format: no mark for the system prompt, no newlines, the end token after each answer.
# What, besides the corpus and the size, a trained tokenizer depends on: kept ones are made anew when it changes.
RECIPE = (SPECIAL_TOKENS, _PIECES, tokenizers.__version__)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% elif message['role'] != 'system' %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

# Our chat template writes the beginning token itself, so the tokenizer is told not to: no way of preparing a prompt
# gives two. (Text without it is nothing new to the model: most training rows begin in the middle of a document.)
_PLAIN_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}

_KNOWN_NAMES = {
    "bos_token": (BOS, "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]"),
    "eos_token": (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": (PAD, "<|padding|>", "<pad>", "[PAD]"),
}

log = logging.getLogger(__name__)


class Tokenizer:
    """Text to token ids and back.

    `definition` is the text of a tokenizer.json, `settings` the content of its tokenizer_config.json. Raises UserError
    when either is broken or no beginning or end token can be found.

    Attributes: `bos_id`, `eos_id`, `pad_id` (the end token where there is no pad token); `vocab_size` (highest id + 1);
    `fingerprint` (hash of `definition`); `control` (text to id of every token that ordinary text must never become).
    """

    def __init__(self, definition: str, settings: dict[str, Any], source: str = "the tokenizer") -> None:
        self._definition, self._settings, self._source = definition, settings, source
        parts = _parse(definition, source)
        added = {token["content"]: token["id"] for token in parts["added_tokens"]}
        for token in parts["added_tokens"]:
            # DeepSeek's own files call only a few of them special. Added pieces of ordinary text stay what they are.
            token["special"] = token["special"] or bool(re.fullmatch(r"<.*>|\[.*\]", token["content"], re.DOTALL))
        try:
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(parts))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{source} cannot be read by the tokenizers library", got=str(error), do="download tokenizer.json again"
            ) from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # as ordinary text
        self.control: dict[str, int] = {t["content"]: t["id"] for t in parts["added_tokens"] if t["special"]}
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id, self.eos_id = self._find("bos_token"), self._find("eos_token")
        self.pad_id = self._find("pad_token", otherwise=self.eos_id)
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
        self._bytes = _bytes_of_ids(self._inner, added) if _is_byte_level(parts["decoder"]) else None

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, dict[str, Any], str]]:
        return Tokenizer, (self._definition, self._settings, self._source)  # the library forgets some of its settings

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read `path`: a folder that holds a tokenizer.json, or that file. Raises UserError."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"There is no tokenizer at {path}", got=f"no file {file}", do="give a tokenizer.json or its folder"
            )
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one decides
            beside = file.with_name(name)
            settings |= _json(_read(beside), beside) if beside.is_file() else {}
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            settings["chat_template"] = _read(template)
        return cls(_read(file), settings, source=str(file))

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, each complete or not at all.

        `model_max_length` is the model's context in tokens. What was loaded is written back as it was.
        """
        names = {
            "bos_token": self.token(self.bos_id),
            "eos_token": self.token(self.eos_id),
            "pad_token": self.token(self.pad_id),
        }
        settings = _PLAIN_SETTINGS | self._settings | names
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        texts = {
            "tokenizer.json": self._definition,
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(names, ensure_ascii=False, indent=2) + "\n",
        }
        for name, text in texts.items():
            with file_beside(Path(folder) / name) as scratch:
                scratch.write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without a beginning token; the text of a control token is ordinary text here."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores. Raises UserError for text that is not Unicode (lone surrogates)."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    "The text is not valid Unicode",
                    got=f"a lone surrogate {text[error.start]!r} at character {error.start}",
                    why="it cannot be written as UTF-8 (usually it was read from bytes of another encoding)",
                    do="give the text as UTF-8",
                ) from error
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are not UTF-8, and unknown ids, show as U+FFFD."""
        if self._bytes is None:
            return str(self._inner.decode(list(ids), skip_special_tokens=False))
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    @property
    def is_byte_level(self) -> bool:
        """Whether each id stands for fixed bytes, so that encoding is lossless and `bytes_of` is known."""
        return self._bytes is not None

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one id, which may be a part of a character. Only for byte-level tokenizers."""
        if self._bytes is None:
            raise ValueError("only a byte-level tokenizer has fixed bytes for each id")
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else "\ufffd".encode()

    def token(self, token_id: int) -> str:
        """The name of an id in the vocabulary, as Hugging Face files spell it."""
        name = self._inner.id_to_token(token_id)
        if name is None:
            raise ValueError(f"no token has the id {token_id}")
        return name

    def chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """The ids of a conversation, [{"role": ..., "content": ...}, ...], in the checkpoint's chat format.

        `options` reach the template (`tools`, `thinking`, ...). Nothing inside a message can become a control token.
        Raises UserError when there is no template or it refuses the messages.
        """
        pieces = self._chat.render(messages, add_generation_prompt=add_generation_prompt, **options)
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self.encode(piece)
        return ids

    @cached_property
    def _chat(self) -> ChatTemplate:
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise UserError(
                f"{self._source} has no chat template",
                why="a conversation needs the format that the model was trained with",
                do="use plain generation, or put chat_template into tokenizer_config.json",
            )
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        control = self.control | {self.token(token_id): token_id for token_id in names.values()}
        return ChatTemplate(template, control, {name: self.token(token_id) for name, token_id in names.items()})

    def _find(self, role: str, otherwise: int | None = None) -> int:
        """The id of the token for `role`: the one the settings name, else a well-known one, else `otherwise`."""
        named = self._settings.get(role)
        named = named.get("content") if isinstance(named, dict) else named
        if not isinstance(named, str | None):
            raise UserError(
                f"{self._source} has a {role} that is no text", got=repr(named), do="mend tokenizer_config.json"
            )
        for name in _KNOWN_NAMES[role] if named is None else (named,):
            token_id = self._inner.token_to_id(name)
            if token_id is not None:
                return int(token_id)
        if named is None and otherwise is not None:
            return otherwise
        raise UserError(
            f"{self._source} has no {role}",
            got=f"{named!r}, which is not in the vocabulary" if named is not None else "none of the well-known names",
            why="documents begin and end with these tokens",
            do=f"name it in tokenizer_config.json beside tokenizer.json, as {role}",
        )


class StreamDecoder:
    """Text from ids as they come: `push` never gives half a character, and all parts together equal `decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[
            int
        ] = []  # only for tokenizers that are not byte-level: what one id means depends on the others
        self._given = ""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this id; the rest is held back."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.bytes_of(token_id))
        self._ids.append(token_id)
        # "<0xE2>": one byte, which becomes a character together with the bytes that follow.
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer._inner.id_to_token(token_id) or "")
        return "" if is_byte else self._rest()

    def flush(self) -> str:
        """What was held back, when no more ids come; the decoder is then as new."""
        text = self._utf8.decode(b"", final=True) if self._tokenizer.is_byte_level else self._rest()
        self._ids, self._given = [], ""
        return text

    def _rest(self) -> str:
        text = self._tokenizer.decode(self._ids)
        rest, self._given = text[len(self._given) :], text
        return rest


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids: SPECIAL_TOKENS, the 256 bytes, merges; the same for the same texts.

    A corpus too small for that many merges is said aloud, and the ids that remain are named `<｜unused▁n｜>`.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(
            "The vocabulary is too small",
            got=f"vocab_size {vocab_size}",
            why=f"{len(SPECIAL_TOKENS)} control tokens and 256 bytes need {smallest} ids",
            do="choose a larger one",
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    missing = vocab_size - inner.get_vocab_size()
    if missing:
        log.warning(
            "The corpus gives only %d tokens: %d of %d ids stay unused.", vocab_size - missing, missing, vocab_size
        )
        unused = (f"<｜unused▁{n}｜>" for n in range(missing))
        inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unused])
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return Tokenizer(inner.to_str(), settings)


def _bytes_of_ids(inner: tokenizers.Tokenizer, added: dict[str, int]) -> list[bytes]:
    """The bytes of each id of a byte-level vocabulary, in which every byte is written as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # these bytes are their own character
    others = [byte for byte in range(256) if byte not in printable]  # these have the characters from 256 on
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = ["\ufffd".encode()] * (1 + max(vocabulary.values()))
    for name, token_id in vocabulary.items():
        plain = name in added or not byte_of.keys() >= set(name)  # added tokens are written as they are
        table[token_id] = name.encode() if plain else bytes(byte_of[char] for char in name)
    return table


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    chain = decoder.get("decoders", [decoder]) if decoder else []
    return [part["type"] for part in chain if part["type"] != "Fuse"] == ["ByteLevel"]


def _parse(definition: str, source: str) -> dict[str, Any]:
    parts = _json(definition, source)
    if not isinstance(parts.get("model"), dict) or not parts["model"].get("vocab"):
        raise UserError(
            f"{source} is not a tokenizer.json", got="no model with a vocabulary", do="fetch the file again"
        )
    return {"added_tokens": [], "decoder": None} | parts


def _json(text: str, source: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is broken", got=f"not JSON: {error}", do="fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} is broken", got=f"a JSON {type(content).__name__}, not an object")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", got=f"an invalid byte at {error.start}") from error
