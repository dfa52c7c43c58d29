"""Checks of index and headers: what is stored, as what, and whether it is what the configuration asks for."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from cavelight.doctor.case import Case
from cavelight.doctor.findings import Finding, failed, passed, warned
from cavelight.doctor.fit import Fit
from cavelight.spec.formats import PACKED_ROLES, PLAIN
from cavelight.weights.headers import CODES, abbreviated, read_index

FEW = 3  # names in a sentence
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
PLAIN_DTYPES = {torch.bfloat16, torch.float16, torch.float32}
INEXACT_TOTAL = 0.01  # by this share released indices differ from their tensors


def files(case: Case) -> Iterator[Finding]:
    """Whether index and headers can be read, and what they add up to."""
    if refusal := case.refusals.get("files"):
        yield failed("files", str(refusal))
    if case.entries is None:
        return
    shards = {entry.file for entry in case.entries.values()}
    size = sum(entry.nbytes for entry in case.entries.values())
    yield passed(
        "files",
        f"{len(case.entries):,} tensors, {size / 1e9:,.3g} GB, in {len(shards):,} file{'s' * (len(shards) > 1)}, "
        "all headers sound.",
        tensors=len(case.entries),
        bytes=size,
        files=len(shards),
    )


def index(case: Case) -> Iterator[Finding]:
    """The index's own sum. Nothing is read by it, but some downloaders and loaders plan by it."""
    listed = read_index(case.folder) if case.entries is not None else None
    total = listed.metadata.get("total_size") if listed else None
    if not isinstance(total, int | float) or case.entries is None:
        return
    size = sum(entry.nbytes for entry in case.entries.values())
    if abs(total - size) > INEXACT_TOTAL * size:
        yield warned(
            "index",
            f"The index says total_size {total:,}, but its tensors have {size:,} bytes: it was written for other "
            "files or by a faulty converter; correct it.",
            8,
        )
    else:
        yield passed("index", "The index lists what the shards hold, and about as many bytes.", 8)


def shapes(case: Case) -> Iterator[Finding]:
    """Every tensor that the configuration asks for, none besides; MTP's have a check of their own."""
    if case.config is None or case.entries is None:
        return
    found, config = case.fit, case.config
    modules = mtp_layers(case.entries) | set(range(config.num_hidden_layers, config.num_layers_with_mtp))
    for kind, names in (("missing", found.missing), ("left over", found.left_over), ("misshapen", found.misshapen)):
        names = [name for name in names if _layer(name) not in modules]
        if names:
            trap, advice = _advice(kind, names)
            count = "1 tensor is" if len(names) == 1 else f"{len(names):,} tensors are"
            yield failed("shapes", f"{count} {kind} ({abbreviated(names, FEW)}): {advice}.", trap)
    if not (found.missing or found.left_over or found.misshapen):
        yield passed("shapes", "Every tensor that config.json asks for is there, in its shape, and no other.")


def _advice(kind: str, names: Sequence[str]) -> tuple[int | None, str]:
    if all(name.endswith("e_score_correction_bias") for name in names):
        if kind == "left over":
            return 4, "routing biases belong to topk_method noaux_tc, and config.json says another: correct it"
        return 5, "the routing biases were lost on the way; without them other experts are chosen: convert again"
    if all(name.endswith("_packed") or "_proj" in name for name in names) and kind == "misshapen":
        return None, "config.json and weights are of two models, or of two versions: take both from one source"
    return None, "the download is incomplete, or config.json belongs to another model: take both from one source"


