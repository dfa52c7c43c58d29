"""A plan as lines to print, label and value; what they are made from is in plans.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from cavelight.plan.table import of_bytes, scaled

Line = tuple[str, str]
FACTOR = 1.005  # a factor nearer to 1 is shown as no change


def fits_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of "fits on": device, memory, fewest in bf16, fp8 and int4, one user's speed, largest context."""

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        fewest, held = row["devices"], row["largest_context"]
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "–"
        return (
            row["device"] + ("" if row["checked"] else " *"),
            of_bytes(row["memory"]),
            *(str(fewest[form] or "–") for form in ("bf16", "fp8", "int4")),
            row["format"],
            speed,
            (f"{held:,}" if held < 10**7 else _tokens(held)) if held else "–",
        )

    return [cells(row) for row in rows]


def serving_lines(plan: Mapping[str, Any], longest: int) -> list[Line]:
    """What serving comes to; `longest` is the model's longest context."""
    drafts = f", drafts accepted {plan['acceptance']:.0%}" if plan["acceptance"] is not None else ", no drafts"
    lines = [
        ("layout", plan["layout"].replace(",", ", ")),
        ("formats", f"weights {plan['format']}, cache {plan['cache']}{drafts}"),
        *_memory(plan),
    ]
    lines += _fewest(plan)
    if not plan["most_sequences"]:
        return lines
    held = plan["largest_context"]
    beyond = f", the model's longest; memory would hold {held:,}" if held > longest else ""
    alone, busy, prompt, dollars = plan["alone"], plan["busy"], plan["prefill"], plan["dollars_per_million"]
    lines += [
        ("largest context, one sequence a rank", f"{min(held, longest):,} tokens{beyond}"),
        (f"sequences of {plan['context']:,} tokens", f"{plan['most_sequences']:,} at once"),
        ("one user", f"{_speed(alone['tokens_per_second'])}, {_milliseconds(alone['seconds'])} a step"),
        ("  which goes into", _largest(alone["parts"])),
        (
            f"{plan['sequences']:,} users" if plan["sequences"] > 1 else "that user on all devices",
            f"{_speed(busy['tokens_per_second'])} in all, {busy['per_user']:,.1f} each, "
            f"{_milliseconds(busy['seconds'])} a step",
        ),
        ("  which goes into", _largest(busy["parts"])),
        (
            f"prefill of {plan['context']:,}",
            f"{_speed(prompt['tokens_per_second'])}, {_seconds(prompt['first_token'])} each",
        ),
        ("  which goes into", _largest(prompt["parts"])),
    ]
    if plan["price"]:
        price = f"at ${plan['price']:.2f} a device and hour"
        lines.append(("10^6 tokens", f"${dollars['in']:,.2f} in, ${dollars['out']:,.2f} out, {price}"))
    return lines


def training_lines(plan: Mapping[str, Any]) -> list[Line]:
    """What training comes to."""
    step = plan["step"]
    lines = [
        ("layout", plan["layout"].replace(",", ", ")),
        (
            "a step",
            f"{plan['sequences']:,} rows of {plan['row']:,} tokens, {plan['format']}: {step['tokens']:,} tokens",
        ),
        *_memory(plan),
        *_fewest(plan),
        ("a step takes", f"{_seconds(step['seconds'])}, {plan['micro_batches']:,} micro-batches in each pipeline"),
        ("  which goes into", _largest(step["parts"])),
        ("tokens", f"{_speed(plan['tokens_per_second'])}, {plan['per_device']:,.0f} a device"),
        ("utilisation of the peak" + (" in bf16" if plan["format"] != "fp32" else ""), f"{plan['utilisation']:.1%}"),
        (
            f"{_tokens(plan['tokens'])} tokens",
            f"{plan['days']:,.1f} days, {scaled(plan['device_hours'], ('', ' K', ' M', ' B'))} device hours",
        ),
    ]
    if plan["price"]:
        price = f"at ${plan['price']:.2f} a device and hour"
        lines.append(("  in money", f"${scaled(plan['dollars'], ('', ' K', ' M', ' B'))} {price}"))
    return lines


def schedule_rows(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the pipeline schedules: name, idle seconds and share of the work, weights, activations, devices."""
    work = plan["step"]["parts"]["forward and backward"]
    return [
        (
            row["schedule"],
            _seconds(row["bubble"]),
            f"{row['bubble'] / (work + row['bubble']):.1%}",
            f"{row['parameters']}x",
            str(row["activations"]),
            str(row["devices"]),
        )
        for row in plan["schedules"]
    ]


def advice_rows(advice: Sequence[Mapping[str, Any]], serving: bool, fits: bool, most: int = 7) -> list[tuple[str, ...]]:
    """Cells of what to change: the change, then factors; where nothing fits yet, what would be left or missing."""
    if not fits:
        return [(row["what"], "fits" if row["fits"] else "not yet", f"{row['spare']:+.0%}") for row in advice[:most]]
    factors = ("speed", "user", "context") if serving else ("speed",)
    return [(row["what"], *(_factor(row[name]) for name in factors)) for row in advice[:most]]


def _memory(plan: Mapping[str, Any]) -> list[Line]:
    used, usable = sum(plan["memory"].values()), plan["memory_usable"]
    where = f", {plan['memory_where']}" if plan.get("memory_where", "every device") != "every device" else ""
    verdict = "" if used <= usable else f": {of_bytes(used - usable)} too much"
    parts = sorted(plan["memory"].items(), key=lambda part: -part[1])
    shown = [(name, size) for name, size in parts if size >= 0.01 * used]
    words = ", ".join(f"{name} {of_bytes(size)}" for name, size in shown)
    return [
        ("memory of the fullest device" + where, f"{of_bytes(used)} of {of_bytes(usable)} usable{verdict}"),
        ("  for", words),
    ]


def _fewest(plan: Mapping[str, Any]) -> list[Line]:
    """The smallest number of devices that fits, where it is another."""
    fewest = plan["fewest_devices"]
    return [("fewest that fit", f"{fewest:,} x {plan['device']}")] if fewest and fewest != plan["count"] else []


def _largest(parts: Mapping[str, float], most: int = 4) -> str:
    """The largest parts of a time and their shares."""
    total = sum(parts.values())
    ranked = sorted(parts.items(), key=lambda part: -part[1])[:most]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked)


def _factor(factor: float) -> str:
    return "=" if 1 / FACTOR < factor < FACTOR else f"x {factor:.2f}"


def _tokens(number: float) -> str:
    return scaled(number, ("", " K", " M", " B", " T"))


def _speed(rate: float) -> str:
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else _seconds(seconds)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 10 else f"{seconds:,.0f} s"
