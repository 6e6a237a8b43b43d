"""Loader: one order for any number of hosts, any step as the start, and every mismatch told."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data.batches import batches, validation_batches
from nanochat_jax.data.prepare import PrepareConfig, prepare
from nanochat_jax.data.pretrain import Records, open_split
from nanochat_jax.data.records import Manifest, SplitStats, encode_example
from nanochat_jax.errors import UserError

COUNT, SEQUENCE_LEN = 23, 4


@pytest.fixture
def numbered() -> Records:
    """Record i holds 10*i, 10*i + 1, ..., so that a row tells which record it is."""
    rows = (np.arange(SEQUENCE_LEN + 1) + 10 * i for i in range(COUNT))
    empty = SplitStats(0, 0, 0, 0, 0)
    manifest = Manifest(
        source="s", corpus="c", tokenizer_sha256="t", vocab_size=300, sequence_len=SEQUENCE_LEN, val_fraction=0.1,
        unit_bytes=1, units=1, empty_documents=0, train=empty, val=empty, dropped_share=0.0, fingerprint="f",
    )  # fmt: skip
    return Records("numbered records", [encode_example(row.astype(np.uint16).tobytes()) for row in rows], manifest)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A small folder of several shards, from two files of different length."""
    folder = tmp_path_factory.mktemp("loader")
    texts = [" ".join(str(i * i) for i in range(count)) for count in (3000, 4000)]
    for name, text in zip("ab", texts, strict=True):
        (folder / f"{name}.txt").write_text(text)
    tokenizers.train(texts, 300).save(folder / "tokenizer.model")
    source, model, out = f"text:{folder}/*.txt", folder / "tokenizer.model", folder / "data"
    prepare(PrepareConfig(source, model, out, sequence_len=64, unit_bytes=30_000, workers=1))
    return out


def order(records: Records, steps: int, **options) -> np.ndarray:
    """Indices of the records in the first batches, (steps, rows)."""
    chosen = islice(batches(records, **options), steps)
    return np.stack([batch["tokens"][:, 0] // 10 for batch in chosen])


def test_targets_are_the_next_tokens(numbered):
    batch = next(batches(numbered, batch_size=5, seed=0))
    assert batch["tokens"].shape == batch["targets"].shape == (5, SEQUENCE_LEN)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)


def test_each_epoch_has_every_record_once_in_a_new_order(numbered):
    flat = order(numbered, 3 * COUNT, batch_size=4, seed=1).ravel()[: 3 * COUNT].reshape(3, COUNT)
    for epoch in flat:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in flat}) == 3


def test_order_is_a_function_of_the_seed(numbered):
    first = order(numbered, 5, batch_size=4, seed=1)
    np.testing.assert_array_equal(first, order(numbered, 5, batch_size=4, seed=1))
    assert (first != order(numbered, 5, batch_size=4, seed=2)).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_slices_of_one_global_batch(numbered, hosts):
    whole = order(numbered, 9, batch_size=8, seed=3)
    parts = [order(numbered, 9, batch_size=8, seed=3, process_index=i, process_count=hosts) for i in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("start", [1, 7, 50])
def test_any_step_can_be_the_start(numbered, start):
    whole = order(numbered, start + 3, batch_size=4, seed=3)
    np.testing.assert_array_equal(order(numbered, 3, batch_size=4, seed=3, start_step=start), whole[start:])


def test_a_far_step_starts_at_once(numbered):
    assert order(numbered, 2, batch_size=4, seed=3, start_step=10**12).shape == (2, 4)


def test_validation_reads_all_in_order_and_pads_the_last_batch(numbered):
    found = list(validation_batches(numbered, 6))
    assert [batch["tokens"].shape for batch in found] == [(6, SEQUENCE_LEN)] * 4
    counted = np.concatenate([batch["targets"] for batch in found])
    np.testing.assert_array_equal(counted[:COUNT, 0] // 10, np.arange(COUNT))
    assert (counted[COUNT:] == -1).all() and (counted[:COUNT] >= 0).all()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 9])
def test_validation_takes_exactly_the_rows_that_are_asked_for_from_everywhere(numbered, batch_size):
    found = [row for batch in validation_batches(numbered, batch_size, limit=7) for row in batch["targets"]]
    spread = [numbered.row(i * COUNT // 7)["targets"] for i in range(7)]
    np.testing.assert_array_equal([row for row in found if (row >= 0).any()], spread)
    more = [row for batch in validation_batches(numbered, batch_size, limit=99) for row in batch["targets"]]
    assert sum((row >= 0).any() for row in more) == COUNT


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_validation_hosts_read_slices_of_one_global_batch(numbered, hosts):
    whole = [batch["targets"] for batch in validation_batches(numbered, 6)]
    parts = [list(validation_batches(numbered, 6, process_index=i, process_count=hosts)) for i in range(hosts)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step]["targets"] for part in parts]), expected)


def test_batch_that_does_not_divide_among_hosts(numbered):
    with pytest.raises(UserError, match=r"batch of 6 rows .* 4 processes"):
        batches(numbered, batch_size=6, seed=0, process_count=4)


def test_mismatches_are_refused(prepared, tmp_path):
    sha256 = open_split(prepared, "train").manifest.tokenizer_sha256
    assert len(open_split(prepared, "train", tokenizer_sha256=sha256, sequence_len=64)) > 100
    with pytest.raises(UserError, match=f"{sha256}.*{'0' * 64}"):
        open_split(prepared, "train", tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match="sequence-len=64, this run wants 128"):
        open_split(prepared, "train", sequence_len=128)
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_split(prepared, "test")
    with pytest.raises(UserError, match="no finished records"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("damage", ["missing", "truncated", "exchanged"])
def test_damaged_shards_are_refused(prepared, tmp_path, damage):
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second = sorted(tmp_path.glob("records-train*"))[:2]
    if damage == "missing":
        first.unlink()
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-50_000])
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="prepare"):
        open_split(tmp_path, "train")


def test_flipped_bit_is_told(prepared, tmp_path):
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = min(tmp_path.glob("records-train*"))
    data = bytearray(shard.read_bytes())
    at = data.index(open_split(prepared, "train")[3].tobytes())
    data[at + 20] ^= 4
    shard.write_bytes(data)
    records = open_split(tmp_path, "train")
    with pytest.raises(UserError, match=r"record 3 of the train records in .* is damaged"):
        list(islice(batches(records, batch_size=len(records), seed=0), 1))
