"""`cavelight eval`: bits per byte of a checkpoint on the held-out part of a corpus."""

import time
from pathlib import Path

from cavelight.cli.generation import load
from cavelight.cli.progress import screen
from cavelight.cli.screen import OUT, duration, say_json
from cavelight.spec.events import Phase
from cavelight.spec.sections import DataSection

ROW_LENGTH = 512  # tokens of context at most, for checkpoints that come without the recipe of their run


def evaluate(path: Path, corpus: str | None, dtype: str, without_mtp: bool, as_json: bool) -> None:
    """The run's own corpus and row length unless `corpus` names another; the standard library where there is no run."""
    model, tokenizer = load(path, dtype, without_mtp)

    import torch

    from cavelight.data.batches import tokenize
    from cavelight.data.corpus import read_corpus
    from cavelight.train.evaluate import held_out_bits_per_byte
    from cavelight.train.prepare import cache_folder
    from cavelight.train.state import RunFolder
    from cavelight.train.workers import Workers

    run = RunFolder(path)
    recipe = run.read_recipe() if run.recipe.is_file() else None
    spec = corpus or (recipe.data.corpus if recipe else "stdlib")
    row_length = recipe.data.row_length if recipe else min(ROW_LENGTH, model.config.max_position_embeddings)
    data = recipe.data if recipe and not corpus else DataSection()
    held = read_corpus(spec, data.held_out_every, data.text_key).held
    began = time.monotonic()
    with screen(f"{path} on held-out text of {spec}", as_json) as listen:
        store = tokenize(
            held, tokenizer, cache_folder(), lambda done, total: listen(Phase("tokenising", done, total, "B"))
        )
        bits = held_out_bits_per_byte(model, store, row_length, None, listen, Workers(torch.get_num_threads()))
    size, seconds = int(store.bytes_M.sum()), time.monotonic() - began
    if as_json:
        say_json({"kind": "result", "bits_per_byte": bits, "bytes": size, "tokens": len(store), "seconds": seconds})
        return
    OUT.print(f"[bold]{bits:.4f} bits per byte[/] on {size:,} bytes ({len(store):,} tokens), in {duration(seconds)}")
