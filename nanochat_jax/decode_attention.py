"""Attention of one new token a row over a key-value cache, as a kernel for NVIDIA GPUs.

A row's cache is read in stretches of fixed length, and only as far as the row has filled it: conversations are mostly
shorter than the context. Each stretch gives a part of the softmax, and the parts are put together at the end
(flash-decoding). A row's result depends on nothing but the row.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

STRETCH, BLOCK = 256, 64  # slots that one program reads, and reads at once
MASKED = -1e30


def supports(q_BKGH: jax.Array, k_BKSH: jax.Array) -> bool:
    """Whether the kernel can take these shapes: it wants powers of two."""
    G, H = q_BKGH.shape[2:]
    return k_BKSH.shape[2] >= BLOCK and G & (G - 1) == 0 and H & (H - 1) == 0 and H >= 16


@partial(custom_partitioning, static_argnums=(4, 5))
def decode_attention(
    q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array, window: int, interpret: bool = False
) -> jax.Array:
    """Mix the values that each row's newest token sees.

    Args:
        q_BKGH: queries, G of them for each of K heads of keys.
        k_BKSH: keys; position p lies in slot p % S, the newest token's among them.
        v_BKSH: values.
        lengths_B: int32, tokens of each row, the newest counted; 0 for an empty row, whose result means nothing.
        window: keys seen before the newest.
        interpret: run without a GPU, for tests.

    Returns:
        (B, K, G, H) in v's dtype.
    """
    B, K, G, H = q_BKGH.shape
    S = k_BKSH.shape[2]
    stretches = -(-S // STRETCH)
    per_stretch = jax.ShapeDtypeStruct((B, K, stretches, G), jnp.float32)
    mixed_BKNGH, most_BKNG, total_BKNG = pl.pallas_call(
        partial(_attention_stretch, slots=S, window=window),
        grid=(B, K, stretches),
        in_specs=[
            pl.BlockSpec((1,), lambda b, k, n: (b,)),
            pl.BlockSpec((1, 1, G, H), lambda b, k, n: (b, k, 0, 0)),
            pl.BlockSpec((1, 1, S, H), lambda b, k, n: (b, k, 0, 0)),
            pl.BlockSpec((1, 1, S, H), lambda b, k, n: (b, k, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, 1, G, H), lambda b, k, n: (b, k, n, 0, 0)),
            pl.BlockSpec((1, 1, 1, G), lambda b, k, n: (b, k, n, 0)),
            pl.BlockSpec((1, 1, 1, G), lambda b, k, n: (b, k, n, 0)),
        ],
        out_shape=[jax.ShapeDtypeStruct((B, K, stretches, G, H), jnp.float32), per_stretch, per_stretch],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(lengths_B, q_BKGH, k_BKSH, v_BKSH)
    weight_BKNG = jnp.exp(most_BKNG - jnp.max(most_BKNG, axis=2, keepdims=True))
    total_BKG = jnp.sum(weight_BKNG * total_BKNG, axis=2)
    mixed_BKGH = jnp.sum(weight_BKNG[..., None] * mixed_BKNGH, axis=2)
    return (mixed_BKGH / jnp.maximum(total_BKG, 1e-30)[..., None]).astype(v_BKSH.dtype)


def _attention_stretch(
    length_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, mixed_ref: Any, most_ref: Any, total_ref: Any,
    *, slots: int, window: int,
) -> None:  # fmt: skip
    G, H = q_ref.shape[2:]
    length = length_ref[0]
    first = pl.program_id(2) * STRETCH
    end = jnp.minimum(jnp.minimum(first + STRETCH, slots), length)  # nothing lies behind a row's length
    q_G1H = q_ref[0, 0].astype(jnp.float32)[:, None, :] * H**-0.5

    def add(i: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed_GH, most_G, total_G = parts
        start = jnp.minimum(first + i * BLOCK, slots - BLOCK)  # the last block begins early, to fit
        slot_S = start + jax.lax.iota(jnp.int32, BLOCK)
        distance_S = (length - 1 - slot_S + slots) % slots  # to the newest token
        seen_S = (slot_S >= first + i * BLOCK) & (slot_S < end) & (distance_S <= window)
        keys_SH, values_SH = (ref[0, 0, pl.ds(start, BLOCK), :].astype(jnp.float32) for ref in (k_ref, v_ref))
        scores_GS = jnp.where(seen_S[None], jnp.sum(q_G1H * keys_SH[None], axis=-1), MASKED)
        new_most_G = jnp.maximum(most_G, jnp.max(scores_GS, axis=-1))
        weights_GS = jnp.where(seen_S[None], jnp.exp(scores_GS - new_most_G[:, None]), 0.0)
        old_G = jnp.exp(most_G - new_most_G)
        mixed_GH = old_G[:, None] * mixed_GH + jnp.sum(weights_GS[:, :, None] * values_SH[None], axis=1)
        return mixed_GH, new_most_G, old_G * total_G + jnp.sum(weights_GS, axis=-1)

    nothing = jnp.zeros((G, H)), jnp.full((G,), MASKED), jnp.zeros((G,))
    blocks = (jnp.maximum(end - first, 0) + BLOCK - 1) // BLOCK
    mixed_ref[0, 0, 0], most_ref[0, 0, 0], total_ref[0, 0, 0] = jax.lax.fori_loop(0, blocks, add, nothing)


def _partition(window: int, interpret: bool, mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
    """Rows and heads are independent: each device computes its own."""
    rows, heads = (*arg_shapes[0].sharding.spec, None, None)[:2]
    four, one = NamedSharding(mesh, PartitionSpec(rows, heads)), NamedSharding(mesh, PartitionSpec(rows))
    own = partial(decode_attention.fun, window=window, interpret=interpret)
    return mesh, own, four, (four, four, four, one)


decode_attention.def_partition(partition=_partition, sharding_rule="b k g h, b k s h, b k s h, b -> b k g h")
