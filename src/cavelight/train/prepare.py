"""From a recipe to tokens: corpus, tokenizer and token stores, each made once and kept until its inputs change."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cavelight.data.batches import TokenStore, tokenize
from cavelight.data.corpus import Corpus, Documents, read_corpus
from cavelight.data.tokenizer import RECIPE as RECIPE_OF_TOKENIZER
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.disk import folder_beside
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Note, Phase
from cavelight.spec.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """What the loop reads. `config` is the recipe's model with this tokenizer's special tokens."""

    config: ModelConfig
    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenStore
    held: TokenStore


def prepare(recipe: Recipe, on_event: Callable[[Event], None]) -> Prepared:
    corpus = read_corpus(recipe.data.corpus, recipe.data.held_out_every, recipe.data.text_key)
    on_event(Note(f"Corpus {corpus.name}: {corpus.train.size / 1e6:.1f} MB to learn from"))
    tokenizer = _tokenizer(recipe, corpus, on_event)
    if tokenizer.vocab_size > recipe.config.vocab_size:
        raise UserError(
            "The tokenizer does not fit the model",
            got=f"{tokenizer.vocab_size} tokens for a vocab_size of {recipe.config.vocab_size}",
            do=f"set model.vocab_size={tokenizer.vocab_size}, or choose another tokenizer",
        )
    config = recipe.config.replace(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )

    def store(part: Documents, split_line_ends: float) -> TokenStore:
        def progress(done: int, total: int) -> None:
            on_event(Phase("tokenising", done, total, "B"))

        return tokenize(part, tokenizer, cache_folder(), progress, split_line_ends=split_line_ends)

    train, held = store(corpus.train, recipe.data.split_line_ends), store(corpus.held, 0.0)
    return Prepared(config, corpus, tokenizer, train, held)


def cache_folder() -> Path:
    """Where tokenizers and token stores are kept: $CAVELIGHT_CACHE, or the user's cache folder."""
    chosen = os.environ.get("CAVELIGHT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cavelight"


def _tokenizer(recipe: Recipe, corpus: Corpus, on_event: Callable[[Event], None]) -> Tokenizer:
    """The one that the recipe names, or a byte-level BPE of the model's size trained on the corpus."""
    if recipe.data.tokenizer is not None:
        return Tokenizer.load(recipe.data.tokenizer)
    size = recipe.config.vocab_size
    made_of = (corpus.train.fingerprint, size, RECIPE_OF_TOKENIZER)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = cache_folder() / f"tokenizer-{key}"
    if not folder.is_dir():
        on_event(Note(f"Training a tokenizer of {size} tokens"))
        tokenizer = train_tokenizer((document.text for document in corpus.train), size)
        with folder_beside(folder) as scratch:
            tokenizer.save(scratch)
    return Tokenizer.load(folder)
