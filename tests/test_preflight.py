"""Compiling for TPUs that are not there. The deep models are marked slow: pytest -m slow tests/test_preflight.py."""

import json
import math
from pathlib import Path

import jax
import pytest

from nanochat_jax import optim, preflight, sharding, tpu
from nanochat_jax.capacity import choose_mesh, training_bytes
from nanochat_jax.config import OptimConfig, from_depth, horizon
from nanochat_jax.errors import UserError
from nanochat_jax.sharding import MeshConfig
from tests import public_figures
from train.preflight import Config, main
from train.pretrain import ModelArgs
from train.start import abstract_state


@pytest.fixture(scope="module")
def libtpu():
    try:
        tpu.describe("v5e:1x1")
    except UserError as error:
        pytest.skip(str(error))


def small(topology: str, **changes) -> Config:
    """Two layers of width 128, so that all topologies compile in about a minute on a quiet machine."""
    settings = {
        "model": ModelArgs(depth=2, head_dim=64, window_pattern="SL"), "sequence_len": 256, "vocab_size": 512,
        "batch_tokens": 2**15, "ratio": 50.0, "decode_rows": 0, "optimization_level": 19,
    }  # fmt: skip
    return Config(topology=topology, **settings | changes)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "mesh", "micro_batch"),
    [
        ("v4:2x2x1", MeshConfig(4, 1, 1), 16),  # two micro-batches
        ("v5e:2x4", MeshConfig(1, 8, 1), 16),
        ("v5p:2x2x2", MeshConfig(2, 2, 2), 32),
        ("v6e:2x2", MeshConfig(2, 1, 2), 32),
    ],
)
def test_a_small_model_compiles(topology, mesh, micro_batch, tmp_path, capsys):
    found = main(small(topology, mesh=mesh, micro_batch=micro_batch, out=tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text())["estimated"] == found["estimated"]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Measured:", "Estimated:", "tokens/s", "attention", "memory of a chip"))
    assert preflight.known_errors() in printed
    numbers, memory = found["measured_of_the_program"], found["measured_of_the_program"]["memory_gib"]
    assert 0 < memory["parameters"] < memory["all"] < tpu.CHIPS[topology[:3].rstrip(":")].memory_gib
    assert numbers["seconds"]["attention"] > 0  # the splash kernels were compiled
    assert sum(moved["count"] for moved in numbers["communication"].values()) > 0
    step = found["estimated"]["step_seconds"]
    assert step["ceiling"] <= step["predicted"] * (1 + 1e-9) and step["predicted"] <= step["nothing hidden"] * (
        1 + 1e-9
    )
    if mesh.tensor == 1:
        # Products of the model, of the smear and value gates, and Muon's: a lookup by one-hot product would show.
        assert 0.9 < found["estimated"]["program_flops_to_model_flops"] < 1.4
    assert found["tokens_per_step"] == 2**15 and found["steps"] == math.floor(found["steps"])


@pytest.mark.usefixtures("libtpu")
def test_the_largest_micro_batch_that_fits_is_found():
    """Logits of 2,048 × 2¹⁹ tokens take 2 GiB a row: 32 rows are too many for the 15.75 GiB of a v5e."""
    wide = {"sequence_len": 2048, "vocab_size": 2**19, "batch_tokens": 2**16, "ratio": 1.0}
    wide["model"] = ModelArgs(depth=1, head_dim=64, window_pattern="L")
    found = main(small("v5e:1x1", **wide))
    assert 1 <= found["micro_batch"] < 8 and found["accumulate"] == 32 // found["micro_batch"]
    with pytest.raises(UserError, match=r"need [\d.]+ GiB of a chip, v5e:1x1 has 15.75: about --micro-batch \d would"):
        main(small("v5e:1x1", **wide, micro_batch=32))


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_generation_compiles_and_lines_are_drawn():
    shallow = {"model": ModelArgs(depth=4, head_dim=128, window_pattern="L"), "mesh": MeshConfig(1, 4, 1)}
    whole = main(small("v5e:2x2", **shallow, micro_batch=8, decode_rows=4))
    line = main(small("v5e:2x2", **shallow, micro_batch=8, layers=(2, 3)))
    assert whole["decode"]["memory_gib"]["all"] > 0 and whole["decode"]["elapsed_seconds"] > 0
    found, wanted = (x["measured_of_the_program"]["matrix_flops"] for x in (line, whole))
    assert found == pytest.approx(wanted, rel=0.05)


def test_what_a_line_says():
    few = {"a": 1.0, "b": {"c": 10.0}}
    assert preflight.extrapolate({2: few, 4: {"a": 2.0, "b": {"c": 10.0, "d": 4.0}}}, 8) == {
        "a": 4.0, "b": {"c": 10.0, "d": 12.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v9:2x2"}, "'v9:2x2' is not known; known are v4: 2x2x1"),
        ({"topology": "v5p"}, "'v5p' is not known"),
        ({"topology": "v6e:2x2x2"}, "'v6e:2x2x2' is not known"),
        ({"topology": "v5e:2x4", "slices": 0}, "--slices 0 must be at least 1"),
        ({"topology": "v5e:2x4", "layers": (2, 3)}, "--layers 2 3 must be two different multiples of 2"),
    ],
)
def test_bad_input_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        main(small(**changes))


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v5p:3x3x3"}, "'v5p:3x3x3' does not exist .*known are v4"),
        ({"topology": "v5e:2x4", "mesh": MeshConfig(fsdp=3)}, "does not use 8 devices"),
        ({"topology": "v6e:2x2", "mesh": MeshConfig(1, 1, 4)}, "tensor=4 does not divide 2 heads"),
        ({"topology": "v5e:2x4", "micro_batch": 7}, "16 rows a device and step do not divide by micro-batch=7"),
        (
            {"topology": "v5e:16x16", "mesh": MeshConfig(256, 1, 1)},
            "128 rows a step do not divide by 256 data-parallel devices",
        ),
    ],
)
def test_what_does_not_fit_the_slice_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        main(small(**changes))


