"""The process of one run: a job comes on stdin, its events go out on stdout. python -m cavelight.experiment.worker"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable

import torch

from cavelight.disk import file_beside
from cavelight.errors import UserError
from cavelight.experiment.catalogue import entry
from cavelight.experiment.runs import FOUND, Job
from cavelight.spec.cost import active_parameters, total_parameters
from cavelight.spec.events import Event, Note
from cavelight.train.loop import train
from cavelight.train.optim import pick_dtype
from cavelight.train.prepare import read_corpora
from cavelight.train.provenance import commit, machine
from cavelight.train.state import RunFolder

FAILED, STOPPED = 2, 130


def main() -> int:
    """Leaves with 0 when the run is finished and read, 2 after a mistake of the user's, 130 when it was stopped."""
    torch.set_num_threads(1)
    said, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever a library prints is no event

    def say(event: Event | UserError) -> None:
        pickle.dump(event, said)
        said.flush()

    job: Job = pickle.load(sys.stdin.buffer)
    try:
        return 0 if make(job, say) else STOPPED
    except UserError as error:
        say(error)
        return FAILED


def make(job: Job, say: Callable[[Event], None]) -> bool:
    """Train, or go on with it; then read what the experiment wants to know. False where it was told to stop."""
    folder, measure = RunFolder(job.folder), entry(job.study).measure
    result = train(job.recipe, job.folder, say, resume=folder.holds_a_run)
    if result.interrupted:
        return False
    config = job.recipe.config
    found = {
        "bits_per_byte": result.bits_per_byte,
        "parameters": total_parameters(config),
        "active_parameters": active_parameters(config, embedding=False),
        "tokens": result.tokens,
        "seconds": result.seconds,
        "text": [corpus.fingerprint for corpus in read_corpora(job.recipe.data).values()],
        "commit": commit(),
        "machine": machine(pick_dtype(job.recipe.train.dtype)),
        **measure(job.recipe, folder, say),
    }
    with file_beside(job.folder / FOUND) as scratch:
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder.saves, ignore_errors=True)  # a finished run goes nowhere from them, and they are large
    say(Note(f"{job.label}: {result.bits_per_byte:.4f} bits per byte on held-out text"))
    return True


if __name__ == "__main__":
    sys.exit(main())
