"""Packing: nothing lost, nothing doubled, every record begins with bos."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data.packing import pack
from nanochat_jax.data.sources import open_source

BOS = 0


def packed(lengths: list[int], record_len: int, buffer: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents of distinct tokens 1, 2, 3, ... of these lengths, and their records."""
    starts = np.cumsum([1, *lengths])
    documents = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    return documents, list(pack(documents, record_len, BOS, buffer))


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(2, 24), st.integers(1, 8))
@settings(max_examples=300)
def test_every_token_is_a_target_once(lengths, record_len, buffer):
    documents, records = packed(lengths, record_len, buffer)
    targets = np.concatenate([record[1:] for record in records] or [np.array([])])
    assert Counter(targets[targets != BOS]) == Counter(np.concatenate(documents or [np.array([])]))
    assert all(record[0] == BOS for record in records)
    assert all(len(record) == record_len for record in records[:-1])


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(2, 24), st.integers(1, 8))
@settings(max_examples=100)
def test_tokens_of_a_document_stay_in_order_behind_a_bos(lengths, record_len, buffer):
    _, records = packed(lengths, record_len, buffer)
    for record in records:
        follows = (record[1:] == record[:-1] + 1) | (record[1:] == BOS) | (record[:-1] == BOS)
        assert follows.all()


def test_best_fit_takes_the_longest_that_fits():
    documents = [np.full(length, length) for length in (3, 5, 2, 4)]
    records = [record.tolist() for record in pack(documents, 9, BOS)]
    assert records == [[0, 5, 5, 5, 5, 5, 0, 2, 2], [0, 4, 4, 4, 4, 0, 3, 3, 3]]


def test_a_document_longer_than_many_records_does_not_clog():
    documents, records = packed([1000, 3, 3], record_len=11, buffer=2)
    assert sum(map(len, documents)) == sum(np.count_nonzero(record) for record in records)
    assert len(records) == pytest.approx(1006 / 10, abs=2)


def test_buffer_is_bounded():
    taken = 0

    def documents():
        nonlocal taken
        while True:
            taken += 1
            yield np.ones(7, int)

    list(islice(pack(documents(), 16, BOS, buffer_documents=10), 5))
    assert taken <= 10 + 5 * 2


def test_real_conversations_lose_almost_nothing():
    """Upstream, which throws away what it crops, loses about 35 %."""
    documents = [np.frombuffer(text.encode(), np.uint8) + 1 for text in open_source("chitchat").documents(0)]
    records = list(pack(documents, 2049, BOS))
    total = sum(map(len, documents))
    kept = sum(np.count_nonzero(record) for record in records if len(record) == 2049)
    assert 1 - kept / total < 0.005
    bos = sum(np.count_nonzero(record == BOS) for record in records)
    assert bos < 2 * len(documents) + len(records)
