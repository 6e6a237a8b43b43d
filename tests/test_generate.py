import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import generate as generation
from nanochat_jax import model, sharding
from nanochat_jax.config import ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.generate import decode, empty_rows, empty_slots, generate, prefill, restore, snapshot
from nanochat_jax.layers import Compute
from nanochat_jax.sampling import Sampling

CFG = ModelConfig(sequence_len=192, vocab_size=97, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSSL")
COMPUTE = Compute()


@pytest.fixture(scope="module")
def params():
    """Random everywhere: the zero and tiny matrices of a fresh model would hide mistakes."""
    fresh = model.init_params(jax.random.key(0), CFG, COMPUTE)
    leaves, treedef = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def greedy_uncached(params, prompt: list[int], count: int) -> list[int]:
    forward = jax.jit(lambda tokens: model.forward(params, CFG, tokens, compute=COMPUTE))
    tokens = np.zeros((1, CFG.sequence_len), np.int32)
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + count):
        tokens[0, position] = int(jnp.argmax(forward(tokens)[0, position - 1]))
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def test_greedy_equals_the_uncached_model_beyond_the_short_windows(params):
    # 128 is the short window here: both prompts outgrow their rings.
    prompts = [list(range(1, 90)), [5, 6, 7] * 5]
    expected = [greedy_uncached(params, prompt, count) for prompt, count in zip(prompts, (100, 160), strict=True)]
    sampled = generate(params, CFG, prompts, max_new_tokens=160, sampling=Sampling(temperature=0), compute=COMPUTE)
    assert sampled[0][:100] == expected[0]
    assert sampled[1] == expected[1]


def test_a_row_ends_where_the_context_is_full(params):
    [row] = generate(params, CFG, [[1] * 190], max_new_tokens=10, compute=COMPUTE)
    assert len(row) == 2


def test_a_row_does_not_depend_on_its_neighbours(params):
    rows = [[1, 2, 3], [4] * 100, [9, 8]]
    how = [Sampling(temperature=1.0, top_k=20, seed=seed) for seed in range(3)]
    together = generate(params, CFG, rows, max_new_tokens=20, sampling=how, compute=COMPUTE)
    alone = [
        generate(params, CFG, [row], max_new_tokens=20, sampling=[one], compute=COMPUTE)[0]
        for row, one in zip(rows, how, strict=True)
    ]
    assert together == alone


def test_an_accelerator_decodes_a_single_row_beside_an_empty_one(params, monkeypatch):
    slots = empty_slots(1, CFG, COMPUTE, CFG.sequence_len)
    options = {"cfg": CFG, "compute": COMPUTE}
    slots = slots._replace(rows=prefill(params, slots.rows, jnp.array([[5, 6, 7, 8]]), jnp.array([4]), **options))
    asked = jnp.full((1, 40), -1, jnp.int32).at[0, 3].set(9), jnp.array([33])
    expected = jax.jit(partial(decode, top=2, **options))(params, slots, *asked)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = jax.jit(partial(decode, top=2, **options))(params, slots, *asked)
    assert np.array_equal(found[1].tokens_BT, expected[1].tokens_BT) and (found[1].tokens_BT >= 0).sum() == 33
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one[:, :33], other[:, :33], 1e-4, 1e-4)  # what follows the last means nothing
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found[0], expected[0])


def test_stop_tokens_end_a_row_and_are_left_out(params):
    free = generate(params, CFG, [[1, 2, 3]], max_new_tokens=30, sampling=Sampling(temperature=0), compute=COMPUTE)[0]
    stop = free[4]
    stopped = generate(
        params,
        CFG,
        [[1, 2, 3]],
        max_new_tokens=30,
        sampling=Sampling(temperature=0),
        stop_tokens=(stop,),
        compute=COMPUTE,
    )[0]
    assert stopped == free[: free.index(stop)]


def test_repetition_penalty_sees_prompt_and_output(params):
    how = Sampling(temperature=0, repetition_penalty=1e6)
    [row] = generate(params, CFG, [[1, 2, 3]], max_new_tokens=60, sampling=how, compute=COMPUTE)
    assert len(set(row)) == 60
    assert not set(row) & {1, 2, 3}


def test_prompts_that_cannot_be_continued_are_refused(params):
    with pytest.raises(UserError, match="empty"):
        generate(params, CFG, [[]], max_new_tokens=1)
    with pytest.raises(UserError, match="192"):
        generate(params, CFG, [[1] * 192], max_new_tokens=1)


def test_no_prompts_give_no_continuations(params):
    assert generate(params, CFG, [], max_new_tokens=1) == []


@pytest.mark.parametrize("size", [32, 160])  # shorter and longer than the rings, of 129
def test_restored_rows_are_those_that_were_prefilled(params, size):
    cfg = dataclasses.replace(CFG, sequence_len=400, n_layer=2, window_pattern="SL")
    params = {name: params[name] for name in params if name not in ("block_2", "block_3")}
    params |= {name: params[name][:2] for name in ("resid_lambdas", "x0_lambdas")}
    feed = jax.jit(partial(prefill, cfg=cfg, compute=COMPUTE))
    tokens_BT = np.random.default_rng(0).integers(0, 97, (2, 3 * size)).astype(np.int32)[:, :400]
    zero = np.zeros(2, np.int32)
    empty = empty_rows(2, cfg, COMPUTE, 400)
    fed, restored, elsewhere = empty, empty, empty
    for start in range(0, tokens_BT.shape[1] - size + 1, size):
        piece_BT, counts_B = tokens_BT[:, start : start + size], zero + size
        fed = feed(params, fed, piece_BT, counts_B)
        for row in (0, 1):
            stretch, only_B = snapshot(fed, row, size=size), np.where(np.arange(2) == row, counts_B, zero)
            restored = restore(restored, stretch, piece_BT, only_B)
        elsewhere = restore(elsewhere, stretch, piece_BT[::-1], np.where(np.arange(2) == 0, counts_B, zero))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), fed.cache, restored.cache))
    np.testing.assert_array_equal(fed.seen_BV, restored.seen_BV)
    for there, here, untouched in zip(*map(jax.tree.leaves, (fed, elsewhere, empty)), strict=True):
        if there.dtype == bool or there.shape != fed.logits_BV.shape:
            np.testing.assert_array_equal(here[0], there[1])
        np.testing.assert_array_equal(here[1], untouched[1])


def test_it_is_traced_for_the_mesh_that_parameters_lie_on(params, monkeypatch):
    seen, traced = [], generation._generate

    def spy(*args, **how):
        seen.append(jax.sharding.get_abstract_mesh().shape)
        return traced(*args, **how)

    monkeypatch.setattr(generation, "_generate", spy)
    mesh = sharding.make_mesh()
    placed = jax.device_put(params, sharding.replicated(mesh))
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=0), "compute": COMPUTE}
    assert generate(placed, CFG, [[1, 2]], **options) == generate(params, CFG, [[1, 2]], **options)
    assert [dict(shape) for shape in seen] == [dict(mesh.shape), {}]
