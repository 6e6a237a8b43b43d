"""Causal attention within a window: one contract, several backends.

A query at position p sees the keys at positions p-window … p (window + 1 of them), of its own segment where
segments are given. Scores are scaled by 1/sqrt(head_dim) and the softmax runs in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp

from nanochat_jax import splash
from nanochat_jax.cache import EmptyCache, KVCache, slot_positions, write
from nanochat_jax.decode_attention import decode_attention, supports
from nanochat_jax.sharding import over_rows_and_heads

QUERY_CHUNK = 256  # queries a block of the chunked backend: small enough to skip most of what is masked
KEY_BLOCK = 128  # keys a block where one query looks into a cache on a CPU


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: int,
    segment_ids_BT: jax.Array | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Self-attention over whole sequences, as in training.

    Args:
        q_BTNH: queries; N is a multiple of K (grouped-query attention).
        k_BTKH: keys of the same T positions.
        v_BTKH: values.
        window: keys seen before the query's own.
        segment_ids_BT: int32; a query sees only keys of its own segment.
        backend: "cudnn" (NVIDIA Ampere and newer), "splash" (TPU, sequences of whole 128s; "splash-interpreted" to
            test it elsewhere), or "xla" (everywhere, in chunks of queries).

    Returns:
        (B, T, N, H) in q's dtype.
    """
    T = q_BTNH.shape[1]
    if backend == "cudnn":
        cudnn = partial(_cudnn_attention, window=window)
        return over_rows_and_heads(cudnn, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    if backend.startswith("splash") and splash.fits(q_BTNH):
        interpret = backend == "splash-interpreted"
        return splash.attend(q_BTNH, k_BTKH, v_BTKH, window=window, segment_ids_BT=segment_ids_BT, interpret=interpret)
    outputs = []
    for start in range(0, T, QUERY_CHUNK):
        stop, first_key = min(start + QUERY_CHUNK, T), max(0, start - window)
        queries, keys = slice(start, stop), slice(first_key, stop)
        distance_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first_key, stop)[None, :]
        mask_BTS = ((distance_TS >= 0) & (distance_TS <= window))[None]
        if segment_ids_BT is not None:
            mask_BTS &= segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys]
        k_BKSH, v_BKSH = (x[:, keys].swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
        outputs.append(masked_attention(q_BTNH[:, queries], k_BKSH, v_BKSH, mask_BTS))
    return jnp.concatenate(outputs, axis=1)


def _cudnn_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array | None, *, window: int
) -> jax.Array:
    local = (window, 0) if window < q_BTNH.shape[1] - 1 else None
    same_B1TS = None if ids_BT is None else (ids_BT[:, None, :, None] == ids_BT[:, None, None, :])
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_B1TS, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def attend_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: KVCache,
    layer: int,
    counts_B: jax.Array,
    *,
    window: int,
    backend: str = "xla",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a chunk over what a layer's cache holds and the chunk itself.

    Args:
        q_BTNH: queries of the T tokens that follow each row's cache.lengths_B earlier ones.
        k_BTKH: their keys; they are added to the cache.
        v_BTKH: their values; likewise.
        cache: the whole cache; only this layer of it is read.
        layer: which.
        counts_B: how many of the T tokens are real; the others' outputs mean nothing.
        window: keys seen before the query's own.
        backend: as attend's; for one new token a row, "cudnn" means the kernel of decode_attention.py, which wants
            the same GPUs, and "splash" is for chunks alone that an EmptyCache precedes.

    Returns:
        (B, T, N, H) in q's dtype, and the layer's new keys and values.
    """
    old_keys, old_values, lengths_B = cache.keys[layer], cache.values[layer], cache.lengths_B
    keys, values = write(old_keys, k_BTKH, lengths_B, counts_B), write(old_values, v_BTKH, lengths_B, counts_B)
    if isinstance(cache, EmptyCache):
        return attend(q_BTNH, k_BTKH, v_BTKH, window=window, backend=backend), keys, values
    T, S = q_BTNH.shape[1], old_keys.shape[2]
    t_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    positions_BT = lengths_B[:, None] + t_1T
    if T == 1 or window >= S:  # nothing that a query of this chunk still sees has been overwritten
        seen_keys, seen_values = keys, values
        key_positions_BS = slot_positions(lengths_B + counts_B, S)
    else:
        seen_keys = jnp.concatenate([old_keys, k_BTKH.swapaxes(1, 2).astype(old_keys.dtype)], axis=2)
        seen_values = jnp.concatenate([old_values, v_BTKH.swapaxes(1, 2).astype(old_values.dtype)], axis=2)
        chunk_positions_BT = jnp.where(t_1T < counts_B[:, None], positions_BT, -1)
        key_positions_BS = jnp.concatenate([slot_positions(lengths_B, S), chunk_positions_BT], axis=1)
    distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
    mask_BTS = (distance_BTS >= 0) & (distance_BTS <= window) & (key_positions_BS >= 0)[:, None, :]
    if T > 1:
        attend_chunk = _cudnn_masked_attention if backend == "cudnn" else masked_attention
        mixed_BTNH = attend_chunk(q_BTNH, seen_keys, seen_values, mask_BTS)
    else:
        lengths_B = jnp.where(counts_B > 0, lengths_B + counts_B, 0)
        attend_one = _kernel_attention if backend == "cudnn" else _plain_attention
        mixed_BTNH = attend_one(q_BTNH, seen_keys, seen_values, mask_BTS, lengths_B, window)
    return mixed_BTNH.astype(q_BTNH.dtype), keys, values


def _cudnn_masked_attention(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="cudnn")

    return over_rows_and_heads(cudnn, q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2), mask_BTS)


def _kernel_attention(
    q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array, lengths_B: jax.Array, window: int
) -> jax.Array:
    (B, _, N, H), K = q_B1NH.shape, k_BKSH.shape[1]
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    if not supports(q_BKGH, k_BKSH, window):
        return masked_attention(q_B1NH, k_BKSH, v_BKSH, mask_B1S)
    return decode_attention(q_BKGH, k_BKSH, v_BKSH, lengths_B).reshape(B, 1, N, H)


def _plain_attention(
    q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array, lengths_B: jax.Array, _: int
) -> jax.Array:
    operands = q_B1NH, k_BKSH, v_BKSH, mask_B1S, lengths_B
    # Blocks pay on a CPU even for full caches, unless they are few.
    cpu = _blockwise_attention if k_BKSH.shape[2] > 4 * KEY_BLOCK else _whole_attention
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=_whole_attention)


def _whole_attention(
    q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array, _: jax.Array
) -> jax.Array:
    return masked_attention(q_B1NH, k_BKSH, v_BKSH, mask_B1S)


def _blockwise_attention(
    q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1S: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """masked_attention of one query, which reads only the blocks of the cache that the longest row has filled.

    On a CPU, reading the cache is most of a decoding step, and conversations are mostly shorter than the context. A
    row's result does not depend on how many blocks the others need: where the mask is False, weights are exactly 0.
    """
    (B, _, N, H), (K, S) = q_B1NH.shape, k_BKSH.shape[1:3]
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    blocks = (jnp.minimum(jnp.max(lengths_B), S) + KEY_BLOCK - 1) // KEY_BLOCK

    def block(x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * KEY_BLOCK, KEY_BLOCK, axis)  # the last one begins early, to fit

    def score(i: jax.Array, scores: jax.Array) -> jax.Array:
        new = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, block(k_BKSH, i, 2), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(scores, new, i * KEY_BLOCK, 3)

    def mix(i: jax.Array, mixed: jax.Array) -> jax.Array:
        is_new_S = block(jnp.arange(S), i, 0) >= i * KEY_BLOCK
        weights = jnp.where(is_new_S[None, None, None], block(weights_BKGS, i, 3), 0)
        return mixed + jnp.einsum("BKGS,BKSH->BKGH", weights, block(v_BKSH, i, 2), preferred_element_type=jnp.float32)

    scores = jax.lax.fori_loop(0, blocks, score, jnp.zeros((B, K, N // K, S)))
    weights_BKGS = jax.nn.softmax(jnp.where(mask_B1S[:, None], scores * H**-0.5, -1e30), axis=-1).astype(v_BKSH.dtype)
    mixed = jax.lax.fori_loop(0, blocks, mix, jnp.zeros((B, K, N // K, H)))
    return mixed.reshape(B, 1, N, H).astype(v_BKSH.dtype)


def masked_attention(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention with an explicit boolean mask: the reference that the other backends are tested against."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH).reshape(B, T, N, H)
