"""Continuing sequences with a key-value cache: prefill, the decoding loop, and generate, which is both."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model, sharding
from nanochat_jax.cache import EmptyCache, KVCache, Stretch, init_cache, put, take
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, default_compute
from nanochat_jax.sampling import Sampling, SamplingArrays, choose, mark_seen, uniforms
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STEPS_BETWEEN_LOOKS = 8  # of decoding on a GPU or TPU, at whether all rows have halted
PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, so that few shapes are compiled


def next_logits(
    params: model.Params,
    cfg: Architecture,
    tokens_BT: jax.Array,
    cache: KVCache,
    counts_B: jax.Array,
    compute: Compute,
) -> tuple[jax.Array, KVCache]:
    """Feed counts_B tokens of each row and return the logits behind the last, (B, V) float32, and the cache.

    Of tokens_BT, int32, what stands behind the first counts_B is padding, and leaves no trace.
    """
    x_BTD, cache_out = model.trunk(params, cfg, tokens_BT, cache=cache, counts_B=counts_B, compute=compute)
    last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
    assert cache_out is not None
    return model.unembed(params, cfg, last_B1D)[:, 0], cache_out


def in_dtype(params: model.Params, dtype: str) -> model.Params:
    """Cast the matrices once, as every step otherwise would; tables are only looked up in, and vectors are small."""

    def cast(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf if leaf.ndim < 2 or path[-1].key in ("wte", "wpe") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


class Rows(NamedTuple):
    """Sequences so far, and what is known of their next tokens."""

    cache: KVCache
    logits_BV: jax.Array  # float32
    seen_BV: jax.Array  # bool, tokens that have occurred


class Slots(NamedTuple):
    """Rows, and how they go on."""

    rows: Rows
    halts_BV: jax.Array  # bool, tokens after which the host takes over
    how: SamplingArrays


class Sampled(NamedTuple):
    """What decode appended; log-probabilities are the model's own: temperature 1, no truncation, no penalty."""

    tokens_BT: jax.Array  # int32, −1 behind a slot's last
    logprobs_BT: jax.Array  # nats
    top_tokens_BTN: jax.Array  # int32, the N likeliest tokens at each position, likeliest first
    top_logprobs_BTN: jax.Array

    def likeliest(self, row: int, count: int) -> tuple[tuple[tuple[int, float], ...], ...]:
        """The likeliest tokens and their log-probabilities at a row's first positions; on the host."""
        if not self.top_tokens_BTN.shape[2]:
            return ()
        both = zip(self.top_tokens_BTN[row, :count].tolist(), self.top_logprobs_BTN[row, :count].tolist(), strict=True)
        return tuple(tuple(zip(tokens, logprobs, strict=True)) for tokens, logprobs in both)


def empty_rows(batch: int, cfg: Architecture, compute: Compute, context_len: int) -> Rows:
    """Rows of a cache that holds nothing, for contexts of up to context_len tokens."""
    cache = init_cache(cfg, batch, compute.dtype, context_len)
    return Rows(cache, jnp.zeros((batch, cfg.vocab_size)), jnp.zeros((batch, cfg.vocab_size), bool))


def empty_slots(batch: int, cfg: Architecture, compute: Compute, context_len: int) -> Slots:
    """Slots that nobody uses, to insert rows into."""
    rows = empty_rows(batch, cfg, compute, context_len)
    how = jax.tree.map(jnp.asarray, SamplingArrays.of([Sampling()] * batch))
    return Slots(rows, jnp.zeros_like(rows.seen_BV), how)


def insert(
    slots: Slots, rows: Rows, slot: jax.Array, row: jax.Array, halts_1V: jax.Array, how_1: SamplingArrays
) -> Slots:
    """Put one of the rows, with what it halts at and how it is sampled, into a slot."""
    new = Slots(jax.tree.map(lambda rows: jax.lax.dynamic_slice_in_dim(rows, row, 1), rows), halts_1V, how_1)
    return jax.tree.map(lambda slots, new: jax.lax.dynamic_update_slice_in_dim(slots, new, slot, 0), slots, new)