@pytest.mark.usefixtures("libtpu")
def test_a_mesh_that_is_chosen_for_tpus_keeps_tiles_whole():
    """Of a width of 256, 16 devices have whole tiles of 16 rows each; 32, where more memory is left, do not."""
    cfg = from_depth(4, vocab_size=512, sequence_len=256, head_dim=64)
    tx = optim.make_optimizer(cfg, horizon(cfg), OptimConfig(), "bfloat16")

    def like_on(mesh):
        return abstract_state(cfg, preflight.COMPUTE, tx, mesh)

    devices = list(tpu.describe("v5p:4x4x4").devices)
    on_16 = training_bytes(like_on(sharding.make_mesh(MeshConfig(fsdp=16), devices)))
    mesh = choose_mesh(MeshConfig(), cfg, 64, like_on, devices, limit=int(1.1 * on_16))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 16, "tensor": 1}


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tpu, "get_tpu_library_path", lambda: None)
    with pytest.raises(UserError, match=r"bash train/setup.sh --preflight, or pip install -r requirements-tpu.txt"):
        tpu.describe("v5e:2x4")


def test_the_pin_is_of_the_series_that_jax_asks_for():
    from importlib.metadata import requires

    (wanted,) = [line for line in requires("jax") or [] if line.startswith("libtpu")]
    pinned = (Path(__file__).parents[1] / "requirements-tpu.txt").read_text()
    series = wanted.split("==")[1].split(".*")[0]
    assert f"libtpu=={series}" in pinned


def test_tests_run_on_the_cpu():
    assert jax.default_backend() == "cpu"


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("run", "estimate"), [*zip(preflight.PUBLIC_FIGURES, ("single", "pod"), strict=True)])
def test_the_errors_that_are_told_are_those_of_today(run, estimate):
    _, estimated = preflight.PUBLIC_FIGURES[run]
    assert getattr(public_figures, estimate)() == pytest.approx(estimated, rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "depth", "micro_batch"),
    [
        ("v5e:2x4", 12, 4), ("v6e:2x4", 24, 2), ("v4:2x2x4", 24, 2), ("v5p:2x2x2", 24, 8), ("v5p:4x4x4", 24, 8),
        ("v5p:4x4x4", 32, 8),
    ],
)  # fmt: skip
def test_deep_models_fit_with_the_compute_optimal_batch(topology, depth, micro_batch):
    found = main(Config(topology=topology, model=ModelArgs(depth=depth), micro_batch=micro_batch))
    assert found["measured_of_the_program"]["memory_gib"]["all"] < tpu.CHIPS[topology.split(":")[0]].memory_gib
