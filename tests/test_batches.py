"""Batches: every label is the next token of its document, all are met, and a row is the same whoever asks for it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cavelight.data.batches import IGNORE, Batch, Batches, evaluation_windows
from cavelight.data.mixture import Mixture
from cavelight.data.store import TokenStore
from cavelight.errors import UserError

lengths_of_documents = st.lists(st.integers(2, 12), max_size=8).map(lambda lengths: [*lengths, 11])


def store_of(lengths: list[int]) -> TokenStore:
    """Documents of these lengths, in which every token is another one: its place in the store."""
    starts_M1 = np.cumsum([0, *lengths])
    return TokenStore(np.arange(starts_M1[-1], dtype=np.uint16), starts_M1, np.array(lengths) * 3)


def document_of(store: TokenStore, token: int) -> int:
    return int(np.searchsorted(store.starts_M1, token, side="right"))


def check(store: TokenStore, batch: Batch) -> None:
    """Each target is the token that truly follows, or IGNORE exactly where its document or its row has ended."""
    for tokens_L, targets_LJ in zip(
        batch.tokens_T.split(list(batch.rows)), batch.targets_TJ.split(list(batch.rows)), strict=True
    ):
        row = tokens_L.tolist()
        for i, targets in enumerate(targets_LJ.tolist()):
            for j, target in enumerate(targets):
                follows = row[i] + j + 1
                inside = follows < len(store) and document_of(store, follows) == document_of(store, row[i])
                assert target == (follows if inside and i + j < len(row) else IGNORE)
    assert batch.positions_T.tolist() == [i for length in batch.segments for i in range(length)]
    assert sum(batch.rows) == sum(batch.segments) == len(batch.tokens_T) == len(batch.targets_TJ)


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(-5, 5), st.booleans())
def test_labels_follow_and_never_cross(
    lengths: list[int], row_length: int, rows: int, depths: int, seed: int, mask: bool
) -> None:
    store = store_of(lengths)
    loader = Batches(Mixture((store,)), row_length, depths, seed, mask)
    for first in range(0, 3 * rows, rows):
        batch = loader.rows(first, rows)
        check(store, batch)
        assert batch.targets_TJ.shape == (rows * row_length, 1 + depths)
        assert batch.rows == (row_length,) * rows
        if not mask:
            assert batch.segments == batch.rows
            continue
        pieces = [[document_of(store, t) for t in piece.tolist()] for piece in batch.tokens_T.split(batch.segments)]
        assert all(len(set(piece)) == 1 for piece in pieces)
        begins = set(np.cumsum([0, *batch.rows]).tolist())
        for place, before, after in zip(np.cumsum(batch.segments).tolist(), pieces, pieces[1:], strict=False):
            assert place in begins or before[0] != after[0] or len(lengths) == 1


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_meets_every_token_once(lengths: list[int], row_length: int, epoch: int) -> None:
    store = store_of(lengths)
    windows = len(store) // row_length
    batch = Batches(Mixture((store,)), row_length, 0, seed=1, mask_documents=False).rows(epoch * windows, windows)
    inputs = Counter[int](batch.tokens_T.tolist())
    met = Counter[int](batch.targets_TJ[:, 0].tolist())
    del met[IGNORE]
    assert set(met.values()) == set(inputs.values()) == {1}
    assert len(store) - len(inputs) < row_length
    possible = set(range(len(store))) - set(store.starts_M1.tolist())  # a beginning token is never a label
    assert met.keys() <= possible and len(possible) - len(met) < row_length


@settings(deadline=None)
@given(lengths_of_documents, lengths_of_documents, st.lists(st.integers(1, 7), min_size=1, max_size=8), st.booleans())
def test_rows_do_not_depend_on_how_they_are_asked_for(
    first: list[int], second: list[int], counts: list[int], mask: bool
) -> None:
    mixture = Mixture((store_of(first), store_of(second)), (3.0, 1.0))
    loader = Batches(mixture, 5, 1, 0, mask)
    total = sum(counts)
    whole = loader.rows(0, total)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    parts = [loader.rows(start, count) for start, count in reversed(list(zip(starts, counts, strict=True)))][::-1]
    assert torch.equal(torch.cat([part.tokens_T for part in parts]), whole.tokens_T)
    assert torch.equal(torch.cat([part.targets_TJ for part in parts]), whole.targets_TJ)
    assert torch.equal(torch.cat([part.positions_T for part in parts]), whole.positions_T)
    assert sum((part.segments for part in parts), ()) == whole.segments and len(whole.rows) == total


def test_each_source_goes_through_epochs_of_its_own() -> None:
    """Tokens of the two stores cannot be mistaken for one another, so the batch itself shows the mixture."""
    small, large = store_of([20, 20]), store_of([500, 500])
    large = TokenStore(large.tokens_N + 1000, large.starts_M1, large.bytes_M)
    batch = Batches(Mixture((large, small), (3.0, 1.0)), 10, 0, seed=0, mask_documents=False).rows(0, 400)
    of_small = batch.tokens_T.view(400, 10)[:, 0] < 1000
    assert (of_small.cumsum(0) - torch.arange(1, 401) / 4).abs().max() < 1
    of_its_epochs = batch.tokens_T.view(400, 10)[of_small].view(25, 40).sort(dim=1).values  # four windows an epoch
    assert torch.equal(of_its_epochs, torch.arange(40).expand(25, 40))


def test_the_same_store_twice_is_shuffled_twice() -> None:
    store = store_of([500, 500])
    batch = Batches(Mixture((store, store)), 10, 0, seed=0, mask_documents=False).rows(0, 100)
    first, second = batch.tokens_T.view(50, 2, 10).unbind(dim=1)  # one row of each in turn
    assert not (first == second).all(dim=1).any()


def test_rows_are_a_pure_function_of_seed_and_number() -> None:
    mixture = Mixture((store_of([40, 30, 50]),))

    def tokens(seed: int, first: int, count: int) -> list[list[int]]:
        return Batches(mixture, 5, 0, seed, mask_documents=False).rows(first, count).tokens_T.view(-1, 5).tolist()

    assert tokens(0, 0, 24) != tokens(1, 0, 24)
    assert sorted(tokens(0, 0, 24)) != sorted(tokens(0, 24, 24))  # other windows, not only another order
    # The same on every machine and with every version of numpy.
    assert [row[0] for row in tokens(0, 0, 6)] == [72, 2, 117, 87, 42, 77]


def test_too_little_for_one_row() -> None:
    with pytest.raises(UserError, match="12 tokens for rows of 12"):
        Batches(Mixture((store_of([12]),)), 12, 0, 0, mask_documents=False)
    Batches(Mixture((store_of([12]),)), 11, 0, 0, mask_documents=False)


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 9), st.data())
def test_evaluation_labels_every_token_once_with_context(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    budget = data.draw(st.integers(1, 30))
    store = store_of(lengths)
    windows, text_bytes = evaluation_windows(store, length, stride, budget)
    met = Counter[int]()
    for batch in windows:
        assert len(batch.tokens_T) <= budget or len(batch.rows) == 1
        assert batch.rows == batch.segments
        for tokens_L, targets_LJ in zip(
            batch.tokens_T.split(list(batch.rows)), batch.targets_TJ.split(list(batch.rows)), strict=True
        ):
            row, targets = tokens_L.tolist(), targets_LJ[:, 0].tolist()
            assert len(row) <= length and row == list(range(row[0], row[0] + len(row)))
            for i, target in enumerate(targets):
                if target == IGNORE:
                    continue
                met[target] += 1
                assert target == row[i] + 1 and document_of(store, target) == document_of(store, row[0])
                begins_document = row[0] in store.starts_M1
                assert begins_document or i + 1 > length - stride
    assert met == Counter(set(range(len(store))) - set(store.starts_M1.tolist()))
    assert text_bytes == 3 * len(store)


def test_evaluation_of_a_part() -> None:
    store = store_of([10, 40, 20, 30])  # 30, 120, 60, 90 bytes
    for limit in (60, 100, 300):
        windows, text_bytes = evaluation_windows(store, 8, 4, limit_bytes=limit)
        met = torch.cat([batch.targets_TJ[:, 0] for batch in windows]).tolist()
        documents = {document_of(store, token) for token in met if token != IGNORE}
        assert text_bytes == sum(int(store.bytes_M[document - 1]) for document in documents)
        assert limit / 2 <= text_bytes <= limit
        assert evaluation_windows(store, 8, 4, limit_bytes=limit)[1] == text_bytes
    assert evaluation_windows(store, 8, 4, limit_bytes=1)[1] == 30  # at least one document
    with pytest.raises(ValueError, match="stride 9"):
        evaluation_windows(store, 8, 9)
