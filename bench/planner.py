"""The planner against the V3 report's own arithmetic, and against what is published of serving and training.

python -m bench.planner writes docs/results/planner.md.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.provenance import commit, leave_with
from cavelight.disk import file_beside
from cavelight.plan import traffic
from cavelight.plan.devices import find, table
from cavelight.plan.layout import Layout
from cavelight.plan.memory import cache_row_bytes
from cavelight.plan.pipeline import NAMES, Chunk, schedule
from cavelight.plan.serving import Serving, best, smallest
from cavelight.plan.speed import decode, prefill
from cavelight.plan.training import Plan, train
from cavelight.plan.training import best as best_training
from cavelight.spec import cost
from cavelight.spec.presets import preset

V3 = preset("deepseek-v3")
H800, H100, H20, H200 = (find(name, table()) for name in ("H800", "H100-80GB", "H20", "H200"))
LAYOUT = Layout.of("dp=128,ep=64,pp=16,zero=1,recompute=selective,schedule=dualpipe").checked(V3)
ROW, ROWS = 4096, 15360  # of a training step
PER_TRILLION = 180e3  # H800 hours
LONG = (32_768, 1920), (131_072, 480)  # rows of the two context extensions, 1000 steps each
DEEPEP = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}  # µs


class Row(NamedTuple):
    """One comparison: what is published, what the planner says, in one unit."""

    what: str
    published: float
    planned: float
    unit: str = ""

    def cells(self) -> str:
        ratio = self.planned / self.published
        return (
            f"| {self.what} | {_number(self.published)}{self.unit} | {_number(self.planned)}{self.unit} | {ratio:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the planner with published figures.")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    options = parser.parse_args(arguments)
    called = shlex.join(["python", "-m", "bench.planner", *(sys.argv[1:] if arguments is None else arguments)])
    page = options.out / "planner.md"
    with file_beside(page) as scratch:
        scratch.write_text(report(called), encoding="utf-8")
    print(f"wrote {page}")
    return 0


def arithmetic() -> Iterator[Row]:
    """Figures that follow from the report's own numbers: the planner has to meet them."""
    caches = cost.cache_bytes_per_token(V3)
    yield Row("parameters, without MTP", 671e9, cost.total_parameters(V3))
    yield Row("parameters that a token activates", 37e9, cost.active_parameters(V3))
    yield Row("the same without the embedding table", 36.7e9, cost.active_parameters(V3, embedding=False))
    yield Row("elements of the checkpoint", 684_489_845_504, cost.checkpoint_elements(V3))
    yield Row("cache of a token in bf16", 70_272, caches.mla, " B")
    yield Row("the same with plain attention (MHA)", 3_997_696, caches.mha, " B")
    yield Row("cache of a token and layer in FlashMLA's fp8", 656, cache_row_bytes(V3, "fp8"), " B")
    yield Row("tokens of a training step", 62.9e6, ROW * ROWS)
    given = train(V3, H800, LAYOUT, row=ROW, sequences=ROWS, form="fp8", utilisation=report_utilisation())
    pretraining, rest = given.device_hours(14.8e12), 119e3 + 5e3
    yield Row("days for 10^12 tokens on 2048 H800, at the report's throughput", 3.7, given.days(1e12, 2048))
    yield Row("pre-training: H800 hours for 14.8 x 10^12 tokens", 2.664e6, pretraining)
    yield Row("H800 hours in all, with the report's 119K and 5K for the later stages", 2.788e6, pretraining + rest)
    yield Row("dollars in all, at $2 an hour", 5.576e6, (pretraining + rest) * H800.price)


def report_utilisation() -> float:
    """Share of the H800's bf16 peak that 180K hours for 10^12 tokens come to."""
    operations = cost.flops_per_token(V3, 0, queries=ROW, form="expanded", training=True, mtp=True)
    return operations * 1e12 / (PER_TRILLION * 3600) / H800.peak("bf16")


