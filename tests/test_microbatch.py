"""How many rows at a time: what fits is found out beforehand, in few compilations, and said when nothing does."""

import json
import logging
import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import memory, sharding, state
from nanochat_jax.config import Horizon, OptimConfig, from_depth
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.metrics import read_metrics
from nanochat_jax.optim import make_optimizer
from nanochat_jax.sharding import MeshConfig
from train import pretrain
from train.microbatch import micro_rows, size_step
from train.stage import RunConfig
from train.start import abstract_state

DIVISORS = [1, 2, 4, 8, 16, 32]
ROWS, TOKENS = 16, 64


@pytest.mark.parametrize("fits", [0, 1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("guess", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("fixed", [80.0, 100.0, 120.0])
def test_the_largest_that_fits_is_found_whatever_the_first_guess(fits, guess, fixed):
    tried = []

    def needed(rows):
        tried.append(rows)
        return 100.0 + 50.0 * rows

    limit = 1.1 * (100.0 + 50.0 * fits) if fits else 149.0
    assert memory.largest_fitting(DIVISORS, needed, limit, fixed, guess) == (fits or None)
    assert len(tried) == len(set(tried)) <= 4


def test_a_good_guess_needs_one_compilation():
    tried = []

    def needed(rows):
        tried.append(rows)
        return 100.0 + 9.5 * rows

    assert memory.largest_fitting(DIVISORS, needed, 180, fixed=100.0, per_row=10.0) == 8
    assert tried == [8]


def test_what_the_compiler_cannot_place_does_not_fit():
    assert memory.largest_fitting(DIVISORS, lambda rows: math.inf if rows > 4 else rows, 10, 0.0, 0.1) == 4


@cache
def small():
    """A train step of one device, its state's shapes, and one row."""
    cfg, compute = from_depth(2, vocab_size=512, sequence_len=TOKENS, head_dim=32), Compute()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = make_optimizer(cfg, Horizon(10, ROWS * TOKENS, 10 * ROWS * TOKENS, 1.0, 0.1), OptimConfig(), compute.dtype)
    like = abstract_state(cfg, compute, tx, mesh)
    step = state.make_train_step(pretrain.language_model_loss(cfg, compute), tx, like, seed=0)
    row = {name: np.zeros(TOKENS, np.int32) for name in ("tokens", "targets")}
    return step, like, row, mesh, cfg, compute


@cache
def sized(micro_batch, memory_gib=None):
    step, like, row, mesh, cfg, compute = small()
    return size_step(step, like, row, ROWS, micro_batch, mesh, model=(cfg, compute), memory_gib=memory_gib)


def needs_gib(rows: int) -> float:
    return memory.program_bytes(sized(rows).step) / 2**30


def test_auto_takes_as_many_rows_as_the_memory_holds():
    assert sized("auto").rows == ROWS
    for rows in (8, 4):
        assert needs_gib(rows) < needs_gib(2 * rows)
        found = sized("auto", needs_gib(rows) * 1.001)
        assert found.rows == rows
        assert f"--run.micro-batch {rows // 2} should fit" in found.advice


def test_the_first_guess_is_of_the_right_size():
    _, like, _, _, cfg, compute = small()
    guessed = memory.state_bytes(like) + ROWS * memory.activation_bytes(cfg, compute, TOKENS)
    assert 0.4 < guessed / 2**30 / needs_gib(ROWS) < 2


def test_a_micro_batch_that_will_not_fit_is_warned_of_beside_one_that_will(caplog):
    with caplog.at_level(logging.WARNING):
        assert sized(16, limit := needs_gib(4) * 1.1).rows == 16
    [message] = caplog.messages
    assert "16 rows of 64 tokens at a time need" in message
    proposed = int(re.search(r"--run\.micro-batch (\d+) should fit", message)[1])
    assert needs_gib(proposed) <= limit


def test_a_model_of_which_not_even_a_row_fits_is_refused():
    with pytest.raises(UserError, match=r"not even one row of 64 tokens at a time fits .*--run\.mesh\.fsdp"):
        sized("auto", needs_gib(1) * 0.9)


def test_rows_are_whole_shares_of_the_devices():
    mesh = sharding.make_mesh(MeshConfig())
    assert [micro_rows(48, "auto", mesh, most=most) for most in (1, 2, 4, 32)] == [1, 2, 3, 6]
    assert micro_rows(48, 3, mesh) == 3
    for micro_batch in (4, 12):
        with pytest.raises(UserError, match=f"do not divide by micro-batch={micro_batch}"):
            micro_rows(48, micro_batch, mesh)


def test_running_out_of_memory_is_said_without_a_trace():
    with pytest.raises(UserError, match=r"is exhausted; take less"), memory.explained("take less"):
        jnp.zeros(2**50, jnp.int8).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained("take less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_in_less_memory_learns_the_same_and_says_how_it_did(tiny_data, tmp_path, capsys):
    def run(name: str, memory_gib: float | None) -> tuple[int, list[float]]:
        pretrain.main(
            pretrain.Config(
                data=tiny_data,
                run=RunConfig(out=tmp_path / name, mesh=MeshConfig(data=1, fsdp=1, tensor=8), memory_gib=memory_gib),
                model=pretrain.ModelArgs(depth=1, head_dim=8),  # heads enough for eight devices
                optim=OptimConfig(warmup_steps=2),
                steps=4,
                batch_tokens=512,
                prompts=(),
            )
        )
        stored = json.loads((tmp_path / name / "config.json").read_text())
        losses = [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]
        return stored["run"]["micro_batch"], losses

    rows, whole = run("whole", None)
    said = capsys.readouterr().out
    assert rows == 16 and "1 micro-batches a step" in said
    needs = float(re.search(r"need ([0-9.]+) MiB", said)[1]) / 1024
    fewer, parts = run("parts", 0.5 * needs)
    assert fewer < rows and f"{16 // fewer} micro-batches a step" in capsys.readouterr().out
    np.testing.assert_allclose(parts, whole, rtol=2e-5)
