"""What a run was made of when it began, so that what it is asked about later can be held against it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cavelight.data import needles
from cavelight.data.corpus import Corpus
from cavelight.disk import file_beside
from cavelight.spec.recipe import Recipe
from cavelight.train.checkpoints import saved_steps
from cavelight.train.state import RunFolder


@dataclass(frozen=True)
class Origin:
    """`corpora`: what each one held, by name (`Corpus.content`). `weights_step`: where the run stood whose weights this
    one began with; None if it began with others."""

    corpora: Mapping[str, str]
    weights_step: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, corpora: Mapping[str, Corpus]) -> "Origin":
        weights = recipe.model.weights
        # Ours are the same wherever they are written, and others for another row length.
        contents = {name: corpus.content for name, corpus in corpora.items() if name != needles.NAME}
        return cls(contents, newest_step(Path(weights)) if weights else None)

    @classmethod
    def read(cls, run: RunFolder) -> "Origin | None":
        """None for a run of an earlier version, or for none."""
        try:
            found = json.loads(run.origin.read_text(encoding="utf-8"))
            return cls(dict(found["corpora"]), found["weights_step"])
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def write(self, run: RunFolder) -> None:
        with file_beside(run.origin) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def newest_step(path: Path) -> int | None:
    """Of the saves of the run in `path`, or around it; None for a checkpoint that is no run's."""
    return max(saved_steps(RunFolder.of(path).saves), default=None)


def changed_texts(path: Path, corpora: Mapping[str, Corpus]) -> Iterator[str]:
    """A sentence for each of `corpora` that the run in `path`, or around it, met as another text or in other parts."""
    origin = Origin.read(run := RunFolder.of(path))
    for name, corpus in corpora.items():
        if origin and origin.corpora.get(name, corpus.content) != corpus.content:
            yield (
                f"{name} is not the text, or not divided as it was, that {run.path} began with: "
                "what is held out now may have been trained on"
            )
