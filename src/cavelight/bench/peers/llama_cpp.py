"""llama.cpp on the same weights, by its own `llama-bench`: a process for each case, in turn with ours."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from cavelight.bench import cases
from cavelight.bench.cases import LEAST, MOST, Case, Measured
from cavelight.bench.peers.gguf import check_known, write_gguf
from cavelight.bench.peers.subject import DEEPEST, Subject, check_same, failed, program_at
from cavelight.errors import UserError

PROGRAM = "llama-bench"
NEEDED = ("--n-depth", "--device", "--output")  # options that older ones lack
GENERATED = 16  # tokens of a decoding that is timed: it cannot stay at one depth


class LlamaCpp:
    """llama-bench on a GGUF file of the model, written for it, with as many threads as torch has.

    The attention, the batches and the numbers of the cache (float16) are those it chooses itself; it is kept off
    other devices than the processor. Raises UserError for a model that it would compute otherwise or not at all.
    """

    name = "llama.cpp"

    def __init__(self, subject: Subject, program: Path) -> None:
        check_same(self.name, subject.config, subject.dtype, ("plain", "fp8"))  # those of fp8 we unpack ourselves
        check_known(subject.config)
        subject.check_disk()
        self.program, self.file = program, subject.scratch / "model.gguf"
        write_gguf(subject.model, self.file)
        self.version = ""
        self._run(Case("prompt", 0), 1)  # tells now, not after others were measured, whether it opens the file

    def takes(self, case: Case) -> bool:
        return case.kind in ("prompt", "decoding") and case.batch == 1 and case.depth <= DEEPEST

    def measure(self, case: Case) -> Measured:
        """As `cases.measure`, but its past is computed, before the time that counts; decoding is a mean of some tokens.

        Of a prompt it asks for one token, as we do.
        """
        seconds = self._run(case, LEAST if case.kind == "decoding" else 1)
        if case.kind == "prompt" and not case.once_is_enough(seconds[0]):
            seconds = self._run(case, min(MOST, max(LEAST, int(cases.SECONDS / seconds[0]))))
        return Measured(case, seconds, 0.0, 0.0)

    def _run(self, case: Case, times: int) -> tuple[float, ...]:
        """Seconds of a step, `times` times, after it has warmed up."""
        prompt, generated = (0, GENERATED) if case.kind == "decoding" else (case.tokens, 0)
        lengths = {"-p": prompt, "-n": generated, "-d": case.depth}
        options = {"-m": self.file, **lengths, "-r": times, "-t": torch.get_num_threads(), "-ngl": 0, "-dev": "none"}
        command = [str(self.program), *(str(part) for pair in options.items() for part in pair), "-o", "json"]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if ended.returncode:
            raise failed(PROGRAM, ended.stderr, ended.returncode, command)
        found = self._answer(ended.stdout, command)
        self.version = f"{found.get('build_commit', '?')} ({found.get('build_number', '?')})"
        return tuple(nanoseconds / 1e9 / max(1, generated) for nanoseconds in found["samples_ns"])

    def _answer(self, text: str, command: list[str]) -> dict[str, Any]:
        """The one result in its JSON."""
        try:
            (found,) = json.loads(text)
            assert found["samples_ns"] and all(nanoseconds > 0 for nanoseconds in found["samples_ns"])
        except (ValueError, TypeError, KeyError, AssertionError):
            raise UserError(
                f"{self.program} does not answer as llama-bench does",
                got=f"{text.strip()[:200]!r}",
                why="a list of one result with samples_ns was expected",
                do=f"run it by hand to see more: {' '.join(command)}",
            ) from None
        return dict(found)


def find(given: Path | None) -> Path:
    """llama-bench: the file given, or the one on PATH. Raises UserError if there is none, or an old one."""
    found = program_at(given) if given else shutil.which(PROGRAM)
    if found is None:
        raise UserError(
            f"There is no {PROGRAM}",
            got=f"{given}, which is no program" if given else "nothing of that name on PATH",
            why="llama.cpp is measured by its own program",
            do="build llama.cpp and name the program with --peer PATH",
        )
    try:
        ended = subprocess.run([found, "--help"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{found} cannot be run", got=str(error), do=f"name {PROGRAM} with --peer PATH") from error
    if ended.returncode:
        raise failed(found, ended.stderr, ended.returncode, [found, "--help"])
    lacking = [option for option in NEEDED if option not in ended.stdout + ended.stderr]
    if lacking:
        raise UserError(
            f"{found} is too old, or no {PROGRAM}",
            got=f"a program without {', '.join(lacking)}",
            do="build a newer llama.cpp and name its llama-bench with --peer PATH",
        )
    return Path(found)
