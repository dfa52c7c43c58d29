"""What `import cavelight` offers: one call for each thing that people do with a model.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from cavelight.data.tokenizer import StreamDecoder, Tokenizer
from cavelight.disk import checkpoint_folder
from cavelight.model.transformer import Transformer
from cavelight.run.engine import Engine
from cavelight.run.generate import Drafts, generate_tokens
from cavelight.run.request import Request
from cavelight.run.rows import CacheDtype
from cavelight.run.sample import Sampling
from cavelight.run.text import TextStream, generate_text
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event
from cavelight.spec.presets import preset
from cavelight.spec.recipe import Recipe
from cavelight.train.loop import Result
from cavelight.train.loop import train as _train
from cavelight.weights.hub import local_folder
from cavelight.weights.snapshot import read_checkpoint, write_checkpoint

__all__ = [
    "Engine",
    "Request",
    "Sampling",
    "Transformer",
    "generate",
    "generate_tokens",
    "load",
    "preset",
    "read_config",
    "save",
    "train",
]


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    without_mtp: bool = False,
    packed: bool | None = None,
    mapped: bool | None = None,
    revision: str | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a Hugging Face directory (DeepSeek-V2 or -V3 layout), or of a run of `train`.

    path: a folder, or owner/name of a model on the Hugging Face hub, which is downloaded once; revision: its branch,
    tag or commit. dtype: of the weights; the checkpoint's own unless given. packed: keep packed matrices as they are
    stored, for running only; unless told, int8 and int4 are kept and block-fp8 is unpacked. mapped: False reads the
    weights into memory, instead of leaving them in their files where processes share them (for all three see
    weights.snapshot.read_checkpoint). without_mtp: leave the prediction modules out; needed where the configuration
    announces some that the files lack, as what transformers saves does.
    Raises UserError for anything missing, left over or broken.
    """
    folder = checkpoint_folder(local_folder(path, revision))
    model = read_checkpoint(folder, dtype, without_mtp=without_mtp, packed=packed, mapped=mapped)
    return model, Tokenizer.load(folder)


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path, *, shift_biases: bool | None = None) -> None:
    """Write a Hugging Face directory, MTP modules included. It appears complete or not at all.

    shift_biases: False leaves negative routing biases as they are, which some engines misread (see weights/bias.py).
    """
    write_checkpoint(model, path, tokenizer, shift_biases=shift_biases)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    mtp: bool = True,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    drafts: Drafts = "auto",
    cache: CacheDtype = "auto",
    stop_ids: Collection[int] | None = None,
) -> TextStream:
    """The text that follows `prompt`, piece by piece while it is made; `.stats` of what it returns tells how it went.

    mtp: let the model's prediction modules draft. Text is the same without: where layers are computed natively in any
    type; else in float32, greedy text always and sampled text but for a rare near-tie. stop: texts that end it. For the
    rest see run.sample.Sampling and run.generate.TokenStream.
    """
    return generate_text(
        model,
        tokenizer,
        StreamDecoder(tokenizer),
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stop=stop,
        stop_ids=stop_ids,
        drafts=drafts if mtp else 0,
        cache=cache,
    )


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in a config.json, or in the folder that holds one."""
    return ModelConfig.read(path)


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    resume: bool = False,
) -> Result:
    """Train what a recipe describes (a file, the name of one that comes along, or a Recipe) into the folder `out`.

    overrides: `section.key=value`. resume: go on from what `out` holds.
    """
    recipe = (
        Recipe.build(recipe.model_dump(), overrides) if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)
    )
    return _train(recipe, Path(out), on_event, resume)
