"""(f) First dense layers, the shared expert, the number of experts: at equal active size."""

from collections.abc import Callable
from pathlib import Path

from cavelight.experiment import pictures
from cavelight.experiment.page import plus_minus, signed, verdict
from cavelight.experiment.study import Outcome, Told, Variant, bits
from cavelight.see import style
from cavelight.see.style import AMBER, BLUE
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import active_parameters, total_parameters

# A panel for each choice: its title, and which number of a configuration it turns.
PANELS: tuple[tuple[str, Callable[[ModelConfig], int], str], ...] = (
    ("First layers dense", lambda config: config.first_k_dense_replace, "dense"),
    ("Shared experts", lambda config: config.n_shared_experts or 0, "shared"),
    ("Routed experts", lambda config: config.n_routed_experts or 0, "experts"),
)


def tell(outcome: Outcome) -> Told:
    base, *others = outcome.study.variants
    head = ("", "parameters", "active", "bits per byte", "less the base's", "steps a minute and core")
    rows = []
    for variant in outcome.study.variants:
        pace = outcome.of(variant.key, lambda run: 60 * len(run.series.step_P) / max(run.series.seconds, 1e-9))
        rows.append(
            (
                variant.label,
                f"{total_parameters(variant.config):,}",
                f"{active_parameters(variant.config, embedding=False):,}",
                plus_minus(outcome.of(variant.key, bits)),
                "" if variant is base else signed(outcome.difference(variant.key, bits)),
                f"{pace.mean:.0f}",
            )
        )
    said = [
        verdict(outcome.difference(variant.key, bits), variant.label, "the base", "bits per byte") for variant in others
    ]
    return Told((head, *rows), said)


def draw(outcome: Outcome, path: Path) -> None:
    with style.sheet(path, 9.0, 3.4) as figure:
        style.heading(figure, outcome.study.title, ["equal active size", pictures.ERRORS])
        everything = [value for variant in outcome.study.variants for value in outcome.values(variant.key, bits)]
        for (title, number, key), left, width in zip(PANELS, (0.65, 3.75, 6.05), (2.2, 1.5, 2.6), strict=True):
            axes = style.panel(figure, left, 1.05, width, 1.9)
            style.entitle(axes, title, "bits per byte" if left < 1 else "")
            shown = sorted(_of(outcome, key), key=lambda variant: number(variant.config))
            pictures.columns(
                axes,
                [str(number(variant.config)) for variant in shown],
                [outcome.values(variant.key, bits) for variant in shown],
                [outcome.of(variant.key, bits) for variant in shown],
                [AMBER if variant is outcome.study.variants[0] else BLUE for variant in shown],
            )
            pictures.room(axes, everything)


def _of(outcome: Outcome, key: str) -> list[Variant]:
    """The base and the variants that turn this choice."""
    return [variant for variant in outcome.study.variants if variant.key == "base" or variant.key.startswith(key)]
