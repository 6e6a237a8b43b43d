"""Eight virtual CPU devices, so that every multi-device test runs everywhere, and strict broadcasting."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same small programs are compiled by many tests and by the processes that tests start.
jax.config.update("jax_compilation_cache_dir", os.environ.get("NANOCHAT_TEST_CACHE", "/tmp/nanochat_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
