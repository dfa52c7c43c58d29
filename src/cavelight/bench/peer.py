"""transformers on the same checkpoint: prompts and decoding, as it does both by itself."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cavelight.bench.cases import LEAST, MOST, SECONDS, WARM, Case, Measured
from cavelight.doctor.witness import REFUSALS, quiet_transformers
from cavelight.errors import UserError
from cavelight.run.generate import CHUNK
from cavelight.spec.config import ModelConfig

DEEPEST = 4096  # that is measured: it has to compute the past, and expands it for every token


class Transformers:
    """A checkpoint opened by transformers, with the attention and the experts that it chooses itself.

    Raises UserError where transformers is missing or refuses the checkpoint.
    """

    name = "transformers"

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        self.vocabulary = config.vocab_size
        kind = "DeepseekV3ForCausalLM" if config.model_type == "deepseek_v3" else "DeepseekV2ForCausalLM"
        with quiet_transformers():
            try:
                opened: Any = getattr(import_module("transformers"), kind).from_pretrained(folder, dtype=dtype)
            except REFUSALS as error:
                raise UserError(f"transformers cannot open {folder}", got=" ".join(str(error).split())[:240]) from error
        self.model = opened.eval()

    def takes(self, case: Case) -> bool:
        return case.batch == 1 and case.depth <= DEEPEST and (case.tokens == 1 or case.depth == 0)

    @torch.inference_mode()
    def measure(self, case: Case) -> Measured:
        """As `cases.measure`, but its past is computed. What it reads and computes is not counted."""
        source, seconds, ends = torch.Generator().manual_seed(0), list[float](), None
        past = self._run(None, case.depth, source) if case.depth else None
        while ends is None or len(seconds) < LEAST or (time.perf_counter() < ends and len(seconds) < MOST):
            if len(seconds) == WARM and ends is None:
                seconds, ends = [], time.perf_counter() + SECONDS
            began = time.perf_counter()
            self._run(past, case.tokens, source)
            seconds.append(time.perf_counter() - began)
            if past is not None:
                past.crop(-case.tokens)
            if ends and case.tokens > CHUNK and seconds[-1] > SECONDS:
                break
        return Measured(case, tuple(seconds), 0.0, 0.0)

    def _run(self, past: Any, tokens: int, source: torch.Generator) -> Any:
        """Tokens after a past, in chunks where they are many; the past with them."""
        past = past if past is not None else import_module("transformers").DynamicCache()
        for first in range(0, tokens, CHUNK):
            ids_BT = torch.randint(self.vocabulary, (1, min(CHUNK, tokens - first)), generator=source)
            past = self.model(ids_BT, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        return past
