"""Bits per byte: the same for any batch size, and what NumPy makes of the model's logits."""

import math

import jax
import numpy as np
import pytest

from nanochat_jax import model, tokenizer
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
    result = BitsPerByte(nats=3 * math.log(2), bytes=6, tokens=2)
    assert result.bpb == pytest.approx(0.5)
    assert result.loss == pytest.approx(1.5 * math.log(2))


def test_every_held_out_byte_is_counted_once_whatever_the_batch_size(measured):
    records, _, _, params, evaluate = measured
    expected = records.manifest.val
    results = [evaluate(params, validation_batches(records, rows)) for rows in (1, 3, 7)]
    for result in results:
        assert (result.bytes, result.tokens) == (expected.bytes, expected.tokens)
        assert result.bpb == pytest.approx(results[0].bpb, rel=1e-6)


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
    assert evaluate(params, [batch]) == evaluate(params, [without])
