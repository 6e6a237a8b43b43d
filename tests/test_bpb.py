"""Bits per byte: the same for any batch size, and what NumPy makes of the model's logits."""

import math

import jax
import numpy as np
import pytest

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.config import from_depth
from nanochat_jax.data.batches import validation_batches
from nanochat_jax.data.pretrain import open_split
from nanochat_jax.eval.bpb import BitsPerByte, make_evaluator
from nanochat_jax.layers import Compute

COMPUTE = Compute()


@pytest.fixture(scope="module")
def measured(tiny_data):
    """Validation records, their tokenizer, a model with nothing left at zero, and its evaluator."""
    tok = tokenizer.load(tiny_data / "tokenizer.model")
    records = open_split(tiny_data, "val")
    cfg = from_depth(1, vocab_size=tok.vocab_size, sequence_len=records.manifest.sequence_len, head_dim=32)
    leaves, treedef = jax.tree.flatten(model.init_params(jax.random.key(0), cfg, COMPUTE))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return records, tok, cfg, treedef.unflatten(noisy), make_evaluator(cfg, tok.byte_lengths, COMPUTE)


def test_bits_and_loss_from_hand_worked_sums():
    rows = np.array([2.0, 1.0, 0.0]) * math.log(2), np.array([3, 3, 0]), np.array([1, 1, 0])
    result = BitsPerByte(*rows)
    assert result.bpb == pytest.approx(0.5)
    assert result.loss == pytest.approx(1.5 * math.log(2))
    # Two rows of text: residuals of ±0.5 bits, 2/1 of their squares' sum is 1, over 6 bytes.
    assert result.interval == pytest.approx((0.5 - 1.959964 / 6, 0.5 + 1.959964 / 6))
    assert BitsPerByte(*(column[1:] for column in rows)).interval is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, truth, hits = np.random.default_rng(0), 1.5, 0
    for _ in range(1000):
        sizes = rng.integers(50, 150, 200)
        bits = sizes * truth + rng.normal(0, 0.3, 200) * sizes
        low, high = BitsPerByte(bits * math.log(2), sizes, sizes).interval
        hits += low < truth < high
    assert 930 < hits < 968  # 950 ± 2.6 standard deviations


def test_what_is_said_of_a_row_depends_neither_on_batches_nor_on_devices(measured):
    records, tok, cfg, params, evaluate = measured
    expected = records.manifest.val
    results = [evaluate(params, validation_batches(records, rows)) for rows in (1, 3, 7)]
    mesh = sharding.make_mesh()
    sharded = make_evaluator(cfg, tok.byte_lengths, COMPUTE, mesh)
    placed = jax.device_put(params, sharding.replicated(mesh))
    on_mesh = (sharding.put_batch(mesh, batch) for batch in validation_batches(records, 8))
    for result in [*results, sharded(placed, on_mesh)]:
        assert (result.bytes, result.tokens) == (expected.bytes, expected.tokens)
        assert result.bpb == pytest.approx(results[0].bpb, rel=1e-6)
        assert result.interval == pytest.approx(results[0].interval, rel=1e-5)


def test_equals_numpy_on_the_logits(measured):
    records, tok, cfg, params, evaluate = measured
    nats = size = 0.0
    forward = jax.jit(lambda tokens_BT: model.forward(params, cfg, tokens_BT, compute=COMPUTE))
    for batch in validation_batches(records, 4):
        logits_BTV = np.asarray(forward(batch["tokens"]), np.float64)
        log_sums_BT = np.log(np.exp(logits_BTV).sum(-1))
        for b, t in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
            target = batch["targets"][b, t]
            if tok.pieces[target]:
                nats += log_sums_BT[b, t] - logits_BTV[b, t, target]
                size += len(tok.pieces[target])
    assert evaluate(params, validation_batches(records, 4)).bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_control_tokens_count_on_neither_side(measured):
    records, tok, _, params, evaluate = measured
    batch = next(validation_batches(records, 4))
    batch["targets"] = np.where(np.arange(batch["targets"].shape[1])[None] % 3 == 0, tok.bos, batch["targets"])
    without = dict(batch, targets=np.where(batch["targets"] == tok.bos, -1, batch["targets"]))
    both = evaluate(params, [batch]), evaluate(params, [without])
    for name in ("nats_R", "bytes_R", "tokens_R"):
        assert (getattr(both[0], name) == getattr(both[1], name)).all()
