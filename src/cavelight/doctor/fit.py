"""Headers against the shape table: which tensors are missing, left over, misshapen or packed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cavelight.spec.formats import PACKED_ROLES, Format, Stored
from cavelight.weights.headers import CODES, Entry
from cavelight.weights.names import DERIVED, HFTensor

SCALES = ("_scale_inv", "_scale", "_shape")  # what lies beside packed values


@dataclass(frozen=True)
class Fit:
    """Headers against the shape table: names only, `misshapen` with both shapes, `packed` the plain names."""

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    packed: set[str] = field(default_factory=set)
    bad_scales: list[str] = field(default_factory=list)


def fit(wanted: Iterable[HFTensor], entries: Mapping[str, Entry], form: Format) -> Fit:
    """Match what is stored with what the configuration asks for, MTP's copies and derived tensors being optional."""
    found = Fit()
    left = dict(entries)
    for tensor in wanted:
        parts = _packed_parts(tensor, entries, form)
        if parts:
            found.packed.add(tensor.name)
        for part in parts or (Stored(tensor.name, tensor.shape, ""),):
            entry = left.pop(part.name, None)
            is_scale = part.name.endswith(SCALES)
            if entry is None:
                if is_scale:
                    found.bad_scales.append(f"{part.name} is missing")
                elif not tensor.is_copy:
                    found.missing.append(part.name)
            elif entry.shape != part.shape:
                said = f"{part.name} is {list(entry.shape)}, not {list(part.shape)}"
                (found.bad_scales if is_scale else found.misshapen).append(said)
    for name in left:
        if name.endswith(SCALES):
            found.bad_scales.append(f"{name} belongs to no packed matrix")
        elif not DERIVED.fullmatch(name):
            found.left_over.append(name)
    return found


def _packed_parts(tensor: HFTensor, entries: Mapping[str, Entry], form: Format) -> tuple[Stored, ...]:
    """The tensors that stand for this one, where the files hold it packed; none where it is plain."""
    if form.kind == "plain" or tensor.parts[0].role not in PACKED_ROLES or len(tensor.shape) != 2:
        return ()
    parts = form.companions(tensor.name, (tensor.shape[0], tensor.shape[1]))
    values = entries.get(parts[0].name)
    return parts if values is not None and CODES[values.dtype] == parts[0].code else ()
