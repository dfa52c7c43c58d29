"""A short training run as text: losses, gradient norm and expert counts of 20 steps of the `nano` preset.

`python -m tests.golden --write` rewrites tests/golden/nano.txt; a person reads the diff. The test compares.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cavelight.data.batches import Batches
from cavelight.data.mixture import Mixture
from cavelight.data.store import TokenStore
from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.spec.sections import Stage, TrainSection
from cavelight.train.optim import Optimizer, initialise
from cavelight.train.step import train_step
from cavelight.train.workers import ALONE, Workers

FILE = Path(__file__).parent / "golden" / "nano.txt"
STEPS = 20
RECIPE = TrainSection(
    steps=STEPS,
    init_std=0.05,
    learning_rate=3e-3,
    warmup_steps=5,
    schedule=(Stage(share=1.0, to=0.1, shape="cosine"),),
    mtp_weight_late=0.3,
    bias_speed=0.01,
    bias_until=1.0,
)


def some_documents(documents: int = 40, length: int = 60, vocabulary: int = 512) -> TokenStore:
    """Made-up documents in which a token depends on the one before it, so that there is something to learn."""
    draws = np.random.PCG64(7).random_raw(documents * length).reshape(documents, length)
    tokens = np.zeros((documents, length), np.uint16)
    for i in range(1, length):
        tokens[:, i] = (tokens[:, i - 1] * 5 + draws[:, i] % 4 + 3) % vocabulary
    tokens[:, 0], tokens[:, -1] = 0, 1
    starts = np.arange(documents + 1, dtype=np.int64) * length
    return TokenStore(tokens.reshape(-1), starts, np.full(documents, 3 * length, np.int64))


def trajectory(workers: Workers = ALONE) -> Iterator[str]:
    """A heading, then a line a step."""
    model = Transformer(preset("nano"))
    initialise(model, RECIPE.init_std, RECIPE.seed)
    optimizer = Optimizer(model, RECIPE)
    batches = Batches(Mixture((some_documents(),)), row_length=48, depths=1, seed=0, mask_documents=True)
    yield "step    loss     mtp      balance  gradient  tokens of each expert, a layer a group"
    for step in range(STEPS):
        micro_batches = [batches.rows(4 * step, 2), batches.rows(4 * step + 2, 2)]
        result = train_step(model, optimizer, micro_batches, RECIPE, step, step / STEPS, workers)
        counts = "  ".join(" ".join(f"{n:2d}" for n in counts_E.tolist()) for counts_E in result.counts)
        losses = f"{result.loss:.5f}  {result.mtp_loss:.5f}  {result.balance_loss:.5f}  {result.grad_norm:.5f}"
        yield f"{step:4d}  {losses}   {counts}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.golden --write")
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(trajectory()) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