def bubbles() -> Iterator[str]:
    """The report's table of schedules for 16 stages and chunks of F, B, W, F&B = 1, 2, 0.8, 2.5, worked out by hand."""
    chunk, stages = Chunk(1.0, 2.0, 0.8, 2.5), 16
    by_hand = {
        "1f1b": ("15 x (1 + 2)", 45.0, "1x", "PP = 16", "16"),
        "zb1p": ("15 x (1 + 2 - 1.6)", 21.0, "1x", "PP = 16", "16"),
        "dualpipe": ("7 x (2.5 + 2 - 2.4)", 14.7, "2x", "PP + 1 = 17", "16"),
        "dualpipev": ("7 x (2.5 + 2 - 2.4)", 14.7, "2x", "PP + 1 = 17", "8"),
    }
    for name, title in NAMES.items():
        formula, idle, weights, activations, devices = by_hand[name]
        found = schedule(name, stages, chunk)
        planned = f"{found.bubble:.1f}, {found.parameters}x, {found.activations}, {found.devices}"
        yield f"| {title} | {formula} = {idle:.1f}, {weights}, {activations}, {devices} | {planned} |"


def estimates() -> Iterator[Row]:
    """Published speeds of whole systems beside the roofline's."""
    users = round(14_800 / 8 / 21)
    shown = decode(V3, H800, Layout.of("dp=144,ep=144,redundant=32"), context=4989, sequences=users, form="fp8")
    what = f"DeepSeek, decoding, EP144 on H800, 4,989 tokens, {users} users a device: tokens/s of one (20 to 22)"
    yield Row(what, 21, shown.per_sequence)
    wide = Layout.of("dp=32,ep=32,redundant=32")
    prompt = prefill(V3, H800, wide, context=4989, form="fp8")
    what = "DeepSeek, prefill, EP32 on H800, 73.7k less 56.3 % cache hits: tokens/s a node"
    yield Row(what, 73_700 * 0.437, 8 * prompt.per_device)
    unit = Layout.of("dp=72,ep=72,redundant=32")
    shown = decode(V3, H100, unit, context=2050, sequences=256, form="fp8")
    what = "SGLang, decoding, EP72 on H100, 2,000 tokens in, 256 users a device: tokens/s a node"
    yield Row(what, 22_300, 8 * shown.per_device)
    prompt = prefill(V3, H100, wide, context=2000, form="fp8")
    yield Row("SGLang, prefill, EP32 on H100, 2,000 tokens: tokens/s a node", 52_300, 8 * prompt.per_device)
    prompt = prefill(V3, H20, Layout.of("tp=8,ep=8"), context=4096, form="fp8")
    yield Row("SGLang, prefill, TP8 on H20, 4,096 tokens: tokens/s a node", 16_500, 8 * prompt.per_device)
    shown = decode(V3, H20, Layout.of("dp=16,ep=16"), context=4700, sequences=48, form="fp8")
    what = "SGLang, decoding, EP16 on H20 (48 users a device are our guess): tokens/s a node"
    yield Row(what, 5_700, 8 * shown.per_device)
    yield from here()
    hours = sum(extension(row, rows) for row, rows in LONG)
    yield Row("V3's extension to 128K contexts (cp=4 is our guess at its layout): H800 hours", 119e3, hours)


def here() -> Iterator[Row]:
    """The demo on the machine of docs/results/demo.md; its decoding without drafts set the fixed cost of a layer."""
    demo, machine = preset("demo"), find("CPU", table())
    trained = train(demo, machine, Layout(), row=256, sequences=4, form="fp32").per_device
    yield Row("our demo, training on 2 cores (3,300 to 4,500): tokens/s", 3_900, trained)
    drafted = decode(demo, machine, Layout(), context=256, sequences=1, form="fp32", cache="fp32", acceptance=322 / 403)
    yield Row("our demo, decoding with 80 % of drafts accepted: tokens/s", 125.7, drafted.per_sequence)


def extension(row: int, rows: int) -> float:
    """Device hours of 1000 steps with long rows, contexts split over four ranks."""
    layout = LAYOUT.with_(dp=32, cp=4)
    return train(V3, H800, layout, row=row, sequences=rows, form="fp8").device_hours(1000.0 * row * rows)


def exchange() -> Iterator[str]:
    """DeepEP's low-latency table (H800, 128 tokens, hidden 7168, top-8, fp8 out and bf16 back)."""
    for ep, (out, back) in DEEPEP.items():
        planned = [1e6 * traffic.low_latency(V3, H800, ep, 128, each) for each in (1, 2)]
        cells = (
            f"{out} | {planned[0]:.0f} | {planned[0] / out:.2f} | {back} | {planned[1]:.0f} | {planned[1] / back:.2f}"
        )
        yield f"| {ep} | {cells} |"


