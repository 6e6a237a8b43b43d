"""Sampling with a key-value cache: prefill the prompts, then one compiled loop over new tokens."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model
from nanochat_jax.cache import KVCache, init_cache
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, default_compute

PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest; 0 for all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    min_p: float = 0.0  # only those at least this fraction as likely as the likeliest
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"sampling: temperature={self.temperature} must be 0 or a positive number")
        if self.top_k < 0:
            raise UserError(f"sampling: top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p={self.top_p} must lie above 0 and at most at 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"sampling: min_p={self.min_p} must lie between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sampling: seed={self.seed} must lie between 0 and 2**32 - 1")


class SamplingArrays(NamedTuple):
    """Sampling for each row of a batch."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    key_B: jax.Array  # typed PRNG keys

    @classmethod
    def of(cls, rows: list[Sampling]) -> "SamplingArrays":
        return cls(
            temperature_B=jnp.array([row.temperature for row in rows], jnp.float32),
            top_k_B=jnp.array([row.top_k for row in rows], jnp.int32),
            top_p_B=jnp.array([row.top_p for row in rows], jnp.float32),
            min_p_B=jnp.array([row.min_p for row in rows], jnp.float32),
            key_B=jax.vmap(jax.random.key)(np.array([row.seed for row in rows], np.uint32)),
        )


def choose(logits_BV: jax.Array, how: SamplingArrays, positions_B: jax.Array) -> jax.Array:
    """Choose a token for each row.

    A row's choice depends on its own logits, seed and position alone, never on its neighbours.

    Args:
        logits_BV: float32.
        how: each row's sampling.
        positions_B: int32, position that the chosen token will have; varies the randomness.

    Returns:
        (B,) int32 token ids.
    """
    V = logits_BV.shape[1]
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / jnp.where(how.temperature_B > 0, how.temperature_B, 1.0)[:, None]
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_1V = jnp.arange(V, dtype=jnp.int32)[None, :]
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    top_k_B = jnp.where(how.top_k_B > 0, how.top_k_B, V)
    kept_BV = (rank_1V < top_k_B[:, None]) & (before_BV < how.top_p_B[:, None])
    kept_BV &= (probs_BV >= how.min_p_B[:, None] * probs_BV[:, :1]) | (rank_1V == 0)
    keys_B = jax.vmap(jax.random.fold_in)(how.key_B, positions_B)
    rank_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(kept_BV, sorted_BV, -jnp.inf))
    drawn_B = jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(how.temperature_B > 0, drawn_B, greedy_B)


def next_logits(
    params: model.Params,
    cfg: model.Architecture,
    tokens_BT: jax.Array,
    cache: KVCache,
    counts_B: jax.Array,
    compute: Compute,
) -> tuple[jax.Array, KVCache]:
    """Feed counts_B tokens of each row and return the logits that follow the last of them, (B, V)."""
    x_BTD, cache_out = model.trunk(params, cfg, tokens_BT, cache=cache, counts_B=counts_B, compute=compute)
    last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
    assert cache_out is not None
    return model.unembed(params, cfg, last_B1D)[:, 0], cache_out


class _Decoding(NamedTuple):
    cache: KVCache
    token_B: jax.Array  # chosen, not yet fed
    done_B: jax.Array
    chosen: jax.Array  # how many tokens, the same for all rows
    output_BT: jax.Array  # chosen tokens, -1 where a row has ended


@partial(jax.jit, static_argnames=("cfg", "compute", "max_new", "max_len"))
def _generate(
    params: model.Params,
    prompts_BT: jax.Array,
    counts_B: jax.Array,
    how: SamplingArrays,
    stop_S: jax.Array,
    *,
    cfg: model.Architecture,
    compute: Compute,
    max_new: int,
    max_len: int,
) -> jax.Array:
    B = prompts_BT.shape[0]
    logits_BV, cache = next_logits(
        params, cfg, prompts_BT, init_cache(cfg, B, compute.dtype, max_len), counts_B, compute
    )

    def take(state: _Decoding, logits_BV: jax.Array) -> _Decoding:
        token_B = choose(logits_BV, how, state.cache.lengths_B)
        done_B = state.done_B | jnp.any(token_B[:, None] == stop_S[None, :], axis=1)
        output_BT = state.output_BT.at[:, state.chosen].set(jnp.where(done_B, -1, token_B))
        return state._replace(token_B=token_B, done_B=done_B, chosen=state.chosen + 1, output_BT=output_BT)

    def step(state: _Decoding) -> _Decoding:
        counts_B = jnp.where(state.done_B, 0, 1)
        logits_BV, cache = next_logits(params, cfg, state.token_B[:, None], state.cache, counts_B, compute)
        return take(state._replace(cache=cache), logits_BV)

    empty = _Decoding(cache, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.int32(0), jnp.full((B, max_new), -1))
    final = jax.lax.while_loop(
        lambda state: (state.chosen < max_new) & ~jnp.all(state.done_B), step, take(empty, logits_BV)
    )
    return final.output_BT


def generate(
    params: model.Params,
    cfg: model.Architecture,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: list[Sampling] | Sampling = Sampling(),
    stop_tokens: tuple[int, ...] = (),
    compute: Compute | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        params: the model's parameters.
        cfg: its architecture.
        prompts: token ids, one list a row, none empty.
        max_new_tokens: at most this many new tokens a row; a row also ends where the context is full.
        sampling: one for all rows, or one for each.
        stop_tokens: a row ends before the first of these.

    Returns:
        The new tokens of each row, without prompt and stop token.

    Raises:
        UserError: if a prompt is empty, or leaves no room for a new token.
    """
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("generate: a prompt is empty; begin it with the <|bos|> token")
    if longest >= cfg.sequence_len:
        raise UserError(f"generate: a prompt of {longest} tokens leaves no room in a context of {cfg.sequence_len}")
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens={max_new_tokens} must be at least 1")
    rows = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    padded = min(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, cfg.sequence_len)
    prompts_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BT[row, : len(prompt)] = prompt
    counts_B = np.array([len(prompt) for prompt in prompts], np.int32)
    output_BT = _generate(
        params, prompts_BT, counts_B, SamplingArrays.of(rows), np.array(stop_tokens, np.int32),
        cfg=cfg, compute=compute or default_compute(), max_new=max_new_tokens, max_len=cfg.sequence_len,
    )  # fmt: skip
    room_B = cfg.sequence_len - counts_B
    return [
        [int(token) for token in row[:room] if token >= 0]
        for row, room in zip(np.asarray(output_BT), room_B, strict=True)
    ]
