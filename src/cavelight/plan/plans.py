"""A whole plan as data, ready for JSON: what `cavelight plan` says of a model on devices."""

from collections.abc import Mapping
from dataclasses import asdict
from math import ceil
from typing import Any

from cavelight.plan import serving, training
from cavelight.plan.advice import Change, serving_advice, training_advice
from cavelight.plan.devices import Device
from cavelight.plan.layout import Layout
from cavelight.plan.pipeline import NAMES, Chunk, schedule
from cavelight.plan.serving import USABLE, Serving
from cavelight.plan.share import Form
from cavelight.plan.training import Plan
from cavelight.spec.config import ModelConfig

FORMS: tuple[Form, ...] = ("bf16", "fp8", "int4")
TRILLION = 10**12


def fits_on(
    config: ModelConfig, devices: Mapping[str, Device], context: int, acceptance: float | None
) -> list[dict[str, Any]]:
    """For each device the fewest that serve one sequence of `context` tokens, by format of the weights.

    Speed and the largest context are those of the fewest in the device's own format.
    """
    rows = []
    for device in devices.values():
        asked = Serving(config, device, Layout(), context, device.native, acceptance=acceptance)
        fewest = {form: serving.smallest(asked.with_(form=form)) for form in FORMS}
        own = fewest.get(device.native) or serving.smallest(asked)
        rows.append(
            {
                "device": device.name,
                "memory": device.memory,
                "checked": device.checked,
                "format": device.native,
                "devices": {form: found.layout.devices if found else None for form, found in fewest.items()},
                "layout": str(own.layout) if own else None,
                "tokens_per_second": own.decode(1).per_sequence if own else None,
                "largest_context": own.largest_context() if own else 0,
            }
        )
    return rows


def served(one: Serving, sequences: float, price: float) -> dict[str, Any]:
    """Serving with so many sequences on each data rank; below 1, some ranks stand idle."""
    device, layout, most = one.device, one.layout, ceil(sequences)
    memory, alone, busy, prompt = one.memory(most), one.decode(1), one.decode(sequences or 1), one.prefill()
    fewest = serving.smallest(one)
    fits = one.most_sequences() >= max(1, most)
    return {
        "device": device.name,
        "count": layout.devices,
        "layout": str(layout),
        "format": one.form,
        "cache": one.cache,
        "context": one.context,
        "acceptance": one.acceptance if one.drafts else None,
        "fits": fits,
        "memory": memory,
        "memory_usable": USABLE * device.memory,
        "memory_device": device.memory,
        "sequences": round(sequences * layout.dp),
        "most_sequences": one.most_sequences() * layout.dp,
        "largest_context": one.largest_context(),
        "fewest_devices": fewest.layout.devices if fewest else None,
        "alone": {"tokens_per_second": alone.per_sequence, "seconds": alone.seconds, "parts": alone.parts},
        "busy": {
            "tokens_per_second": busy.per_device * layout.devices,
            "per_device": busy.per_device,
            "per_user": busy.per_sequence,
            "seconds": busy.seconds,
            "parts": busy.parts,
        },
        "prefill": {
            "tokens_per_second": prompt.per_device * layout.devices,
            "per_device": prompt.per_device,
            "first_token": prompt.first_token,
            "parts": prompt.parts,
        },
        "price": price,
        "dollars_per_million": {
            "in": price / 3600 / prompt.per_device * 1e6,
            "out": price / 3600 / busy.per_device * 1e6,
        },
    }


def trained(plan: Plan, tokens: float | None, price: float) -> dict[str, Any]:
    """A step of training, and what so many tokens take; 10^12 unless told."""
    speed, memory, layout = plan.speed, plan.memory, plan.layout
    amount = tokens or TRILLION
    hours = speed.device_hours(amount)
    fewest = None if plan.spare >= 0 else training.smallest(plan)
    return {
        "device": plan.device.name,
        "count": layout.devices,
        "layout": str(layout),
        "format": plan.form,
        "row": plan.row,
        "sequences": plan.sequences,
        "micro_batches": plan.micro_batches,
        "fits": plan.spare >= 0,
        "fewest_devices": fewest.layout.devices if fewest else None,
        "memory": dict(memory.parts),
        "memory_where": memory.where,
        "memory_usable": USABLE * plan.device.memory,
        "memory_device": plan.device.memory,
        "step": {"tokens": speed.tokens_per_step, "seconds": speed.seconds, "parts": speed.parts},
        "tokens_per_second": speed.per_device * layout.devices,
        "per_device": speed.per_device,
        "utilisation": speed.utilisation,
        "bubble": speed.bubble,
        "schedules": schedules(plan) if layout.pp > 1 and plan.utilisation is None else [],
        "tokens": amount,
        "device_hours": hours,
        "days": speed.days(amount, layout.devices),
        "price": price,
        "dollars": hours * price,
    }


def schedules(plan: Plan) -> list[dict[str, Any]]:
    """The report's table of schedules for this plan's stages, bubbles in seconds of its own chunks."""
    chunk: Chunk = training.slowest_chunk(plan)
    stages, rows = plan.layout.pp, []
    for name in NAMES:
        if name.startswith("dualpipe") and stages % 2:
            continue
        found = schedule(name, stages, chunk)
        rows.append({"schedule": NAMES[name], **asdict(found)})
    return rows


def advice(plan: Serving | Plan, batch: int | None = None) -> list[dict[str, Any]]:
    """Single changes, ranked; with a batch, for so many sequences at a time."""
    found: list[Change] = serving_advice(plan, batch) if isinstance(plan, Serving) else training_advice(plan)
    return [asdict(change) for change in found]
