"""Fill in the middle: a document as its beginning, its end, and then what lies between (V3 report, section 4.1)."""

from dataclasses import dataclass

from cavelight.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from cavelight.errors import UserError

# What stands before the beginning, before the end, and before the middle.
_KNOWN_NAMES = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
)


@dataclass(frozen=True)
class FimTokens:
    """Ids of the control tokens of the order prefix, suffix, middle."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FimTokens":
        """Raises UserError if the tokenizer has none of the sets of names that are in use."""
        for names in _KNOWN_NAMES:
            if all(name in tokenizer.control for name in names):
                return cls(*(tokenizer.control[name] for name in names))
        raise UserError(
            "The tokenizer has no tokens for fill-in-the-middle",
            got="none of " + ", ".join(names[0] for names in _KNOWN_NAMES),
            why="fim_rate is above 0",
            do="set data.fim_rate=0, or choose another tokenizer",
        )


def cut_for_fim(text: str, draws: tuple[int, int, int], rate: float) -> tuple[str, str, str] | None:
    """Beginning, middle and end of `text`, or None where it stays whole: decided by three draws of 64 bits.

    The two cuts are at any character, each as likely as another; parts may be empty.
    """
    if draws[0] >= rate * 2.0**64:
        return None
    first, second = sorted(draw % (len(text) + 1) for draw in draws[1:])
    return text[:first], text[first:second], text[second:]
