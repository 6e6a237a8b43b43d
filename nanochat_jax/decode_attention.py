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

STRETCH, BLOCK = 576, 64  # slots that one program reads, and reads at once; nanochat's window of 513 is one stretch
MASKED = -1e30
TILE = 16  # rows that a tensor core multiplies at least


def supports(q_BKGH: jax.Array, k_BKSH: jax.Array, window: int) -> bool:
    """Whether the kernel can take these: powers of two, one dtype, a cache that holds nothing out of the window."""
    (G, H), S = q_BKGH.shape[2:], k_BKSH.shape[2]
    return (
        q_BKGH.dtype == k_BKSH.dtype
        and BLOCK <= S <= window + 1
        and G & (G - 1) == 0
        and H & (H - 1) == 0
        and H >= TILE
    )


@partial(custom_partitioning, static_argnums=(4,))
def decode_attention(
    q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array, interpret: bool = False
) -> jax.Array:
    """Mix the values that each row's newest token sees: all that its cache holds.

    Args:
        q_BKGH: queries, G of them for each of K heads of keys.
        k_BKSH: keys, the newest token's among them; the first min(length, S) slots of a row are filled.
        v_BKSH: values.
        lengths_B: int32, tokens of each row, the newest counted; 0 for an empty row, whose result means nothing.
        interpret: run without a GPU, for tests.

    Returns:
        (B, K, G, H) in v's dtype.
    """
    B, K, G, H = q_BKGH.shape
    S = k_BKSH.shape[2]
    stretches = -(-S // STRETCH)
    mixed_BKNGH, lse_BKNG = pl.pallas_call(
        partial(_attention_stretch, slots=S),
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
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, stretches, G, H), v_BKSH.dtype if stretches == 1 else jnp.float32),
            jax.ShapeDtypeStruct((B, K, stretches, G), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(lengths_B, q_BKGH, k_BKSH, v_BKSH)
    if stretches == 1:
        return mixed_BKNGH[:, :, 0]
    weight_BKNG = jax.nn.softmax(lse_BKNG, axis=2)
    return jnp.sum(weight_BKNG[..., None] * mixed_BKNGH, axis=2).astype(v_BKSH.dtype)


def _attention_stretch(
    length_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, mixed_ref: Any, lse_ref: Any, *, slots: int
) -> None:
    G, H = q_ref.shape[2:]
    first = pl.program_id(2) * STRETCH
    end = jnp.minimum(jnp.minimum(first + STRETCH, slots), length_ref[0])
    copies = max(1, TILE // G)  # of the same queries, to fill a tile
    q_RH = jnp.broadcast_to(q_ref[0, 0][None], (copies, G, H)).reshape(copies * G, H)

    def add(i: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed_RH, most_R, total_R = parts
        start = jnp.minimum(first + i * BLOCK, slots - BLOCK)  # the last block begins early, to fit
        slot_S = start + jax.lax.iota(jnp.int32, BLOCK)
        seen_1S = ((slot_S >= first + i * BLOCK) & (slot_S < end))[None]
        keys_SH, values_SH = k_ref[0, 0, pl.ds(start, BLOCK), :], v_ref[0, 0, pl.ds(start, BLOCK), :]
        scores_RS = jnp.dot(q_RH, keys_SH.T, preferred_element_type=jnp.float32) * H**-0.5
        scores_RS = jnp.where(seen_1S, scores_RS, MASKED)
        new_most_R = jnp.maximum(most_R, jnp.max(scores_RS, axis=-1))
        weights_RS = jnp.where(seen_1S, jnp.exp(scores_RS - new_most_R[:, None]), 0.0)
        old_R = jnp.exp(most_R - new_most_R)
        new_RH = jnp.dot(weights_RS.astype(values_SH.dtype), values_SH, preferred_element_type=jnp.float32)
        return old_R[:, None] * mixed_RH + new_RH, new_most_R, old_R * total_R + jnp.sum(weights_RS, axis=-1)

    R = copies * G
    nothing = jnp.zeros((R, H)), jnp.full((R,), MASKED), jnp.zeros((R,))
    blocks = (jnp.maximum(end - first, 0) + BLOCK - 1) // BLOCK
    mixed_RH, most_R, total_R = jax.lax.fori_loop(0, blocks, add, nothing)
    total_R = jnp.maximum(total_R, 1e-30)  # of a stretch without a token 0
    mixed_RH, lse_R = mixed_RH / total_R[:, None], most_R + jnp.log(total_R)
    mixed_ref[0, 0, 0] = jnp.max(mixed_RH.reshape(copies, G, H), axis=0).astype(mixed_ref.dtype)  # the copies are equal
    lse_ref[0, 0, 0] = jnp.max(lse_R.reshape(copies, G), axis=0)


def _partition(interpret: bool, mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
    """Rows and heads are independent: each device computes its own."""
    rows, heads = (*arg_shapes[0].sharding.spec, None, None)[:2]
    four, one = NamedSharding(mesh, PartitionSpec(rows, heads)), NamedSharding(mesh, PartitionSpec(rows))
    own = partial(decode_attention.fun, interpret=interpret)
    return mesh, own, four, (four, four, four, one)


decode_attention.def_partition(partition=_partition, sharding_rule="b k g h, b k s h, b k s h, b -> b k g h")
