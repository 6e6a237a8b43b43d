"""Programs for eight H200s compile, on a machine without a GPU. The plugin is large: in an environment of its own,

pip install -r requirements.txt -r requirements-dev.txt 'jax[cuda13]'
python -m pytest -m slow tests/test_gpu_programs.py
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax import generate, model, sharding
from nanochat_jax.config import from_depth
from nanochat_jax.layers import Compute
from nanochat_jax.sharding import BATCH_AXES, MeshConfig
from train.bench_train import Train, lay_out
from train.pretrain import ModelArgs

pytestmark = pytest.mark.slow
pytest.importorskip("jax_plugins.xla_cuda13")

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150110000000
  cuda_compute_capability { major: 9 }
}
runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 } platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
COMPUTE = Compute("bfloat16", "cudnn")


@pytest.fixture(scope="module")
def h200s():
    return topologies.get_topology_desc("eight", platform="cuda", topology="1x1x8", target_config=H200).devices


@pytest.fixture
def compiled(monkeypatch):
    """Lower and compile for the GPUs of a mesh; nothing is tried out, for there is nothing to try it on."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def compiled(jitted, mesh, *args):
        with sharding.on(mesh):
            lowered = jitted.trace(*args).lower(lowering_platforms=("cuda",))
            return lowered.compile({"xla_gpu_autotune_level": 0}).as_text()

    return compiled


def abstract(tree, mesh, spec):
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@pytest.mark.parametrize(("shape", "fp8"), product([(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)], [False, True]))
@pytest.mark.parametrize("segments", [False, True])
def test_the_training_step(h200s, compiled, monkeypatch, shape, fp8, segments):
    monkeypatch.setattr("train.stage.ComputeConfig.resolve", lambda *_: COMPUTE)
    config = Train(model=ModelArgs(depth=4, fp8=fp8), batch=2, sequence_len=1024, mesh=MeshConfig(*shape))
    work = lay_out(config, h200s[: shape[0] * shape[1] * shape[2]])
    rows = jax.ShapeDtypeStruct((1, work.rows, 1024), jnp.int32)
    names = ("tokens", "targets", *(("segment_ids",) if segments else ()))
    batch = abstract(dict.fromkeys(names, rows), work.mesh, PartitionSpec(None, BATCH_AXES))
    program = compiled(work.step(), work.mesh, work.like, batch)
    assert program.count("__cudnn$fmha") >= 2 * 4  # of each layer, forward and backward
    kernels = {"_gram_block": True} | dict.fromkeys(("_norm_gradient", "_turn_gradient", "_gradient"), shape[2] == 1)
    kernels["_tile_both_ways"] = fp8 and shape[2] == 1  # what the compiler cuts is left to it
    assert {name: f'"{name}"' in program for name in kernels} == kernels
    assert ("f8e4m3" in program) == fp8
    assert "__triton_gemm" not in program


@pytest.mark.parametrize(("shape", "rows"), [((1, 1, 1), 1), ((1, 1, 1), 16), ((4, 1, 2), 16), ((1, 8, 1), 8)])
def test_decoding(h200s, compiled, shape, rows):
    cfg = from_depth(4)
    mesh = sharding.make_mesh(MeshConfig(*shape), h200s[: shape[0] * shape[1] * shape[2]])
    init = partial(model.init_params, jax.random.key(0), cfg, Compute("bfloat16"))
    params = jax.eval_shape(lambda: generate.in_dtype(init(), "bfloat16"))
    places = sharding.param_shardings(mesh, model.logical_axes(cfg), params)
    params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, places)
    spec = PartitionSpec(BATCH_AXES)
    slots = abstract(jax.eval_shape(lambda: generate.empty_slots(rows, cfg, COMPUTE, 2048)), mesh, spec)
    forced, limits = (abstract(jax.ShapeDtypeStruct(s, jnp.int32), mesh, spec) for s in ((rows, 16), (rows,)))
    decode = jax.jit(partial(generate.decode, cfg=cfg, compute=COMPUTE))
    program = compiled(decode, mesh, params, slots, forced, limits)
    assert program.count('"__gpu$xla.gpu.triton"') == cfg.n_layer + 1  # one searches
    prompt = abstract(jax.ShapeDtypeStruct((rows, 512), jnp.int32), mesh, spec)
    for chunk in (generate.begin, generate.prefill):
        feed = jax.jit(partial(chunk, cfg=cfg, compute=COMPUTE))
        assert "__cudnn$fmha" in compiled(feed, mesh, params, slots.rows, prompt, limits)
