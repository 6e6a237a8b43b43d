"""The kernel for one new token, run without a GPU, against attention with an explicit mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax.attention import masked_attention
from nanochat_jax.cache import slot_positions
from nanochat_jax.decode_attention import BLOCK, decode_attention, supports

B, K, G, H = 8, 2, 2, 16


def example(S, window):
    keys = jax.random.split(jax.random.key(S), 3)
    q_BKGH = jax.random.normal(keys[0], (B, K, G, H))
    k_BKSH, v_BKSH = (jax.random.normal(key, (B, K, S, H)) for key in keys[1:])
    is_ring = window < S
    lengths_B = jnp.array([1, 5, BLOCK, BLOCK + 1, S - 1, S, S + 3 if is_ring else 2, 2 * S if is_ring else 7])
    lengths_B = lengths_B.astype(jnp.int32)
    positions_BS = slot_positions(lengths_B, S)
    distance_BS = (lengths_B - 1)[:, None] - positions_BS
    mask_BS = (positions_BS >= 0) & (distance_BS <= window)
    expected = masked_attention(q_BKGH.reshape(B, 1, K * G, H), k_BKSH, v_BKSH, mask_BS[:, None])
    return (q_BKGH, k_BKSH, v_BKSH, lengths_B), expected.reshape(B, K, G, H)


@pytest.mark.parametrize(("S", "window"), [(65, 64), (300, 1000), (513, 512), (700, 100)])
def test_kernel_sees_what_the_mask_allows(S, window):
    operands, expected = example(S, window)
    np.testing.assert_allclose(decode_attention(*operands, window, True), expected, atol=2e-6)


def test_rows_and_heads_stay_on_their_devices():
    operands, expected = example(300, 1000)
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    specs = [PartitionSpec("rows", "heads")] * 3 + [PartitionSpec("rows")]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    program = jax.jit(lambda *operands: decode_attention(*operands, 1000, True)).lower(*placed).compile()
    assert not any(kind in program.as_text() for kind in ("all-gather", "all-reduce", "collective-permute"))
    result = program(*placed)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert result.sharding.spec[:2] == ("rows", "heads")


def test_odd_shapes_are_declined():
    assert supports(jnp.zeros((1, 1, 1, 128)), jnp.zeros((1, 1, 513, 128)))
    assert not supports(jnp.zeros((1, 1, 3, 128)), jnp.zeros((1, 1, 513, 128)))
    assert not supports(jnp.zeros((1, 1, 1, 128)), jnp.zeros((1, 1, BLOCK - 1, 128)))