def prefill(
    params: model.Params,
    rows: Rows,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    *,
    cfg: Architecture,
    compute: Compute,
) -> Rows:
    """Append the first counts_B of tokens_BT (int32, then padding) to each row; logits are those after the last."""
    logits_BV, cache = next_logits(params, cfg, tokens_BT, rows.cache, counts_B, compute)
    return Rows(cache, logits_BV, mark_seen(rows.seen_BV, tokens_BT, counts_B))


def begin(
    params: model.Params,
    rows: Rows,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    *,
    cfg: Architecture,
    compute: Compute,
) -> Rows:
    """As prefill, of rows that hold nothing yet: attention does not look into their cache, whatever is there."""
    empty = rows._replace(cache=EmptyCache(*rows.cache))
    return prefill(params, empty, tokens_BT, counts_B, cfg=cfg, compute=compute)


def snapshot(rows: Rows, row: jax.Array, *, size: int) -> Stretch:
    """What the last tokens added to one of the rows' caches."""
    return take(rows.cache, row, size)


def restore(rows: Rows, stretch: Stretch, tokens_BT: jax.Array, counts_B: jax.Array) -> Rows:
    """As prefill of these tokens, from their snapshot, for the rows that counts_B is not 0 for; without logits."""
    return Rows(put(rows.cache, stretch, counts_B), rows.logits_BV, mark_seen(rows.seen_BV, tokens_BT, counts_B))


def decode(
    params: model.Params,
    slots: Slots,
    forced_BT: jax.Array,
    limits_B: jax.Array,
    *,
    cfg: Architecture,
    compute: Compute,
    top: int = 0,
) -> tuple[Slots, Sampled]:
    """Append up to T tokens to each slot, until all have halted.

    Args:
        params: the model's parameters.
        slots: what to continue.
        forced_BT: tokens to take in place of sampled ones, −1 where there are none; they do not halt.
        limits_B: at most this many tokens a slot; 0 leaves it as it is.
        cfg: the architecture.
        compute: dtype and attention backend.
        top: how many of the likeliest tokens to tell at each position.

    Returns:
        The slots, all returned tokens fed, and the tokens.
    """
    B, T = forced_BT.shape
    on_cpu = jax.default_backend() == "cpu"
    if B == 1 and not on_cpu:  # beside an empty slot: XLA makes half as many kernels again of a single row's step
        wider = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), (slots, forced_BT, limits_B))
        found = decode(params, *wider, cfg=cfg, compute=compute, top=top)
        return jax.tree.map(lambda x: x[:1], found)
    limits_B = jnp.minimum(limits_B, T)
    # Whether all have halted is known on the host only after the device has caught up, which costs a GPU more than idle
    # steps.
    between_looks = 1 if on_cpu else min(T, STEPS_BETWEEN_LOOKS)
    by_kernel = compute.attention == "cudnn"
    # A running slot takes one token a step. Drawn here, for all steps: the generator is slow on few numbers.
    positions_BT = slots.rows.cache.lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    uniforms_BT = uniforms(slots.how.seed_B, positions_BT)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        t, rows, live_B, sampled = state
        chosen_B = choose(rows.logits_BV, slots.how, uniforms_BT[:, t], rows.seen_BV, by_kernel=by_kernel)
        forced_B = forced_BT[:, t] >= 0
        token_B = jnp.where(forced_B, forced_BT[:, t], chosen_B)
        token_B1, counts_B = token_B[:, None], live_B.astype(jnp.int32)
        logprobs_BV = jax.nn.log_softmax(rows.logits_BV)
        top_logprobs_BN, top_tokens_BN = jax.lax.top_k(logprobs_BV, top)
        new = Sampled(
            jnp.where(live_B, token_B, -1),
            jnp.take_along_axis(logprobs_BV, token_B1, axis=1)[:, 0],
            top_tokens_BN,
            top_logprobs_BN,
        )
        halted_B1 = jnp.take_along_axis(slots.halts_BV, token_B1, axis=1) & ~forced_B[:, None]
        fed = prefill(params, rows, token_B1, counts_B, cfg=cfg, compute=compute)
        return (
            t + 1,
            fed._replace(logits_BV=jnp.where(live_B[:, None], fed.logits_BV, rows.logits_BV)),
            live_B & ~halted_B1[:, 0] & (t + 1 < limits_B),
            jax.tree.map(lambda all_BT, new_B: all_BT.at[:, t].set(new_B), sampled, new),
        )

    none = Sampled(
        jnp.full((B, T), -1, jnp.int32),
        jnp.zeros((B, T)),
        jnp.zeros((B, T, top), jnp.int32),
        jnp.zeros((B, T, top)),
    )

    def steps(state: tuple[Any, ...]) -> tuple[Any, ...]:
        return jax.lax.fori_loop(0, between_looks, lambda _, state: step(state), state)

    start = (jnp.int32(0), slots.rows, limits_B > 0, none)
    state = jax.lax.while_loop(lambda state: (state[0] < T) & jnp.any(state[2]), steps, start)
    return slots._replace(rows=state[1]), state[3]


