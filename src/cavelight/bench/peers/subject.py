"""What a peer is opened on, what makes it another model there, and how its failures are told."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cavelight.errors import UserError
from cavelight.memory import check_memory
from cavelight.model.transformer import Transformer
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import total_parameters
from cavelight.spec.formats import Format
from cavelight.weights.snapshot import write_checkpoint

DEEPEST = 4096  # that is measured of peers: they have to compute the past


@dataclass(frozen=True)
class Subject:
    """A model of ours, the checkpoint that it was read from, and a folder for what has to be written for a peer.

    checkpoint: None where the model came from nowhere, as a preset does.
    """

    model: Transformer
    checkpoint: Path | None
    scratch: Path

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    def folder(self) -> Path:
        """The checkpoint, written if there is none."""
        if self.checkpoint is not None:
            return self.checkpoint
        folder = self.scratch / "model"
        if not folder.exists():
            self.check_disk()
            write_checkpoint(self.model, folder)
        return folder

    def check_disk(self) -> None:
        """Raises UserError where the weights do not fit into the scratch folder."""
        needed, free = total_parameters(self.config) * self.dtype.itemsize, shutil.disk_usage(self.scratch).free
        if needed > free:
            raise UserError(
                f"The disk is too small to write the model for a peer into {self.scratch}",
                got=f"{free / 1e9:,.1f} GB free for {needed / 1e9:,.1f} GB",
                do="name a folder with more room as TMPDIR in the environment",
            )


def check_same(peer: str, config: ModelConfig, dtype: torch.dtype, kinds: Sequence[str] = ("plain",)) -> None:
    """Raises UserError where a peer would not compute the same model from the same weights, or for want of memory.

    kinds: of weights, as spec.formats names them, that the two compute with alike.
    """
    config.check_latent(f"--against {peer}")
    kind = Format.of(config.extra.get("quantization_config")).kind
    if kind not in kinds:
        raise UserError(
            f"Packed weights cannot be compared with {peer}",
            got=f"weights packed as {kind}",
            why="the two would compute with different weights, one of them with packed ones",
            do="convert it with `cavelight convert --to hf` and bench the result, or leave --against out",
        )
    check_memory(2 * total_parameters(config) * dtype.itemsize, "the model twice", "leave --against out")


def program_at(given: Path) -> str | None:
    """What was given as a program: a file, even one that is named without its folder, or else one on PATH."""
    return shutil.which(str(given.absolute())) or shutil.which(str(given))


def failed(program: str, said: str, status: int, asked: Sequence[str] = ()) -> UserError:
    """Of a peer's program: the last line of its stderr that names an error, or else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    got = (telling or lines or ["nothing said"])[-1]
    return UserError(
        f"{program} failed",
        got=f"{got:.300} (exit status {status})",
        do=f"run it by hand to see more: {' '.join(asked)}" if asked else "leave --against out",
    )
