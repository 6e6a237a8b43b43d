"""The key-value cache: a plain pytree that goes into the model and comes out again.

Each row (conversation) has its own length. A layer's cache holds S slots, and position p lives in slot p % S:
S is the whole context for layers that see everything, window + 1 for the others, which so become rings.
Absolute positions follow from the lengths alone. Padding tokens are never written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.config import Architecture


class KVCache(NamedTuple):
    """What attention has computed of each row's earlier tokens."""

    keys: tuple[jax.Array, ...]  # per layer (B, K, S, H), as products with one query need them, in the compute dtype
    values: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32, tokens seen by each row
    last_embed_BD: jax.Array  # embedding of the last token before smear; zero in an empty row


class EmptyCache(KVCache):
    """A cache that is known to hold nothing when a program is compiled, so that attention need not look into it."""

    __slots__ = ()


def init_cache(cfg: Architecture, batch: int, dtype: str, max_len: int | None = None) -> KVCache:
    """An empty cache for rows of up to max_len tokens (default: the model's sequence_len), of dtype `dtype`."""
    slots = [min(max_len or cfg.sequence_len, spec.window + 1) for spec in cfg.layer_specs()]
    shapes = [(batch, cfg.n_kv_head, S, cfg.head_dim) for S in slots]
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        lengths_B=jnp.zeros(batch, jnp.int32),
        last_embed_BD=jnp.zeros((batch, cfg.n_embd), dtype),
    )


def slot_positions(lengths_B: jax.Array, S: int) -> jax.Array:
    """Absolute position held by each of the S slots, -1 where a slot is still empty: (B, S) int32."""
    last_B1, slots_1S = lengths_B[:, None] - 1, jnp.arange(S, dtype=jnp.int32)[None, :]
    positions_BS = last_B1 - (last_B1 - slots_1S) % S
    return jnp.where((positions_BS >= 0) & (last_B1 >= 0), positions_BS, -1)


def write(slots_BKSH: jax.Array, new_BTKH: jax.Array, lengths_B: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Write each row's first counts_B new entries behind its lengths_B old ones; a ring keeps the last S."""
    B, _, S, _ = slots_BKSH.shape
    t_1T = jnp.arange(new_BTKH.shape[1], dtype=jnp.int32)[None, :]
    kept_BT = (t_1T < counts_B[:, None]) & (t_1T >= counts_B[:, None] - S)
    slot_BT = jnp.where(kept_BT, (lengths_B[:, None] + t_1T) % S, S)  # S is out of range, hence dropped
    return slots_BKSH.at[jnp.arange(B)[:, None], :, slot_BT].set(new_BTKH.astype(slots_BKSH.dtype), mode="drop")


class Stretch(NamedTuple):
    """What a stretch of T tokens added to one row of a cache."""

    keys: tuple[jax.Array, ...]  # per layer (1, T, K, H), of a ring at most the last S of them
    values: tuple[jax.Array, ...]
    last_embed_1D: jax.Array


def take(cache: KVCache, row: jax.Array, T: int) -> Stretch:
    """The last T tokens of a row."""

    def last(slots_BKSH: jax.Array) -> jax.Array:
        count = min(T, slots_BKSH.shape[2])
        slots_T = (cache.lengths_B[row] - count + jnp.arange(count, dtype=jnp.int32)) % slots_BKSH.shape[2]
        return slots_BKSH[row][:, slots_T].swapaxes(0, 1)[None]

    keys, values = (tuple(map(last, layers)) for layers in (cache.keys, cache.values))
    return Stretch(keys, values, cache.last_embed_BD[row][None])


def put(cache: KVCache, stretch: Stretch, counts_B: jax.Array) -> KVCache:
    """Append a stretch of T tokens to the rows where counts_B is T, and nothing where it is 0.

    The rows are then, bit for bit, what feeding them the tokens would have made of them.
    """
    new_B1 = counts_B[:, None] > 0

    def append(slots_BKSH: jax.Array, new_1TKH: jax.Array) -> jax.Array:
        new_BTKH = jnp.broadcast_to(new_1TKH, (counts_B.shape[0], *new_1TKH.shape[1:]))
        written_B = jnp.minimum(counts_B, new_1TKH.shape[1])
        return write(slots_BKSH, new_BTKH, cache.lengths_B + counts_B - written_B, written_B)

    return KVCache(
        keys=tuple(map(append, cache.keys, stretch.keys)),
        values=tuple(map(append, cache.values, stretch.values)),
        lengths_B=cache.lengths_B + counts_B,
        last_embed_BD=jnp.where(new_B1, stretch.last_embed_1D, cache.last_embed_BD),
    )
