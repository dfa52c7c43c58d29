"""Engines to try, over models whose drafts are often right."""

from collections.abc import Sequence
from typing import Any

import torch

from cavelight.model.transformer import Transformer
from cavelight.run.engine import Engine, page_bytes
from cavelight.run.paged import PagedAttend, Span

from .run_models import drafting_model, small_config

LIMIT = 64


def model_of(modules: int, dtype: torch.dtype = torch.float64) -> Transformer:
    """Drafts of it are often right. In float64 rounding decides nothing, so that outputs can be compared."""
    config = small_config(num_nextn_predict_layers=modules, max_position_embeddings=LIMIT)
    return drafting_model(config, seed=2, surprise=0.25).to(dtype)


def engine_of(model: Transformer, pages: int = 40, page: int = 4, **options: Any) -> Engine:
    """An engine that may write to no page which another holds, or which is known."""
    memory = pages * page_bytes(model.config, page, model.lm_head.weight.dtype)
    engine = Engine(model, memory=memory, page=page, **({"budget": 64, "most": 12} | options))
    at, pool = engine.cache.at, engine.scheduler.pages

    def watched(spans: Sequence[Span], alone: bool = False) -> PagedAttend:
        for span in spans:
            for number in range(span.start // page, -(-span.end // page)):
                assert pool.holders[span.pages[number]] == 1 and not pool.is_known(span.pages[number])
        return at(spans, alone)

    engine.cache.at = watched  # type: ignore[method-assign]
    return engine
