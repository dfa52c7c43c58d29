"""From a recipe to tokens: corpora, tokenizer and token stores, each made once and kept until its inputs change."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cavelight.data import needles
from cavelight.data.corpus import Corpus, Documents, file_identity, read_corpus, warn_once
from cavelight.data.encode import Manner
from cavelight.data.mixture import Mixture
from cavelight.data.store import TokenStore
from cavelight.data.tokenising import AS_WRITTEN, joined, tokenize
from cavelight.data.tokenizer import RECIPE as RECIPE_OF_TOKENIZER
from cavelight.data.tokenizer import Tokenizer, train_tokenizer
from cavelight.disk import cache_folder, checkpoint_folder, folder_beside
from cavelight.errors import UserError
from cavelight.spec.config import ModelConfig
from cavelight.spec.events import Event, Note, Phase
from cavelight.spec.recipe import Recipe
from cavelight.spec.sections import DataSection

SAMPLE_BYTES = 256 << 20  # of text that a tokenizer is trained on at most; a larger corpus is sampled all over


@dataclass(frozen=True)
class Prepared:
    """What the loop reads. `config` is the recipe's model with this tokenizer's special tokens.

    `corpora` are the sources by name; `train` draws from them by their weights. `held` is all held-out text, `held_of`
    that of each source.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    corpora: dict[str, Corpus]
    train: Mixture
    held: TokenStore
    held_of: dict[str, TokenStore]


def prepare(recipe: Recipe, on_event: Callable[[Event], None]) -> Prepared:
    corpora = read_corpora(recipe.data)
    for name, corpus in corpora.items():
        on_event(Note(f"Corpus {name}: {corpus.train.size / 1e6:.1f} MB to learn from"))
    weights = tuple(source.weight for source in recipe.data.sources)
    tokenizer = _tokenizer(recipe, list(zip(corpora.values(), weights, strict=True)), on_event)
    if tokenizer.vocab_size > recipe.config.vocab_size:
        raise UserError(
            "The tokenizer does not fit the model",
            got=f"{tokenizer.vocab_size} tokens for a vocab_size of {recipe.config.vocab_size}",
            do=f"set model.vocab_size={tokenizer.vocab_size}, or choose another tokenizer",
        )
    config = recipe.config.replace(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )
    manner = Manner(recipe.data.split_line_ends, recipe.data.fim_rate)
    train = tuple(_store(corpus.train, tokenizer, manner, on_event) for corpus in corpora.values())
    held, held_of = held_out(corpora, tokenizer, on_event)
    return Prepared(config, tokenizer, corpora, Mixture(train, weights), held, held_of)


def read_corpora(data: DataSection) -> dict[str, Corpus]:
    """The recipe's sources, in its order, by names of their own. "needles" is written for rows of this length."""
    corpora: dict[str, Corpus] = {}
    for number, source in enumerate(data.sources, 1):
        spec = str(needles.corpus(cache_folder(), data.row_length)) if source.corpus == needles.NAME else source.corpus
        corpus = read_corpus(spec, data.held_out_every, source.text_key)
        corpora[source.corpus if source.corpus not in corpora else f"{source.corpus} ({number})"] = corpus
    _warn_of_overlaps(corpora)
    return corpora


def _warn_of_overlaps(corpora: dict[str, Corpus]) -> None:
    """Say aloud where two sources have a file, but not under one name, as one kind and by one rule."""
    met: dict[tuple[int, int], tuple[str, object]] = {}
    for name, corpus in corpora.items():
        for source in corpus.train.sources:
            division = (source.name, source.kind, corpus.train.rule)
            other, others = met.setdefault(file_identity(source.path), (name, division))
            if division != others:
                warn_once(
                    f"{source.path} is in two sources, {other} and {name}, which hold out different parts of it: what "
                    "one holds out, the other learns from."
                )
                break


def held_out(
    corpora: dict[str, Corpus], tokenizer: Tokenizer, on_event: Callable[[Event], None]
) -> tuple[TokenStore, dict[str, TokenStore]]:
    """The tokens of all held-out text together, and of each corpus."""
    stores = {name: _store(corpus.held, tokenizer, AS_WRITTEN, on_event) for name, corpus in corpora.items()}
    fingerprints = repr([corpus.fingerprint for corpus in corpora.values()])
    return joined(stores, tokenizer, cache_folder(), fingerprints), stores


def _store(part: Documents, tokenizer: Tokenizer, manner: Manner, on_event: Callable[[Event], None]) -> TokenStore:
    def progress(done: int, total: int) -> None:
        on_event(Phase("tokenising", done, total, "B"))

    return tokenize(part, tokenizer, cache_folder(), progress, manner=manner)


def _tokenizer(recipe: Recipe, corpora: list[tuple[Corpus, float]], on_event: Callable[[Event], None]) -> Tokenizer:
    """The one that the recipe names, or that of its weights, or a byte-level BPE trained on the corpora."""
    given = recipe.data.tokenizer or (recipe.model.weights and checkpoint_folder(recipe.model.weights))
    if given:
        return Tokenizer.load(given)
    size = recipe.config.vocab_size
    made_of = ([(corpus.fingerprint, weight) for corpus, weight in corpora], SAMPLE_BYTES, size, RECIPE_OF_TOKENIZER)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = cache_folder() / f"tokenizer-{key}"
    if not folder.is_dir():
        on_event(Note(f"Training a tokenizer of {size} tokens"))
        total = sum(weight for _, weight in corpora)
        texts = (
            text for corpus, weight in corpora for text in _sample(corpus.train, round(SAMPLE_BYTES * (weight / total)))
        )
        tokenizer = train_tokenizer(texts, size)
        with folder_beside(folder) as scratch:
            tokenizer.save(scratch)
    return Tokenizer.load(folder)


def _sample(part: Documents, most: int) -> Iterator[str]:
    """The texts of every so manieth block, of about `most` bytes together."""
    every = -(-part.size // max(most, 1))
    for number, block in enumerate(part.blocks()):
        if number % every == 0:
            yield from (document.text for document in part.documents(block))
