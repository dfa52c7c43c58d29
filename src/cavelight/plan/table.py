"""What `cavelight plan` shows: a model's counts, bytes and operations, as data and as lines to print.

Bytes are decimal (1 GB is 10^9); `128k` tokens are 128 x 1024, as in the names of context lengths.
"""

from dataclasses import asdict
from typing import Any

from cavelight.errors import UserError
from cavelight.spec import cost
from cavelight.spec.config import ModelConfig

_AMOUNTS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_SUFFIXES = {"": 1, "k": 1024, "m": 1024**2}
_FORMATS: dict[cost.Precision, str] = {
    "bf16": "weights in bf16",
    "fp8": "weights in fp8, blocks of 128 x 128",
    "int8": "weights in int8, by row",
    "int4": "weights in int4, groups of 32",
}
_ATTENTIONS = {
    "mla": "MLA (what Cavelight stores)",
    "expanded": "MLA, keys and values expanded",
    "mha": "MHA of the same shape",
    "gqa8": "GQA-8",
    "mqa": "MQA",
}


def tokens_of(text: str) -> int:
    """A number of tokens as people write it: `4096`, `128k`, `1m`."""
    number = text.strip().lower()
    suffix = number[-1:] if number[-1:] in ("k", "m") else ""
    digits = number.removesuffix(suffix)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 15 and int(digits) > 0):
        raise UserError("That is no number of tokens", got=repr(text), do="write for example 4096 or 128k")
    return int(digits) * _SUFFIXES[suffix]


def amount_of(text: str) -> float:
    """A number of training tokens as people write it, in powers of ten: `14.8T`, `300B`, `5e9`."""
    number = text.strip().lower()
    size = _AMOUNTS.get(number[-1:], 1.0)
    try:
        amount = float(number[:-1] if number[-1:] in _AMOUNTS else number) * size
    except ValueError:
        amount = 0.0
    if not 0 < amount < 1e18:
        raise UserError("That is no number of tokens", got=repr(text), do="write for example 14.8T or 300B")
    return amount


def facts(config: ModelConfig, context: int | None = None) -> dict[str, Any]:
    """Everything countable about a model, ready for JSON.

    `context` is a sequence's length in tokens, by default the longest that the model takes. Weights include the
    prediction modules, the cache does not; cache elements take two bytes. Training is counted for rows of the length
    before YaRN's stretch, prediction modules included, decoding for one token after `context` others, without them.
    """
    config.check_latent("The planner")
    context = config.max_position_embeddings if context is None else context
    if context < 1:
        raise UserError("A context has at least one token", got=str(context), do="give a positive number")
    yarn = config.rope_scaling
    row = min(context, yarn.original_max_position_embeddings if yarn else config.max_position_embeddings)
    cache = asdict(cost.cache_bytes_per_token(config))
    return {
        "model_type": config.extra.get("model_type", config.model_type),
        "context": context,
        "max_context": config.max_position_embeddings,
        "parameters": {
            "total": cost.total_parameters(config),
            "mtp": cost.mtp_parameters(config),
            "active": cost.active_parameters(config),
            "active_without_embedding": cost.active_parameters(config, embedding=False),
            "in_checkpoint": cost.checkpoint_elements(config),
        },
        "weight_bytes": {form: cost.weight_bytes(config, form) for form in _FORMATS},
        "cache_bytes_per_token": cache,
        "cache_bytes": {kind: size * context for kind, size in cache.items()},
        "training_row": row,
        "flops_per_token": {
            "training": cost.flops_per_token(config, 0, queries=row, form="expanded", training=True, mtp=True),
            "decode_absorbed": cost.flops_per_token(config, context - 1, form="absorbed"),
            "decode_expanded": cost.flops_per_token(config, context - 1, form="expanded"),
        },
    }


def rows(plan: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The lines of the table, label and value, of what `facts` returned."""
    count, size, flops = plan["parameters"], plan["weight_bytes"], plan["flops_per_token"]
    lines = [("parameters", _count(count["total"]))]
    if count["mtp"]:
        lines.append(("  and in prediction modules (MTP)", _count(count["mtp"])))
        lines.append(("  in a checkpoint, with MTP's copies", _count(count["in_checkpoint"])))
    lines += [
        ("active per token", _count(count["active"])),
        ("  without the embedding table", _count(count["active_without_embedding"])),
        *((label, of_bytes(size[form])) for form, label in _FORMATS.items()),
    ]
    beyond = f", beyond the model's {plan['max_context']:,}" if plan["context"] > plan["max_context"] else ""
    lines.append((f"cache per token, and for {plan['context']:,} tokens{beyond}", ""))
    mla = plan["cache_bytes_per_token"]["mla"]
    for kind, label in _ATTENTIONS.items():
        if kind == "gqa8" and plan["cache_bytes"]["gqa8"] == plan["cache_bytes"]["mha"]:
            continue  # no more than eight heads
        each, whole = plan["cache_bytes_per_token"][kind], plan["cache_bytes"][kind]
        times = "" if kind == "mla" else f"   {each / mla:.1f} x MLA"
        lines.append((f"  {label}", f"{each:,} B   {of_bytes(whole)}{times}"))
    return (
        *lines,
        (f"training, per token in rows of {plan['training_row']:,}", _flops(flops["training"])),
        (f"decoding a token at {plan['context']:,}, absorbed", _flops(flops["decode_absorbed"])),
        ("  the same, expanding the cache each time", _flops(flops["decode_expanded"])),
    )


def _count(number: int) -> str:
    return f"{number:,} ({scaled(number, ('', ' K', ' M', ' B', ' T'))})"


def of_bytes(number: float) -> str:
    """1.37 TB."""
    return scaled(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _flops(number: float) -> str:
    return scaled(number, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def scaled(number: float, units: tuple[str, ...]) -> str:
    """Three to four digits and the largest unit that leaves something before the point."""
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 else 2 if number < 9.995 else 1
    return f"{number:,.{digits}f}{units[power]}"
