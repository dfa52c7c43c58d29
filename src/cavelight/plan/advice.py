"""What to change first: single changes to a plan, each planned anew, ranked by what it gains."""

from collections.abc import Iterator
from dataclasses import dataclass

from cavelight.plan.layout import Layout
from cavelight.plan.serving import Serving, layouts
from cavelight.plan.share import Form
from cavelight.plan.training import Plan

NARROWER: dict[Form, tuple[Form, ...]] = {
    "fp32": ("bf16", "int8", "int4"),
    "bf16": ("fp8", "int4"),
    "fp8": ("int4",),
    "int8": ("int4",),
    "int4": (),
}
WORTH = 0.02  # gains below this share are not worth a line


@dataclass(frozen=True, slots=True)
class Change:
    """One change and what it makes of a plan, as factors of what was before: above 1 is more.

    fits: whether the memory suffices after it; `spare` is what is then left of a device, as a share of its memory.
    speed: tokens a second of a device. user: tokens a second that one user sees, serving only. context: the largest.
    """

    what: str
    fits: bool
    spare: float
    speed: float
    user: float = 1.0
    context: float = 1.0

    @property
    def rank(self) -> tuple[bool, float]:
        return self.fits, self.speed if self.fits else self.spare


def serving_advice(now: Serving, batch: int | None = None) -> list[Change]:
    """Changes to a way of serving, the best first: for a batch of sequences, or for as many as keep it busiest.

    Where it fits already, changes that gain less than WORTH everywhere are left out; where not, all that help.
    """
    before = _served(now, batch)
    found = [_change(what, other, before, batch) for what, other in _other_servings(now)]
    if before is None:
        return sorted((one for one in found if one.fits or one.spare > _spare(now)), key=lambda one: one.rank)[::-1]
    worth = [one for one in found if one.fits and max(one.speed, one.user, one.context) > 1 + WORTH]
    return sorted(worth, key=lambda one: one.rank, reverse=True)


def _other_servings(now: Serving) -> Iterator[tuple[str, Serving]]:
    layout, count = now.layout, now.layout.devices
    for form in NARROWER[now.form]:
        yield f"weights in {form}", now.with_(form=form)
    if now.cache == "bf16":
        yield "cache in fp8", now.with_(cache="fp8")
    if now.drafts:
        yield "no MTP drafts", now.with_(acceptance=None)
    elif now.config.num_nextn_predict_layers:
        yield "MTP drafts, 85 % accepted", now.with_(acceptance=0.85)
    yield f"half the context, {now.context // 2:,} tokens", now.with_(context=max(1, now.context // 2))
    for other in layouts(now.config, now.device, count):
        if (other.tp, other.ep) != (layout.tp, layout.ep):
            yield _difference(layout, other), now.with_(layout=other)
    for other in layouts(now.config, now.device, 2 * count) if now.device.network else ():
        if other.tp == layout.tp:
            yield f"twice the devices, ep={other.ep}", now.with_(layout=other)
    if layout.dp % 2 == 0:
        halved = layout.with_(dp=layout.dp // 2, cp=layout.cp * 2)
        yield f"cp={halved.cp}: contexts split over {halved.cp} ranks", now.with_(layout=halved)


def _spare(one: Serving) -> float:
    return (one.free - one.context * one.bytes_per_token) / one.device.memory


def _difference(layout: Layout, other: Layout) -> str:
    """What another layout has otherwise, as in `tp=8, dp=2 (now tp=1, dp=16)`."""
    names = [name for name in ("tp", "dp", "ep", "pp", "cp") if getattr(layout, name) != getattr(other, name)]
    new, old = (", ".join(f"{name}={getattr(one, name)}" for name in names) for one in (other, layout))
    return f"{new} (now {old})"


def _served(one: Serving, batch: int | None) -> tuple[float, float, float] | None:
    """Tokens a second of a device and of one user, and the largest context; None where it does not fit."""
    if not one.holds(batch):
        return None
    return one.decode(one.sequences(batch)).per_device, one.decode(1).per_sequence, float(one.largest_context())


def _change(what: str, other: Serving, before: tuple[float, float, float] | None, batch: int | None) -> Change:
    after = _served(other, batch)
    if after is None or before is None:
        return Change(what, after is not None, _spare(other), after[0] if after else 0.0)
    speed, user, context = (new / old for new, old in zip(after, before, strict=True))
    return Change(what, True, _spare(other), speed, user, context)


def training_advice(now: Plan) -> list[Change]:
    """Changes to a way of training on as many devices, the best first, by tokens a second of a device."""
    rate = now.speed.per_device
    found = [_trained(what, one, rate) for what, one in _other_plans(now) if one is not None]
    if now.spare < 0:
        return sorted((one for one in found if one.spare > now.spare), key=lambda one: one.rank, reverse=True)
    worth = [one for one in found if one.fits and one.speed > 1 + WORTH]
    return sorted(worth, key=lambda one: one.rank, reverse=True)


def _trained(what: str, other: Plan, rate: float) -> Change:
    fits = other.spare >= 0
    return Change(what, fits, other.spare, other.speed.per_device / rate if fits else 0.0)


def _other_plans(now: Plan) -> Iterator[tuple[str, Plan | None]]:
    layout = now.layout
    if now.form == "bf16" and "fp8" in now.device.peaks:
        yield "matrix products in fp8", now.with_(form="fp8")
    for recompute in ("none", "selective", "full"):
        if recompute != layout.recompute:
            yield f"recompute={recompute}", now.laid(recompute=recompute)
    for zero in (1, 3):
        if zero > layout.zero:
            yield f"zero={zero}", now.laid(zero=zero)
    if layout.pp > 1 and layout.schedule != "dualpipe" and layout.pp % 2 == 0:
        yield "schedule=dualpipe", now.laid(schedule="dualpipe")
    for ep in (layout.ep * 2, layout.ep // 2):
        if ep:
            yield f"ep={ep} (now {layout.ep})", now.laid(ep=ep)
    if layout.dp % 2 == 0:
        yield f"pp={layout.pp * 2}, dp={layout.dp // 2}", now.laid(pp=layout.pp * 2, dp=layout.dp // 2)
        yield f"tp={layout.tp * 2}, dp={layout.dp // 2}", now.laid(tp=layout.tp * 2, dp=layout.dp // 2)
        yield f"cp={layout.cp * 2}, dp={layout.dp // 2}", now.laid(cp=layout.cp * 2, dp=layout.dp // 2)
    for name in ("pp", "tp", "cp"):
        degree = getattr(layout, name)
        if degree % 2 == 0:
            yield f"{name}={degree // 2}, dp={layout.dp * 2}", now.laid(**{name: degree // 2, "dp": layout.dp * 2})
    if now.device.network:
        doubled = now.laid(dp=2 * layout.dp, ep=2 * layout.ep) or now.laid(dp=2 * layout.dp)
        more = doubled and doubled.with_(sequences=2 * now.sequences)
        yield f"twice the devices and rows, dp={2 * layout.dp}", more
    yield f"twice the batch, {2 * now.sequences:,} rows", now.with_(sequences=2 * now.sequences)
