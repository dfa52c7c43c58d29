"""Pipeline schedules: how long devices stand idle, and what a schedule costs in memory (V3 report, table 2)."""

from dataclasses import dataclass

from cavelight.plan.layout import Schedule

NAMES: dict[Schedule, str] = {"1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe", "dualpipev": "DualPipeV"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Seconds of one micro-batch on one stage: forward, whole backward, and of it the weights' gradients.

    `pair` is a forward and a backward of different micro-batches run together, one's communication behind the other's
    computation; without overlap it is their sum.
    """

    forward: float
    backward: float
    weight: float
    pair: float

    @classmethod
    def of(cls, forward: float, backward: float, weight: float, pair: float | None = None) -> "Chunk":
        return cls(forward, backward, weight, forward + backward if pair is None else pair)


@dataclass(frozen=True, slots=True)
class Schedules:
    """One row of the report's table, for a number of stages. bubble: idle seconds a step.

    parameters: copies of its share that a device holds. activations: micro-batches' worth held at the peak, in stages'
    activations. devices: of a pipeline.
    """

    bubble: float
    parameters: int
    activations: int
    devices: int


def schedule(name: Schedule, stages: int, chunk: Chunk) -> Schedules:
    """What a schedule costs with so many stages; DualPipe's two need an even number of them."""
    F, B, W, pair = chunk.forward, chunk.backward, chunk.weight, chunk.pair
    if name == "1f1b":
        return Schedules((stages - 1) * (F + B), 1, stages, stages)
    if name == "zb1p":
        return Schedules((stages - 1) * (F + B - 2 * W), 1, stages, stages)
    bubble = (stages // 2 - 1) * (pair + B - 3 * W)
    return Schedules(bubble, 2, stages + 1, stages if name == "dualpipe" else stages // 2)


def step_seconds(name: Schedule, stages: int, chunk: Chunk, micro_batches: int) -> tuple[float, float]:
    """Seconds that a step of so many micro-batches per pipeline works and stands idle.

    DualPipe runs forward and backward as pairs; the others one after another, communication and all. The table's
    bubbles are those of a full pipeline: with few micro-batches a step still takes as long as one needs through all
    stages and back, where only the weights' gradients can wait.
    """
    F, B, W = chunk.forward, chunk.backward, chunk.weight
    if stages == 1:
        return micro_batches * (F + B), 0.0
    each = chunk.pair if name.startswith("dualpipe") else F + B
    # A DualPipeV device has two of the stages, so each micro-batch passes it twice; DualPipe's has two as well, but
    # half the micro-batches come from each end.
    passes = 2 if name == "dualpipev" else 1
    work = micro_batches * passes * each
    return work, max(schedule(name, stages, chunk).bubble, stages * (F + B - W) + W - work, 0.0)
