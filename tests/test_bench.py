"""Benchmarks measure what they say; how fast anything is, no test says."""

import pytest

from nanochat_jax.errors import UserError
from nanochat_jax.profile import Kernel, summary
from nanochat_jax.sharding import MeshConfig
from train import bench
from train.bench_train import Deepest, Scaling, Train
from train.pretrain import ModelArgs
from train.timing import Device

SMALL = {"model": ModelArgs(depth=1, head_dim=32), "sequence_len": 64, "vocab_size": 256}
ONCE = Device(calls=1, repeats=1)


def test_more_devices_do_as_much_each(capsys):
    every = MeshConfig(data=-1, fsdp=2, tensor=1)
    result = bench.main(Scaling(**SMALL, batch=2, accumulate=2, devices=(2, 4), mesh=every, device=ONCE))
    two, four = result["by_devices"]["2"], result["by_devices"]["4"]
    assert (two["mesh"], four["mesh"]) == ({"data": 1, "fsdp": 2, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 1})
    assert two["efficiency"] == 1
    assert four["efficiency"] == pytest.approx(four["tokens_per_second"] / 2 / two["tokens_per_second"])
    tokens = 2 * 2 * 64 * 4
    assert four["tokens_per_second"] == pytest.approx(tokens / four["milliseconds"] * 1e3, rel=1e-3)
    assert two["sent_mib"]["all-gather"] > 0 and four["sent_mib"]["reduce-scatter"] > 0
    assert '"by_devices"' in capsys.readouterr().out


def test_the_parts_of_a_step_are_measured():
    result = bench.main(Train(**SMALL, batch=1, mesh=MeshConfig(8, 1, 1), device=ONCE))
    assert set(result["milliseconds"]) == {"forward_backward", "optimizer", "step"}
    assert all(value > 0 for value in result["milliseconds"].values())
    assert result["tokens_per_second"]["step"] == pytest.approx(8 * 64e3 / result["milliseconds"]["step"], rel=1e-3)


def test_counts_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="there are 8"):
        bench.main(Scaling(**SMALL, devices=(1, 9)))


def test_the_deepest_model_is_the_last_that_fits(capsys):
    asked = {**SMALL, "batch": 1, "stride": 1, "memory_gib": 0.004}
    found = bench.main(Deepest(**asked))["deepest"]
    said = capsys.readouterr().err
    assert f"depth {found['depth']}: " in said and f"depth {found['depth'] + 1}: " in said
    assert said.count("does not fit") >= 1 and found["gib_a_device"] <= 0.004
    with pytest.raises(UserError, match="not even depth 1"):
        bench.main(Deepest(**asked | {"memory_gib": 1e-6}))


def test_a_trace_by_hand():
    """Nanoseconds of two devices: what runs at once is busy once, and communication beside other work is hidden."""
    one = [
        Kernel("gemm_a", 0, 4e6),
        Kernel("ncclDevKernel_AllGather", 2e6, 8e6),  # hidden for 2 + 1 of its 6
        Kernel("add", 7e6, 10e6),
    ]
    other = [Kernel("gemm_a", 0, 8e6), Kernel("gemm_b", 9e6, 10e6)]
    found = summary([one, other], calls=2, most=2)
    assert found["groups"] == {"matrix": 3.25, "communication": 1.5, "element-wise": 0.75}
    assert found["kernels"] == {"gemm_a": 3.0, "ncclDevKernel_AllGather": 1.5}
    assert (found["idle"], found["hidden_communication"]) == (0.25, 0.75)
    assert "hidden_communication" not in summary([other], calls=1, most=1)
