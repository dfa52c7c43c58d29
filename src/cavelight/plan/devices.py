"""The table of devices: `devices.toml` beside this file, and files of the same kind that a user gives."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from cavelight.errors import UserError
from cavelight.plan.memory import RUNTIME
from cavelight.plan.share import Form

_POSITIVE = ("memory_gb", "bandwidth_gbs")
_PEAKS = ("fp32_tflops", "bf16_tflops", "fp8_tflops")
_RATES = ("link_gbs", "network_gbs", "price", "layer_us", "runtime_gb")
_WORDS = ("note", "measured")
_KEYS = (*_POSITIVE, *_PEAKS, *_RATES, "per_node", "checked", *_WORDS)


@dataclass(frozen=True, slots=True)
class Device:
    """One row: bytes, bytes per second and operations per second, as a data sheet or a measurement has them.

    memory: what a program can get. peaks: dense operations per second by number format, of those that it has.
    link, network: of one device in one direction, inside a node of `per_node` devices and between nodes. price: dollars
    per hour. layer_seconds: fixed cost of a layer, whatever its size: launches and synchronisation. runtime: bytes
    that the device's own context, kernels and communicators take.
    """

    name: str
    memory: float
    bandwidth: float
    peaks: Mapping[str, float]
    link: float
    network: float
    per_node: int
    price: float
    layer_seconds: float
    runtime: float
    checked: bool = True
    note: str = ""
    measured: str = ""

    def peak(self, form: Form) -> float:
        """Operations per second on numbers of a format; those that it lacks are computed in the next wider one."""
        wider = {"fp8": ("fp8", "bf16", "fp32"), "fp32": ("fp32",)}.get(form, ("bf16", "fp32"))
        for width in wider:
            if width in self.peaks:
                return self.peaks[width]
        return max(self.peaks.values())  # float32 on a device that states only faster formats

    @property
    def native(self) -> Form:
        """The narrowest format that it computes with: in this a model is planned unless told otherwise."""
        forms: tuple[Form, ...] = ("fp8", "bf16", "fp32")
        return next(form for form in forms if form in self.peaks)


LAYER_US = 50.0  # ten to fifteen kernels of three to four microseconds; an assumption


@cache
def table() -> dict[str, Device]:
    """The devices that come along, by name."""
    return _parse(Path(__file__).with_name("devices.toml"))


def read_devices(file: Path | None) -> dict[str, Device]:
    """The devices that come along and those of a file, which wins where names are equal."""
    return table() if file is None else table() | _parse(file)


def find(name: str, devices: Mapping[str, Device]) -> Device:
    """The device of that name, in any case. Raises UserError that lists the names and the closest one."""
    by_lower = {known.lower(): device for known, device in devices.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    started = [known for known in by_lower if known.startswith(name.lower())]
    if len(started) == 1:
        return by_lower[started[0]]
    close = started or get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    names = " or ".join(by_lower[known].name for known in close)
    raise UserError(
        f"There is no device {name!r}",
        why=f"the table has {', '.join(devices)}",
        do=(f"did you mean {names}? " if names else "") + "Other devices come from a file given with --devices",
    )


def _parse(file: Path) -> dict[str, Device]:
    do = "write it like the table that comes along: one [NAME] for each device, with memory_gb, bandwidth_gbs, ..."
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read", got=error.strerror or str(error), do="give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not TOML", got=str(error), do=do) from error
    if not content:
        raise UserError(f"{file} holds no device", do=do)
    return {name: _device(file, name, row) for name, row in content.items()}


def _device(file: Path, name: str, row: Any) -> Device:
    def wrong(got: str, do: str) -> UserError:
        return UserError(f"{file} has a device that cannot be planned with", got=f"[{name}] {got}", do=do)

    if not isinstance(row, dict):
        raise wrong(repr(row), "write [NAME] on a line of its own, and the figures below it")
    for key in row:
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            raise wrong(f"with {key}", f"did you mean {close[0]}?" if close else f"the keys are {', '.join(_KEYS)}")
    for key in (*_POSITIVE, *_PEAKS, *_RATES):
        value = row.get(key, 1 if key not in _POSITIVE else None)
        least = 0 if key in _RATES else 1e-9
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e9:
            raise wrong(f"with {key} = {value!r}" if key in row else f"without {key}", f"give {key} a positive number")
    if not any(key in row for key in _PEAKS):
        raise wrong("without a speed", f"give at least one of {', '.join(_PEAKS)}")
    per_node = row.get("per_node", 1)
    if not isinstance(per_node, int) or isinstance(per_node, bool) or per_node < 1:
        raise wrong(f"with per_node = {per_node!r}", "give per_node a whole number from 1 on")
    link = row.get("link_gbs", row["bandwidth_gbs"] / 10) * 1e9
    if per_node > 1 and not link:
        raise wrong("with link_gbs = 0 in a node of several", "give link_gbs what joins them, or per_node = 1")
    if not isinstance(row.get("checked", True), bool):
        raise wrong(f"with checked = {row['checked']!r}", "give checked true or false")
    return Device(
        name=name,
        memory=row["memory_gb"] * 1e9,
        bandwidth=row["bandwidth_gbs"] * 1e9,
        peaks={key.removesuffix("_tflops"): row[key] * 1e12 for key in _PEAKS if key in row},
        link=link,
        network=row.get("network_gbs", link / 1e9 / 4) * 1e9,
        per_node=per_node,
        price=float(row.get("price", 0.0)),
        layer_seconds=row.get("layer_us", LAYER_US) * 1e-6,
        runtime=row.get("runtime_gb", RUNTIME / 1e9) * 1e9,
        checked=row.get("checked", True),
        note=str(row.get("note", "")),
        measured=str(row.get("measured", "")),
    )