def mtp_layers(entries: Mapping[str, object]) -> set[int]:
    """Indices of the layers that are MTP modules, by what only those have."""
    found = (re.fullmatch(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.weight", name) for name in entries)
    return {int(match[1]) for match in found if match}


def _layer(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def mtp_stored(case: Case) -> Iterator[Finding]:
    """Trap 8: as many MTP modules as announced, as the layers right after the last, whole, with their copies."""
    if case.config is None or case.entries is None:
        return
    config, modules = case.config, mtp_layers(case.entries)
    announced = set(range(config.num_hidden_layers, config.num_layers_with_mtp))
    if modules != announced:
        yield failed("mtp-stored", _misplaced(modules, announced, config.num_hidden_layers), 8, stored=sorted(modules))
        return
    if not announced:
        yield passed("mtp-stored", "No MTP modules are announced and none are stored.", 8)
        return
    found = case.fit
    broken = [name for name in found.missing + found.left_over + found.misshapen if (_layer(name) or -1) in modules]
    copies = [name for name, tensor in case.wanted.items() if tensor.is_copy and name not in case.entries]
    if broken:
        yield failed(
            "mtp-stored",
            "The MTP modules are not whole, with tensors missing, left over or misshapen "
            f"({abbreviated(broken, FEW)}); drafts would fail without any error elsewhere: "
            "convert again, or set num_nextn_predict_layers to 0.",
            8,
        )
    elif copies:
        yield warned(
            "mtp-stored",
            f"{abbreviated(copies, FEW)} not stored: Cavelight needs no copies of embedding and head, but vLLM and "
            "SGLang load MTP by them; `cavelight convert` writes them.",
            8,
        )
    else:
        said = f"{len(modules)} MTP module{'s' * (len(modules) > 1)}"
        yield passed("mtp-stored", f"{said}, whole, with copies, from layer {min(modules)} on, after the last.", 8)


def _misplaced(modules: set[int], announced: set[int], layers: int) -> str:
    if not modules:
        return (
            f"config.json announces MTP modules ({len(announced)}) and the files hold none (transformers for one drops "
            "them when it saves): take them from the original, or set num_nextn_predict_layers to 0."
        )
    at = abbreviated([str(layer) for layer in sorted(modules)], FEW)
    if not announced:
        return (
            f"The files hold MTP modules as layers {at}, but config.json announces none: set "
            f"num_nextn_predict_layers to {len(modules)}, or nobody will draft with them."
        )
    return (
        f"The files hold MTP modules as layers {at}, but config.json asks for {min(announced)} to {max(announced)} "
        f"(num_hidden_layers is {layers}, and module i is layer {layers} + i): correct the counts or rename the layers."
    )


def dtypes(case: Case) -> Iterator[Finding]:
    """Trap 5's dtype, and matrices of several kinds side by side."""
    if case.entries is None:
        return
    by_name = {name: entry.dtype for name, entry in case.entries.items()}
    odd = [n for n in case.wanted if n in by_name and n not in case.fit.packed and by_name[n] not in PLAIN_DTYPES]
    odd = [n for n in odd if by_name[n] not in FLOAT8]  # which gates and scales are asked about below
    if odd:
        yield failed(
            "dtypes",
            f"Of {abbreviated(odd, FEW)} the dtype is {CODES[by_name[odd[0]]]}, where weights are BF16, F16 or F32 "
            "unless config.json says how they are packed: convert again from the original.",
        )
    biases = {n: d for n, d in by_name.items() if n.endswith("e_score_correction_bias")}
    coarse = [n for n, d in biases.items() if d.is_floating_point and d.itemsize < 4]
    if coarse:
        dtype = by_name[coarse[0]]
        yield warned(
            "bias-dtype",
            f"Routing biases of {len(coarse)} layers are {CODES[dtype]} ({coarse[0]}, ...): between 1 and 2 that is "
            f"steps of {torch.finfo(dtype).eps:.1g}, where an update is 0.001, so experts tie and further training "
            "stands still; keep them float32.",
            5,
            layers=len(coarse),
        )
    elif biases and set(biases.values()) == {torch.float32}:
        yield passed("bias-dtype", "Routing biases are float32.", 5)
    gates = [n for n, d in by_name.items() if n.endswith("mlp.gate.weight") and d.itemsize < 2]
    if gates:
        yield failed(
            "dtypes",
            f"{len(gates)} gates are {CODES[by_name[gates[0]]]} ({gates[0]}, ...): so coarse, other experts are "
            "chosen; convert again with the gate left plain.",
            4,
        )
    yield from _mixture(case, by_name)


def _mixture(case: Case, by_name: Mapping[str, torch.dtype]) -> Iterator[Finding]:
    plain = {n: d for n, d in by_name.items() if d.is_floating_point and d.itemsize > 1 and n.endswith("_proj.weight")}
    kinds = Counter(plain.values())
    if len(kinds) > 1:
        (usual, _), *others = kinds.most_common()
        odd = [n for n, d in plain.items() if d in dict(others)]
        yield warned(
            "dtypes",
            f"{len(odd):,} of {len(plain):,} plain matrices are not {CODES[usual]} like the rest "
            f"({abbreviated(odd, FEW)}): engines cast all to one dtype, so check that this was meant.",
        )
    elif kinds and torch.float16 not in kinds and case.config is not None and case.config.torch_dtype == "float16":
        yield warned(
            "dtypes",
            "config.json says float16, but no matrix is: values past 65,504 overflow in engines that believe it; "
            "write the dtype that is stored.",
        )
    else:
        yield passed("dtypes", f"All plain matrices are {' '.join(CODES[d] for d in kinds) or 'packed'}.")


def scales(case: Case) -> Iterator[Finding]:
    """Trap 9: every packed matrix has its scales, of the right shape, and none is packed without saying so."""
    if case.entries is None:
        return
    float8 = [name for name, entry in case.entries.items() if entry.dtype in FLOAT8]
    form = case.format or PLAIN
    if float8 and form.kind != "fp8":
        yield failed(
            "scales",
            f"{len(float8):,} matrices are float8 ({float8[0]}, ...), but config.json has no quantization_config that "
            "says so: without their scales they are off by thousands; restore it.",
            9,
        )
        return
    if form.kind == "plain":
        stray = [name for name in case.entries if name.endswith(("weight_scale_inv", "weight_scale"))]
        if stray:
            yield failed(
                "scales",
                f"{len(stray):,} scales ({stray[0]}, ...) lie beside plain matrices: either values or scales are of "
                "another conversion; convert again.",
                9,
            )
        return
    if case.config is not None:
        yield from _scales_of(case, case.fit)


def _scales_of(case: Case, found: Fit) -> Iterator[Finding]:
    if found.bad_scales:
        yield failed(
            "scales",
            f"{len(found.bad_scales):,} scales do not fit ({abbreviated(found.bad_scales, FEW)}): a ragged last block "
            "has a scale too (sizes are divided by the block's and rounded up), and names match exactly.",
            9,
        )
    elif not found.packed:
        yield failed(
            "scales",
            "quantization_config announces packed matrices and the files hold none: remove it, or engines will look "
            "for scales that do not exist.",
            9,
        )
    else:
        yield passed("scales", f"{len(found.packed):,} packed matrices, each with scales of the right shape.", 9)
    config = case.config
    assert config is not None and case.format is not None
    plain = [
        tensor.name.removesuffix(".weight")
        for tensor in case.wanted.values()
        if tensor.parts[0].role in PACKED_ROLES
        and tensor.name not in found.packed
        and tensor.name in (case.entries or {})
    ]
    section = case.raw.get("quantization_config") or {}
    listed = section.get("modules_to_not_convert") or section.get("ignore") or []
    rules = [str(rule) for rule in listed] if isinstance(listed, list) else []
    unsaid = [name for name in plain if not any(_covers(rule, name) for rule in rules)]
    if unsaid and found.packed:
        key = "modules_to_not_convert" if case.format.kind == "fp8" else "ignore"
        yield warned(
            "scales",
            f"{len(unsaid):,} matrices are plain inside a quantised checkpoint ({abbreviated(unsaid, FEW)}), which "
            f"Cavelight sees but engines have to be told: list them under {key}.",
            9,
        )


def _covers(rule: str, name: str) -> bool:
    # A pattern from a file is not run, since some never end; whoever wrote one knows what to list.
    return rule.startswith("re:") or name == rule or name.startswith(f"{rule}.")


CHECKS = (files, index, shapes, mtp_stored, dtypes, scales)
