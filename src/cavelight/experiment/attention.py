"""(a) MLA against MHA, GQA and MQA of equal parameter count: loss against cache bytes a token."""

from pathlib import Path

from cavelight.experiment import pictures
from cavelight.experiment.page import plus_minus, signed, verdict
from cavelight.experiment.study import Outcome, Told, Variant, bits
from cavelight.see import style
from cavelight.spec.cost import stored_bytes_per_token, total_parameters


def tell(outcome: Outcome) -> Told:
    latent, *others = outcome.study.variants
    head = (
        "",
        "key-value heads x width",
        "parameters",
        "cache bytes a token",
        "bits per byte",
        f"less {latent.label}'s",
    )
    rows = []
    for variant in outcome.study.variants:
        difference = "" if variant is latent else signed(outcome.difference(variant.key, bits))
        rows.append(
            (
                variant.label,
                _shape(variant),
                f"{total_parameters(variant.config, mtp=True):,}",
                f"{stored_bytes_per_token(variant.config):,}",
                plus_minus(outcome.of(variant.key, bits)),
                difference,
            )
        )
    said = []
    for variant in others:
        share = stored_bytes_per_token(latent.config) / stored_bytes_per_token(variant.config)
        sentence = verdict(outcome.difference(variant.key, bits), variant.label, latent.label, "bits per byte")
        said.append(f"{sentence} {latent.label}'s cache has {share:.2f} of its size.")
    return Told((head, *rows), said)


def draw(outcome: Outcome, path: Path) -> None:
    with style.sheet(path, 5.6, 3.7) as figure:
        style.heading(figure, outcome.study.title, ["equal numbers of parameters", pictures.ERRORS])
        axes = style.panel(figure, 0.65, 1.05, 4.4, 2.1)
        style.entitle(axes, "Held-out text", "bits per byte")
        everything = []
        for variant, color in zip(outcome.study.variants, pictures.COLORS, strict=False):
            x, found = stored_bytes_per_token(variant.config), outcome.of(variant.key, bits)
            pictures.mark(axes, x, outcome.values(variant.key, bits), found, color)
            pictures.name(axes, x, found.mean, variant.label, color)
            everything += outcome.values(variant.key, bits)
        pictures.room(axes, everything)
        axes.set_xscale("log", base=2)
        sizes = [stored_bytes_per_token(variant.config) for variant in outcome.study.variants]
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.45)
        axes.set_xticks(sorted(set(sizes)), [f"{size:,}" for size in sorted(set(sizes))])
        axes.minorticks_off()
        axes.set_xlabel("cache, bytes a token (bf16, logarithmic)", fontsize=8)


def _shape(variant: Variant) -> str:
    config = variant.config
    if config.num_key_value_heads is None:
        return f"latent {config.kv_lora_rank} + rotary {config.qk_rope_head_dim}"
    return f"{config.num_key_value_heads} x {config.v_head_dim}"
