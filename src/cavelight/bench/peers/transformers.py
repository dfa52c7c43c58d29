"""transformers on the same checkpoint: prompts and decoding, as it does both by itself."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cavelight.bench import cases
from cavelight.bench.cases import LEAST, MOST, WARM, Case, Measured
from cavelight.bench.peers.subject import DEEPEST, check_same
from cavelight.doctor.witness import open_trunk, quiet_transformers, version
from cavelight.errors import UserError
from cavelight.run.generate import CHUNK
from cavelight.spec.config import ModelConfig
from cavelight.weights.files import abbreviated


class Transformers:
    """A checkpoint opened by transformers, with the attention and the experts that it chooses itself.

    Raises UserError where transformers is missing or refuses the checkpoint, where it would not compute the same model
    from the same weights, and where memory is too small for it beside ours.
    """

    name = "transformers"

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        check_same(self.name, config, dtype)
        self.vocabulary = config.vocab_size
        with quiet_transformers():
            opened = open_trunk(folder, config, dtype)
        if opened.missing:
            raise UserError(
                f"transformers does not find all weights in {folder}",
                got=abbreviated(opened.missing),
                why="it fills what is missing at random: that is another model",
                do="leave --against out; `cavelight doctor --against transformers` says more",
            )
        self.model, self.version = opened.model, version()

    def takes(self, case: Case) -> bool:
        return case.kind in ("prompt", "decoding") and case.batch == 1 and case.depth <= DEEPEST

    @torch.inference_mode()
    def measure(self, case: Case) -> Measured:
        """As `cases.measure`, but its past is computed. What it reads and computes is not counted."""
        source, seconds, ends = torch.Generator().manual_seed(0), list[float](), None
        past = self._run(None, case.depth, source) if case.depth else None
        while ends is None or len(seconds) < LEAST or (time.perf_counter() < ends and len(seconds) < MOST):
            if len(seconds) == WARM and ends is None:
                seconds, ends = [], time.perf_counter() + cases.SECONDS
            began = time.perf_counter()
            self._run(past, case.tokens, source)
            seconds.append(time.perf_counter() - began)
            if past is not None:
                past.crop(-case.tokens)
            if ends and case.once_is_enough(seconds[-1]):
                break
        return Measured(case, tuple(seconds), 0.0, 0.0)

    def _run(self, past: Any, tokens: int, source: torch.Generator) -> Any:
        """Tokens after a past, in chunks where they are many; the past with them."""
        past = past if past is not None else import_module("transformers").DynamicCache()
        for first in range(0, tokens, CHUNK):
            ids_BT = torch.randint(self.vocabulary, (1, min(CHUNK, tokens - first)), generator=source)
            past = self.model(ids_BT, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        return past