def choices() -> Iterator[str]:
    """What the planner chooses by itself, beside what was chosen by others."""
    memory = Plan(V3, H800, LAYOUT, ROW, ROWS, form="fp8").memory
    yield (
        f"- The report's training layout takes {memory.total / 1e9:.1f} GB of an H800's {H800.memory / 1e9:.1f} "
        "(`cavelight plan deepseek-v3 --device H800 --for train --layout ...`): it fits, as it did."
    )
    chosen = best_training(Plan(V3, H800, Layout(), ROW, ROWS, form="fp8"), 2048)
    same = "the report's" if chosen and chosen.layout == LAYOUT else f"the report's is `{LAYOUT}`"
    yield (
        "- Asked to train on 2,048 H800, with pp up to 16 and ep up to 64 to try, it chooses "
        f"`{chosen.layout if chosen else 'nothing'}`, {same}."
    )
    fewest = smallest(Serving(V3, H200, Layout(), 8192, "fp8"))
    yield (
        f"- Serving in fp8 takes at least {fewest.layout.devices if fewest else 'no'} H200; vLLM's recipe says 8. "
        "H100 and H800 have to be 16, as engines' guides say."
    )
    unit = best(Serving(V3, H800, Layout(), 4989, "fp8"), 144)
    yield f"- Asked for 144 H800 to decode on it chooses `{unit.layout if unit else 'nothing'}`, DeepSeek's own unit."


def report(called: str) -> str:
    """The page for docs/results."""
    heads = "| | published | planner | ratio |\n|---|--:|--:|--:|"
    fitted = train(V3, H800, LAYOUT, row=ROW, sequences=ROWS, form="fp8")
    share = report_utilisation()
    return "\n".join(
        [
            "# The planner against what is published",
            "",
            "## The report's own arithmetic",
            "",
            heads,
            *(row.cells() for row in arithmetic()),
            "",
            "The report's throughput, 180K H800 hours for 10^12 tokens, is",
            f"{share:.1%} of the H800's dense bf16 peak or {share / 2:.1%} of its fp8 peak, counting MTP and no",
            "recomputation. Given as `--utilisation` it leads to the rows above. Without, the planner estimates",
            "training from kernels, links and bubbles times one factor, `TRAINING` in `plan/training.py`, which is",
            f"fitted to this one figure; then it says {fitted.device_hours(1e12):,.0f} hours, {fitted.bubble:.1%}",
            "of them bubbles.",
            "",
            "Pipeline schedules, 16 stages, chunks of F, B, W, F&B = 1, 2, 0.8, 2.5:",
            "",
            "| | report: bubble, weights, activations, devices | planner |",
            "|---|---|---|",
            *bubbles(),
            "",
            "## Speeds of whole systems",
            "",
            "A roofline without overlap, from data sheets and from what the best kernels reach of them. No constant",
            "was fitted to these figures; that nothing overlaps and that activations' traffic counts was decided with",
            "SGLang's two H100 rows in view.",
            "",
            heads,
            *(row.cells() for row in estimates()),
            "",
            "DeepSeek's are means over a day with busy and quiet hours (open-infra-index). Its users a device are not",
            "published: 14.8k tokens/s a node at 21 a user make 88. SGLang's are LMSYS's posts of 2025-05-05 and",
            "2025-09-26; the 256 users a device of the first are from memory.",
            "",
            "## Experts' all-to-all",
            "",
            "DeepEP's low-latency kernels (H800, 128 tokens, fp8 out, bf16 back), microseconds. The two fixed costs in",
            "`plan/traffic.py` were chosen on this table; the bandwidths are the report's.",
            "",
            "| EP | dispatch | planner | ratio | combine | planner | ratio |",
            "|--:|--:|--:|--:|--:|--:|--:|",
            *exchange(),
            "",
            "## What it chooses",
            "",
            *choices(),
            "",
            f"Command: `{called}`  ",
            f"Commit: {commit()}",
            "",
        ]
    )


def _number(value: float) -> str:
    if value < 100:
        return f"{value:.3g}"
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if value >= 10 * size:
            return f"{value / size:,.4g}{unit}"
    return f"{value:,.0f}"


if __name__ == "__main__":
    leave_with(main)
