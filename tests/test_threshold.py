"""The searches for the least probability that is kept find the same one: on CPUs, on TPUs, on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax import threshold


def example(seed, V):
    probs_BV = jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), (8, V)))
    most_B = jnp.array([V + 1, 1, 2, 5, 50, V + 1, V + 1, V], jnp.int32)
    mass_B = jnp.array([jnp.inf, jnp.inf, 0.9, 0.5, jnp.inf, 0.1, 0.999, jnp.inf], jnp.float32)
    return probs_BV, most_B, mass_B


@pytest.mark.parametrize(("seed", "V"), [(0, 700), (1, 700), (2, 512)])
def test_all_searches_find_the_same_threshold(seed, V):
    probs_BV, most_B, mass_B = example(seed, V)
    operands = probs_BV, jax.lax.bitcast_convert_type(probs_BV, jnp.int32), most_B, mass_B
    by_halves = threshold._least_by_halves(*operands)
    np.testing.assert_array_equal(threshold._least_by_digits(*operands), by_halves)
    by_kernel = threshold.least_by_kernel(probs_BV, most_B, mass_B, True)
    np.testing.assert_array_equal(by_kernel, jax.lax.bitcast_convert_type(by_halves, jnp.float32))


def test_rows_stay_on_their_devices():
    operands = example(0, 512)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(operands, NamedSharding(mesh, PartitionSpec("rows")))
    program = jax.jit(lambda *operands: threshold.least_by_kernel(*operands, True)).lower(*placed).compile()
    assert not any(kind in program.as_text() for kind in ("all-gather", "all-reduce", "collective-permute"))
    np.testing.assert_array_equal(program(*placed), threshold.least_by_kernel(*operands, True))


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
@pytest.mark.parametrize("V", [32768, 50257])
def test_kernel_is_one_that_triton_takes(lowered_for, gpu, V):
    probs_BV, of_row = jax.ShapeDtypeStruct((2, V), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    most_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert "triton" in lowered_for(gpu, threshold.least_by_kernel.fun, probs_BV, most_B, of_row)
