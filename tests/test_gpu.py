"""What only a GPU can show; run with JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_gpu.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import attention
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.metrics import read_metrics

pytestmark = pytest.mark.gpu


def relative_error(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [128, 512, 1024])
@pytest.mark.parametrize("segments", [1, 5])
def test_cudnn_attention_and_its_gradients_equal_the_reference(window, kv_heads, segments):
    keys = jax.random.split(jax.random.key(0), 4)
    q, out_grad = (jax.random.normal(key, (2, 1024, 4, 128)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 1024, kv_heads, 128)) for key in keys[2:])
    segment_ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, 1024), 0, segments)) if segments > 1 else None

    def run(backend, dtype):
        def weighted(q, k, v):
            options = {"window": window, "segment_ids_BT": segment_ids, "backend": backend}
            out = attention.attend(*(x.astype(dtype) for x in (q, k, v)), **options)
            return jnp.sum(out.astype(jnp.float32) * out_grad), out

        with jax.default_matmul_precision("highest"):
            gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    for found, wanted in zip(run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True):
        assert relative_error(found, wanted) < 1e-2


def pretrain(data: Path, out: Path, *flags: str) -> list[float]:
    command = [
        sys.executable, "-m", "train.pretrain", "--data", str(data), "--run.out", str(out), "--model.depth", "2",
        "--model.head-dim", "64", "--steps", "30", "--batch-tokens", "512", "--optim.warmup-steps", "2",
        "--lr-scale", "0.1", *flags,
    ]  # fmt: skip
    environment = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run(command, env=environment, check=True)
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


def test_bfloat16_trains_like_float32(tiny_data, tmp_path):
    narrow = pretrain(tiny_data, tmp_path / "bf16", "--run.compute.attention", "xla")
    wide = pretrain(tiny_data, tmp_path / "f32", "--run.compute.dtype", "float32", "--run.compute.attention", "xla")
    assert narrow[-1] < narrow[0] - 0.5
    np.testing.assert_allclose(narrow, wide, rtol=0.03)


def test_a_deterministic_run_repeats_bitwise(tiny_data, tmp_path):
    runs = [pretrain(tiny_data, tmp_path / name, "--run.compute.deterministic") for name in ("a", "b")]
    assert runs[0] == runs[1]
    arrays = [Checkpoints(tmp_path / name / "checkpoints").peek().arrays for name in ("a", "b")]
    assert arrays[0] == arrays[1]
