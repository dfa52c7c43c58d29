"""How a model lies on devices: the degrees of parallelism, the stages of a pipeline, what one device holds. No torch.

A device belongs to one pipeline rank, one tensor rank, one context rank and one data rank. Experts lie across instead:
`ep` devices of the same pipeline rank hold all of them once, whole, whatever their data, context and tensor ranks are,
as in DeepSeek-V3's training (PP16, EP64 over 128 data ranks) and in its decoding unit (TP4, DP80, EP320).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise
from math import ceil
from typing import Any, Literal, Self, get_args

from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.sections import Recompute
from cavelight.spec.shapes import Parameter, Role, parameters

Schedule = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
Zero = Literal[0, 1, 3]

DIGITS = 7  # of a degree of parallelism, at most

# Axes that tensor parallelism cuts: heads, FFN width, vocabulary. Latents, norms, gates stay whole on every device.
TENSOR_AXES = frozenset({"H", "H*(N+R)", "H*U", "I", "F*n_shared", "V"})


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism and what goes with them. All defaults are one device that keeps everything.

    dp, pp, tp, cp: data, pipeline stages, tensor, context. ep: devices over which one set of experts lies; it divides
    dp * tp * cp. redundant: copies of heavily loaded experts beside the routed ones (serving; V3's prefill has 32).
    zero: 1 shards optimizer states over the devices that hold equal weights, 3 gradients and weights as well.
    recompute: in the backward pass nothing, the cheap parts (norms, up-projections, SwiGLU: V3 report, section 3.2.3),
    or every layer. schedule: of the pipeline; pp counts stages, of which dualpipe keeps two on a device twice over all
    (2x parameters on pp devices) and dualpipev two once (on pp / 2 devices).
    """

    dp: int = 1
    ep: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    redundant: int = 0
    zero: Zero = 0
    recompute: Recompute = "none"
    schedule: Schedule = "1f1b"

    @property
    def ranks(self) -> int:
        """Devices of one pipeline rank: those that share the same layers."""
        return self.dp * self.tp * self.cp

    @property
    def pipeline(self) -> int:
        """Devices that one pipeline runs through."""
        return self.pp // 2 if self.schedule == "dualpipev" else self.pp

    @property
    def devices(self) -> int:
        return self.pipeline * self.ranks

    def replicas(self, role: Role) -> int:
        """Devices of a pipeline rank that hold the same elements of a role: what ZeRO shards over."""
        return self.ranks // self.ep if role == "expert" else self.dp * self.cp

    def __str__(self) -> str:
        """The fields that differ from one device's, as `of` reads them; `dp=1` where none does."""
        plain = Layout()
        told = [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        return ",".join(f"{name}={getattr(self, name)}" for name in told) or "dp=1"

    @classmethod
    def of(cls, text: str) -> Self:
        """A layout as people write it: `dp=8,ep=8,zero=1`. Raises UserError for what is no field or no value of it."""
        told: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (word.strip().lower() for word in part.partition("="))
            if name not in _FIELDS or name in told:
                close = get_close_matches(name, _FIELDS, n=1)
                why = f"{name} is told twice" if name in told else f"the fields are {', '.join(_FIELDS)}"
                raise UserError(
                    "That is no layout",
                    got=repr(part),
                    why=why,
                    do=f"did you mean {close[0]}?" if close and name not in told else "write for example dp=8,ep=8",
                )
            told[name] = _value(name, value)
        return cls(**told)

    def checked(self, config: ModelConfig) -> Self:
        """This layout, if the model can lie so. Raises UserError that says what to change."""
        wrong = [problem for problem in _problems(self, config) if problem]
        if wrong:
            why, do = zip(*wrong, strict=True)
            raise UserError("The model cannot lie so", got=str(self), why="; ".join(why), do="; ".join(do))
        return self

    def with_(self, **changes: Any) -> Self:
        """This layout with some fields changed."""
        return replace(self, **changes)


_FIELDS = tuple(f.name for f in fields(Layout))
_WORDS: dict[str, tuple[Any, ...]] = {
    "zero": get_args(Zero),
    "recompute": get_args(Recompute),
    "schedule": get_args(Schedule),
}


def _value(name: str, text: str) -> Any:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else None
    if name in _WORDS:
        value = number if name == "zero" else text
        if value not in _WORDS[name]:
            words = ", ".join(map(str, _WORDS[name]))
            raise UserError("That is no layout", got=f"{name}={text}", do=f"{name} is one of {words}")
        return value
    if number is None or number < (0 if name == "redundant" else 1):
        raise UserError("That is no layout", got=f"{name}={text}", do=f"give {name} a whole number, as in {name}=8")
    return number


def _problems(layout: Layout, config: ModelConfig) -> Iterator[tuple[str, str] | None]:
    """What makes a layout impossible for a model, and what to change."""
    E = config.n_routed_experts or 0
    experts = E + layout.redundant
    yield _uneven("tp", layout.tp, config.num_attention_heads, "attention heads")
    if any(not config.is_moe(layer) for layer in range(config.num_hidden_layers)):
        yield _uneven("tp", layout.tp, config.intermediate_size, "columns of the dense FFN")
    if layout.ranks % layout.ep:
        yield (
            f"ep ({layout.ep}) does not divide dp*tp*cp ({layout.ranks})",
            f"set ep to {_below(layout.ep, layout.ranks)}",
        )
    if layout.ep > 1 and not E:
        yield "the model has no routed experts", "leave ep at 1"
    elif E and experts % layout.ep:
        spare = -E % layout.ep
        yield (
            f"ep ({layout.ep}) does not divide {experts} experts",
            f"set ep to {_below(layout.ep, experts)}, or add copies of busy ones with redundant={spare}",
        )
    if layout.redundant and not E:
        yield "the model has no routed experts to copy", "leave redundant at 0"
    layers = config.num_hidden_layers
    if layout.pp > layers:
        yield f"pp ({layout.pp}) is more than the model's {layers} layers", f"set pp to {layers} or less"
    if layout.schedule.startswith("dualpipe") and layout.pp % 2:
        yield f"{layout.schedule} needs an even number of stages, pp is {layout.pp}", f"set pp to {layout.pp + 1}"


def _uneven(name: str, degree: int, length: int, what: str) -> tuple[str, str] | None:
    if length % degree == 0:
        return None
    return f"{name} ({degree}) does not divide {length:,} {what}", f"set {name} to {_below(degree, length)}"


def _below(degree: int, length: int) -> int:
    """The largest divisor of a length that is no more than a degree."""
    return max(d for d in range(1, min(degree, length) + 1) if length % d == 0)


def stages(config: ModelConfig, layout: Layout) -> tuple[range, ...]:
    """Layers of the trunk on each of the pp stages, in order; where they do not come out even, the first have more.

    The last stage also has the head and the prediction modules. (V3's own split over 16 stages is not published.)
    """
    each, more = divmod(config.num_hidden_layers, layout.pp)
    ends = [stage * each + min(stage, more) for stage in range(layout.pp + 1)]
    return tuple(range(*pair) for pair in pairwise(ends))


def stages_of(layout: Layout, rank: int) -> tuple[int, ...]:
    """Stages that a pipeline rank holds: one, or with DualPipe one from each end."""
    return (rank, layout.pp - 1 - rank) if layout.schedule.startswith("dualpipe") else (rank,)


def held(config: ModelConfig, layout: Layout, rank: int, mtp: bool = True) -> tuple[tuple[Parameter, int], ...]:
    """Parameters that a device of a pipeline rank holds, each with how many elements of it, before ZeRO's sharding.

    Prediction modules lie on the last stage and read the embedding, so that stage has a copy if it lacks the table.
    """
    mine = stages_of(layout, rank)
    by_stage = stages(config, layout)
    layers = {layer for stage in mine for layer in by_stage[stage]}
    first, last = 0 in mine, layout.pp - 1 in mine
    drafts = mtp and config.num_nextn_predict_layers > 0
    here: dict[int | str, bool] = {
        "embedding": first or (last and drafts),
        "end": last,
        "mtp": last and drafts,
        **dict.fromkeys(layers, True),
    }
    return tuple((p, elements(p, layout)) for p, place in _places(config) if here.get(place))


@lru_cache(maxsize=8)
def _places(config: ModelConfig) -> tuple[tuple[Parameter, int | str], ...]:
    """Every parameter with the trunk's layer that it belongs to, or embedding, end or mtp."""

    def place(p: Parameter) -> int | str:
        if p.name.startswith("model.layers."):
            return int(p.name.split(".")[2])
        return "embedding" if p.role == "embedding" else "mtp" if p.name.startswith("mtp.") else "end"

    return tuple((p, place(p)) for p in parameters(config))


def elements(p: Parameter, layout: Layout) -> int:
    """Elements of one parameter on a device that holds a part of it: the largest part where it is uneven."""
    if p.role == "expert":
        E = p.shape[0]
        return p.size // E * ceil((E + layout.redundant) / layout.ep)
    cut = next((length for axis, length in zip(p.axes, p.shape, strict=True) if axis in TENSOR_AXES), None)
    return p.size if cut is None else p.size // cut * ceil(cut / layout.tp)
