"""What changes in the course of a run: learning rate, rows a step, weight of the MTP loss, speed of the routing biases.

Pure functions of the recipe and of `progress`, the share of the run that is done before a step: from 0, and below 1.
"""

import math

from cavelight.spec.sections import Stage, TrainSection


def learning_rate(recipe: TrainSection, step: int, progress: float) -> float:
    """The rate of step `step` (from 0): a linear warm-up by steps, then the schedule's stages, each by its shape.

    The stages share the whole run, warm-up included, as the report counts its tokens (V3 report, section 4.2). At a
    border the later stage holds already.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    begin, before = 0.0, 1.0
    for stage in recipe.schedule:
        if progress < begin + stage.share:
            return recipe.learning_rate * _within(stage, before, (progress - begin) / stage.share)
        begin, before = begin + stage.share, stage.to
    return recipe.learning_rate * before


def _within(stage: Stage, before: float, done: float) -> float:
    """The height after a share `done` of a stage that begins at the height `before`."""
    if stage.shape == "constant":
        return stage.to
    left = 1 - done if stage.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return stage.to + (before - stage.to) * left


def rows(recipe: TrainSection, progress: float) -> int:
    """Rows of a step: from `ramp_from_rows` evenly to `rows_per_step` within `ramp_share` of the run.

    In whole micro-batches, rounded down. V3 grew from 3072 sequences to 15360 (V3 report, section 4.2).
    """
    first, last = recipe.ramp_from_rows, recipe.rows_per_step
    if first is None or progress >= recipe.ramp_share:
        return last
    grown = first + (last - first) * progress / recipe.ramp_share
    unit = recipe.rows_per_microbatch or last
    return int(grown / unit + 1e-9) * unit


def mtp_weight(recipe: TrainSection, progress: float) -> float:
    """lambda of the MTP loss: one value, and a later one from `mtp_late_from` on (V3 report, section 4.2)."""
    return recipe.mtp_weight if progress < recipe.mtp_late_from else recipe.mtp_weight_late


def bias_speed(recipe: TrainSection, progress: float) -> float:
    """gamma of the routing biases, which stand still from `bias_until` on (V3 report, section 4.2)."""
    return recipe.bias_speed if progress < recipe.bias_until else 0.0
