"""Attention on TPUs by JAX's Pallas "splash" kernels, which skip the blocks that a window masks."""

from functools import partial

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from nanochat_jax.sharding import over_rows_and_heads

LANES = 128  # of a TPU's registers: lengths must divide by it
LARGEST_BLOCK = 1024  # queries, and keys, of a block; on a v6e another port found 1,024 faster than 512


def fits(q_BTNH: jax.Array) -> bool:
    """Whether the kernels take sequences of this length."""
    return q_BTNH.shape[1] % LANES == 0


def block_size(T: int, window: int) -> int:
    """Queries, and keys, of a block: many, but no more than the window, so that a window skips something."""
    most = min(LARGEST_BLOCK, max(window, LANES))
    return max(size for size in range(LANES, most + 1, LANES) if T % size == 0)


def computed_area(T: int, window: int) -> int:
    """Pairs of a query and a key in the blocks that are not skipped: what a head's scores cost."""
    block = block_size(T, window)
    first_keys = [max(0, start - window) // block for start in range(0, T, block)]
    return sum(row + 1 - first for row, first in enumerate(first_keys)) * block**2


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: int,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """attention.attend with the splash kernels; interpreted they run anywhere, slowly, for tests."""
    local = partial(_attend_on_one_device, window=window, interpret=interpret)
    return over_rows_and_heads(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _attend_on_one_device(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    window: int,
    interpret: bool,
) -> jax.Array:
    T, N, H = q_BTNH.shape[1:]
    block, order = block_size(T, window), kernel.QKVLayout.SEQ_MINOR
    mask = masks.MultiHeadMask([masks.LocalMask((T, T), (window, 0), 0)] * N)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
        q_layout=order, k_layout=order, v_layout=order,  # as the projections' products lie: nothing is transposed
    )  # fmt: skip
    one_row = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
    segments = None if segment_ids_BT is None else kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    return jax.vmap(one_row)(q_BNTH, k_BKTH, v_BKTH, segments).swapaxes(1, 2)