@partial(jax.jit, static_argnames=("cfg", "compute", "max_new"))
def _generate(
    params: model.Params,
    prompts_BT: jax.Array,
    counts_B: jax.Array,
    how: SamplingArrays,
    stop_V: jax.Array,
    *,
    cfg: Architecture,
    compute: Compute,
    max_new: int,
) -> jax.Array:
    B = prompts_BT.shape[0]
    rows = empty_rows(B, cfg, compute, cfg.sequence_len)
    rows = begin(params, rows, prompts_BT, counts_B, cfg=cfg, compute=compute)
    slots = Slots(rows, jnp.broadcast_to(stop_V, rows.seen_BV.shape), how)
    sampled_BT = jnp.full((B, max_new), -1, jnp.int32)
    return decode(params, slots, sampled_BT, cfg.sequence_len - counts_B, cfg=cfg, compute=compute)[1].tokens_BT


def generate(
    params: model.Params,
    cfg: Architecture,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: list[Sampling] | Sampling | None = None,
    stop_tokens: tuple[int, ...] = (),
    compute: Compute | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        params: the model's parameters.
        cfg: its architecture.
        prompts: token ids, one list a row, none empty.
        max_new_tokens: at most this many new tokens a row; a row also ends where the context is full.
        sampling: one for all rows, or one for each; default: plain sampling at temperature 1.
        stop_tokens: a row ends before the first of these.

    Returns:
        The new tokens of each row, without prompt and stop token.

    Raises:
        UserError: if a prompt is empty, or leaves no room for a new token.
    """
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("generate: a prompt is empty; begin it with the <|bos|> token")
    if longest >= cfg.sequence_len:
        raise UserError(f"generate: a prompt of {longest} tokens leaves no room in a context of {cfg.sequence_len}")
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens={max_new_tokens} must be at least 1")
    rows = sampling if isinstance(sampling, list) else [sampling or Sampling()] * len(prompts)
    padded = min(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, cfg.sequence_len)
    prompts_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BT[row, : len(prompt)] = prompt
    counts_B = np.array([len(prompt) for prompt in prompts], np.int32)
    stop_V = np.zeros(cfg.vocab_size, bool)
    stop_V[list(stop_tokens)] = True
    with sharding.where(params):
        tokens_BT = _generate(
            params, prompts_BT, counts_B, SamplingArrays.of(rows), stop_V,
            cfg=cfg, compute=compute or default_compute(), max_new=max_new_tokens,
        )  # fmt: skip
    return [[token for token in row if token >= 0 and not stop_V[token]] for row in np.asarray(tokens_BT).tolist()]


def continue_texts(
    params: model.Params, cfg: Architecture, tok: Tokenizer, prompts: Sequence[str], **options: Any
) -> list[str]:
    """What a language model writes after each prompt, as text; options and errors are generate's."""
    rows = [[tok.bos, *tok.encode(prompt)] for prompt in prompts]
    return [tok.decode(row) for row in generate(params, cfg, rows, stop_tokens=tuple(tok.control.values()), **options)]


def usable_prompts(cfg: Architecture, tok: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """Those prompts that the tokenizer can write and the context can hold; the others are named in a warning."""
    usable = []
    for prompt in prompts:
        try:
            fits = 1 + len(tok.encode(prompt)) < cfg.sequence_len
        except UserError:
            fits = False
        if fits:
            usable.append(prompt)
        else:
            log.warning("no sample for the prompt %r: the tokenizer or the context does not hold it", prompt)
    return usable
