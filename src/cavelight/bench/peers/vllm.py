"""vLLM on the same checkpoint, in a process of its own: its interpreter may be another one, with another torch."""

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from cavelight.bench import cases
from cavelight.bench.cases import LEAST, MOST, Case, Measured
from cavelight.bench.peers import vllm_child
from cavelight.bench.peers.subject import DEEPEST, Subject, check_same, failed, program_at
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.cost import stored_bytes_per_token

GENERATED = 16  # steps of a decoding that are timed: it cannot stay at one depth
CACHE = 4  # GiB that it may take for its cache
SHOWN, APART = 64, 0.2  # tokens that both look at first, and how far apart the two may be, of the spread
PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


class Vllm:
    """A child that has opened the checkpoint once, and measures a case when it is asked to; a context manager.

    It gets as many threads as torch has and 4 GiB for its cache, and sees no GPU; attention, batches and compilation
    are what it chooses itself. Raises UserError where it cannot open the model, or computes another one.

    Letters: T tokens, t all of them but the first, V vocabulary.
    """

    name = "vLLM"

    def __init__(self, subject: Subject, program: Path) -> None:
        config, self.vocabulary = subject.config, subject.config.vocab_size
        check_same(self.name, config, subject.dtype)
        self.context = min(config.max_position_embeddings, room(config, subject.dtype) // 2)
        self.room = room(config, subject.dtype)
        self.said = subject.scratch / "vllm.txt"
        asked = {
            "model": str(subject.folder().resolve()),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "context": self.context,
            "vocabulary": config.vocab_size,
        }
        # Not as a file: Python would look beside it first, where other modules are called vllm and transformers.
        command = [str(program), "-c", inspect.getsource(vllm_child)]
        pipe, ours = subprocess.PIPE, os.environ | surroundings()
        with open(self.said, "w") as said:
            self.child = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=said,
                text=True,
                errors="replace",
                env=ours,
                cwd=subject.scratch,
            )
        try:
            ready = self._ask(asked, version=str, sequences=int, budget=int)
            self.version, self.sequences = str(ready["version"]), int(ready["sequences"])
            self.budget = int(ready["budget"])  # tokens of a step
            self._check_agrees(subject)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def takes(self, case: Case) -> bool:
        """Within the sequences and the room of its cache."""
        length = case.depth + case.tokens + self._new(case)
        fits = length <= self.context and case.batch * length <= self.room and case.batch <= self.sequences
        return fits and case.kind in ("prompt", "decoding") and case.depth <= DEEPEST

    def measure(self, case: Case) -> Measured:
        """As `cases.measure`, but its past is computed, before the time that counts, and grows with every step."""
        if case.kind == "prompt":
            asked = {"kind": "prompt", "tokens": case.tokens, "least": LEAST, "most": MOST, "seconds": cases.SECONDS}
        else:
            new = self._new(case)
            asked = {"kind": "decoding", "depth": case.depth, "batch": case.batch, "steps": GENERATED, "new": new}
        return Measured(case, tuple(self._ask(asked, found=list)["found"]), 0.0, 0.0)

    def _new(self, case: Case) -> int:
        """Tokens of each sequence, so that there are enough steps of all: the first ones do not wait for the others."""
        waiting = case.batch * case.depth if case.batch > 1 else 0
        return GENERATED + vllm_child.WARM + 1 + math.ceil(waiting / max(1, self.budget - case.batch))

    def _check_agrees(self, subject: Subject) -> None:
        """Raises UserError unless it gives random tokens much the same probabilities as we do.

        Not compiled, vLLM 0.32 for processors rotates plain RoPE wrongly (and YaRN's rightly).
        """
        ids_T = torch.randint(self.vocabulary, (SHOWN,), generator=torch.Generator().manual_seed(0))
        theirs_t = torch.tensor(self._ask({"kind": "likelihoods", "ids": ids_T.tolist()}, found=list)["found"])
        with torch.inference_mode():
            logs_TV = subject.model.logits(ids_T).float().log_softmax(-1)
        ours_t = logs_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        apart, spread = float((theirs_t - ours_t).abs().mean()), float(ours_t.std())
        if not apart < APART * spread:
            raise UserError(
                "vLLM does not compute this model as we do",
                got=f"log probabilities of random tokens that are {apart:.2g} apart and spread by {spread:.2g}",
                why="the speed of another model says nothing",
                do="try another version of vLLM, or leave --against out",
            )

    def close(self) -> None:
        """End the child."""
        self.child.kill()
        self.child.communicate()

    def _ask(self, asked: Mapping[str, Any], **wanted: type) -> dict[str, Any]:
        """The answer. Raises UserError where there is none, or not all in it that is `wanted`."""
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            print(json.dumps(asked), file=self.child.stdin, flush=True)
            answer = self.child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.child.wait()
            raise failed("vLLM", self.said.read_text(errors="replace"), status)
        try:
            found = json.loads(answer)
            assert all(found[key] and isinstance(found[key], kind) for key, kind in wanted.items())
        except (ValueError, TypeError, KeyError, AssertionError):
            raise UserError(
                "vLLM's interpreter does not answer as it should",
                got=f"{answer.strip()[:200]!r}",
                why=f"a line with {', '.join(wanted)} was expected",
                do="name the python of an environment that has vLLM with --peer PATH",
            ) from None
        return dict(found)


def room(config: ModelConfig, dtype: torch.dtype) -> int:
    """Tokens of the trunk that its cache has room for."""
    return int((CACHE << 30) // stored_bytes_per_token(config, dtype.itemsize))


def surroundings() -> dict[str, str]:
    """What the child finds in its environment beside ours."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are timed in the process that makes them
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": "",  # ours is not its
    }


def find(given: Path | None) -> Path:
    """The interpreter that has vLLM: the one given, or this one. Raises UserError where it has none."""
    program = program_at(given or Path(sys.executable))
    do = "install vLLM for processors in an environment of its own, and name its python with --peer PATH"
    if program is None:
        raise UserError("There is no interpreter to run vLLM with", got=f"{given}, which is no program", do=do)
    try:
        ended = subprocess.run([program, "-c", PROBE], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} cannot be run", got=str(error), do=do) from error
    if ended.returncode:
        got = ended.stderr.strip().splitlines()[-1:] or ["no module named vllm"]
        raise UserError(f"{program} has no vLLM", got=got[0], do=do)
    return Path(os.path.abspath(program))  # as it is called: an environment's python is a link
