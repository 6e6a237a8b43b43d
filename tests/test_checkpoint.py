"""checkpoint.py: what was saved comes back bit for bit, on any number of devices, or the damage is named."""

import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from nanochat_jax import checkpoint as checkpoint_module
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.errors import UserError

# Orbax drops the coroutines that were still reading when another one met the damage.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

TOKENIZER = bytes(range(256)) * 3
META = {"config": {"n_layer": 2, "rates": [0.1, 0.3]}, "data": {"next_step": 17}, "kind": "sentencepiece"}


class Moments(NamedTuple):
    step: jax.Array
    mu: dict[str, jax.Array]


def mesh_of(n_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:n_devices]), ("x",))


def make_state(seed: int = 0, n_devices: int = 1, rows: int = 256) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    mesh = mesh_of(n_devices)

    def put(array: Any, *spec: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    wte = put(rng.standard_normal((rows, 8), np.float32).astype(jnp.bfloat16), "x", None)
    kernel = put(rng.standard_normal((4, rows), np.float32), None, "x")
    odd = put(rng.standard_normal((3, 5), np.float32))
    moments = Moments(put(np.int32(seed)), {"wte": wte * 2, "kernel": kernel * 2})
    params = {"wte": wte, "blocks": [{"kernel": kernel}, {"kernel": odd, "flag": put(np.array([True, False]))}]}
    return {"step": put(np.int32(seed)), "params": params, "opt_state": (moments, ())}


def like_of(state: Any, n_devices: int | None = None) -> Any:
    """The abstract state: on the devices that `state` is on, or split over the first n along the same axes."""

    def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if n_devices is not None:
            assert isinstance(sharding, NamedSharding)
            sharding = NamedSharding(mesh_of(n_devices), sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(abstract, state)


def to_bytes(state: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def save(folder: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), meta=META, tokenizer=TOKENIZER)


def restored(folder: Path, **options: Any) -> tuple[Any, checkpoint_module.Checkpoint]:
    found = Checkpoints(folder).restore(like_of(make_state()), **options)
    assert found is not None
    return found


@pytest.mark.parametrize("n_saved", [1, 8])
def test_comes_back_bitwise_on_any_number_of_devices(tmp_path: Path, n_saved: int) -> None:
    state = make_state(3, n_saved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, meta=META, tokenizer=TOKENIZER, metrics={"val_bpb": 1.25})
    for n_loaded in (1, 2, 4, 8):
        found = Checkpoints(tmp_path).restore(like_of(state, n_loaded))
        assert found is not None
        loaded, checkpoint = found
        assert str(jax.tree.structure(loaded)) == str(jax.tree.structure(state))
        assert to_bytes(loaded) == to_bytes(state)
        assert len(loaded["params"]["wte"].sharding.device_set) == n_loaded
        assert (checkpoint.step, checkpoint.meta, checkpoint.metrics) == (3, META, {"val_bpb": 1.25})
        assert checkpoint.tokenizer == TOKENIZER


def test_without_shardings_arrays_go_to_one_local_device(tmp_path: Path) -> None:
    state = {"w": np.arange(6, dtype=np.float32), "n": 3}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta={}, tokenizer=b"")
    like = {"w": jax.ShapeDtypeStruct((6,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    found = Checkpoints(tmp_path).restore(like)
    assert found is not None
    assert found[0]["w"].devices() == {jax.local_devices()[0]}
    np.testing.assert_array_equal(found[0]["w"], state["w"])
    assert found[0]["n"] == 3


def reference_checksums(array: np.ndarray) -> tuple[int, int]:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    bits = [int(b) for b in array.reshape(-1).view(f"u{array.itemsize}")]
    first, second = (sum(mix(b ^ mix(i ^ seed)) for i, b in enumerate(bits)) % 2**32 for seed in (1, 2))
    return first, second


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (24,), (8, 6), (8, 3, 4), (8, 0)])
def test_fingerprint_is_that_of_the_reference_on_any_sharding(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 99, shape)).astype(dtype))
    first, second = reference_checksums(array)
    expected = f"{dtype}[{','.join(map(str, shape))}] {first:08x}{second:08x}"
    for n_devices in (1, 4, 8):
        spec = PartitionSpec("x") if shape else PartitionSpec()
        placed = jax.device_put(array, NamedSharding(mesh_of(n_devices), spec))
        assert checkpoint_module._fingerprint(placed) == expected


def test_fingerprint_sees_what_plain_sums_do_not() -> None:
    x = np.arange(1, 13, dtype=np.float32)
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped = x.view(np.uint32).copy()
    flipped[5] ^= 1
    negative_zero, zero = np.array([-0.0], np.float32), np.array([0.0], np.float32)
    variants = [x, swapped, flipped.view(np.float32), x.view(np.int32), x.reshape(3, 4), x[::-1], zero, negative_zero]
    assert len({checkpoint_module._fingerprint(jnp.asarray(v)) for v in variants}) == len(variants)


def test_state_may_be_donated_or_deleted_right_after_save(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.5 - 1, tree), donate_argnums=0)
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))
    with Checkpoints(tmp_path, keep_newest=9) as checkpoints:
        expected = {}
        for step, n_devices in enumerate((1, 8, 1, 8)):
            sharding = NamedSharding(mesh_of(n_devices), PartitionSpec("x"))
            make = jax.jit(lambda key: jax.random.normal(key, (8, 256, 256)), out_shardings=sharding)
            state = {f"w{i}": make(jax.random.key(10 * step + i)) for i in range(8)}
            expected[step] = {key: np.array(x, copy=True) for key, x in state.items()}
            # A copy on the device: NumPy holds no view of its buffers, so they could be donated.
            state = copy(state)
            checkpoints.save(step, state, meta={}, tokenizer=b"")
            if step < 2:
                for _ in range(3):
                    state = overwrite(state)
                jax.block_until_ready(state)
            else:
                for x in state.values():
                    x.delete()
                jax.block_until_ready([make(jax.random.key(i)) for i in range(8)])
    for step, arrays in expected.items():
        found = Checkpoints(tmp_path).restore(like_of(jax.tree.map(jnp.asarray, arrays)), step=step)
        assert found is not None
        for key, x in arrays.items():
            np.testing.assert_array_equal(found[0][key], x)


def test_meta_may_be_changed_right_after_save(tmp_path: Path) -> None:
    meta: dict[str, Any] = {"data": {"next_step": 1}, "table": {10: (1, 2), 9: float("inf")}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), meta=meta, tokenizer=b"")
        meta["data"]["next_step"] = 2
    found = Checkpoints(tmp_path).peek()
    assert found is not None
    assert found.meta == {"data": {"next_step": 1}, "table": {"10": [1, 2], "9": float("inf")}}


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    scores = {10: 1.4, 20: 1.1, 30: float("nan"), 40: 1.2, 50: 1.3, 60: None}
    with Checkpoints(tmp_path, keep_newest=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.newest(), checkpoints.best()) == ([], None, None)
        for step, score in scores.items():
            metrics = None if score is None else {"val_bpb": score}
            checkpoints.save(step, make_state(step), meta={}, tokenizer=b"", metrics=metrics)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.newest(), checkpoints.best()) == ([20, 50, 60], 60, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "50", "60"]
    save(tmp_path, 70, 80, keep_best=None, keep_newest=1)
    assert Checkpoints(tmp_path).steps() == [80]


def test_nothing_saved_gives_none_and_leaves_no_folder(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.peek() is None
        assert checkpoints.restore(like_of(make_state())) is None
        with pytest.raises(UserError, match="step 7"):
            checkpoints.restore(like_of(make_state()), step=7)
    assert not (tmp_path / "none").exists()


def test_part_of_the_state_can_be_loaded_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*: there are 1, 2$"):
        Checkpoints(tmp_path).peek(step=7)
    checkpoint = Checkpoints(tmp_path).peek(step=1)
    assert checkpoint is not None and checkpoint.meta == META and checkpoint.tokenizer == TOKENIZER
    like = {"params": like_of(make_state()["params"], 4)}
    found = Checkpoints(tmp_path).restore(like, step=1)
    assert found is not None and list(found[0]) == ["params"]
    assert to_bytes(found[0]["params"]) == to_bytes(make_state(1)["params"])


def test_going_back_sets_later_history_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, 20, 30, keep_newest=9)
    with Checkpoints(tmp_path, keep_newest=9) as checkpoints:
        assert checkpoints.restore(like_of(make_state()), step=10) is not None
        checkpoints.save(10, make_state(99), meta={}, tokenizer=b"")  # restored just now: nothing to do
        assert checkpoints.steps() == [10, 20, 30]
        checkpoints.save(20, make_state(99), meta={}, tokenizer=b"")
        checkpoints.save(20, make_state(98), meta={}, tokenizer=b"")  # saved just now: nothing to do
    assert Checkpoints(tmp_path).steps() == [10, 20]
    assert int(restored(tmp_path)[0]["step"]) == 99
    assert len(list(tmp_path.glob("set-aside-*"))) == 2
    assert str(tmp_path / "set-aside-30") in caplog.text


def data_file(step_folder: Path) -> Path:
    """The file that holds the arrays: the largest."""
    return max((path for path in step_folder.glob("state/**/d/*")), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def rewrite_without_one_bit(folder: Path) -> None:
    """What Orbax alone loads silently: one bit of one array differs and every file is well-formed."""
    like = checkpoint_module._by_path(like_of(make_state()))
    arrays = ocp.load_checkpointables(folder, {"state": like})["state"]
    arrays["params/wte"] = arrays["params/wte"].at[2, 3].multiply(-1)
    metadata = (folder / "_CHECKPOINT_METADATA").read_bytes()
    ocp.save_checkpointables(folder, {"state": arrays}, overwrite=True)
    (folder / "_CHECKPOINT_METADATA").write_bytes(metadata)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (rewrite_without_one_bit, "array params/wte"),
    "truncated data": (lambda folder: os.truncate(data_file(folder), data_file(folder).stat().st_size // 2), "state"),
    "no data file": (lambda folder: shutil.rmtree(data_file(folder).parent), "state"),
    "no state": (lambda folder: shutil.rmtree(folder / "state"), "state"),
    "no metadata": (lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(), "manifest"),
    "truncated metadata": (lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 200), "manifest"),
    "tokenizer": (lambda folder: flip_in(folder / "_CHECKPOINT_METADATA", b"AAECAwQ"), "manifest"),
    "meta": (lambda folder: flip_in(folder / "_CHECKPOINT_METADATA", b"sentencepiece"), "manifest"),
    "no folders": (lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()], "state"),
}


def flip_in(path: Path, text: bytes) -> None:
    flip(path, path.read_bytes().index(text), 2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    apply, named = DAMAGES[damage]
    save(tmp_path, 10, 20)
    apply(tmp_path / "20")
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING, "nanochat_jax.checkpoint"):
        found = checkpoints.restore(like_of(make_state()))
        assert found is not None and found[1].step == 10
        assert to_bytes(found[0]) == to_bytes(make_state(10))
        assert f"checkpoint {tmp_path / '20'} cannot be used: {named}" in caplog.text
        assert checkpoints.steps() == [10, 20]  # reading changes nothing
        checkpoints.save(30, make_state(30), meta={}, tokenizer=b"")
    assert Checkpoints(tmp_path).steps() == [10, 30]  # the damaged one does not count among the newest
    assert len(list(tmp_path.glob("set-aside-20-*"))) == 1
    with pytest.raises(UserError, match="step 20"):
        restored(tmp_path, step=20)


def test_when_all_are_damaged_each_is_listed(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    rewrite_without_one_bit(tmp_path / "20")
    shutil.rmtree(tmp_path / "10" / "state")
    with pytest.raises(UserError, match=r"(?s)step 20: array params/wte.*step 10: state: "):
        restored(tmp_path)
    with pytest.raises(UserError, match=r"(?s)those of other steps may be good:.*step 20: array params/wte"):
        restored(tmp_path, step=20)


def test_any_flipped_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    save(tmp_path, 5)
    like, expected = like_of(make_state()), (to_bytes(make_state(5)), META, TOKENIZER)
    rng = random.Random(0)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    detected = 0
    for path in files:
        original = path.read_bytes()
        for _ in range(int(os.environ.get("FLIPS_PER_FILE", 12))):
            flip(path, rng.randrange(len(original)), 1 << rng.randrange(8))
            try:
                found = Checkpoints(tmp_path).restore(like)
                assert found is not None
                assert (to_bytes(found[0]), found[1].meta, found[1].tokenizer) == expected, path
            except UserError as error:
                assert "no good checkpoint" in str(error), path  # damage, never taken for another config
                detected += 1
            path.write_bytes(original)
    assert detected > 10
    assert to_bytes(restored(tmp_path)[0]) == expected[0]


def test_interrupt_and_lack_of_memory_are_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 20)
    for cause in (KeyboardInterrupt(), MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")):

        def fail(*_: Any, cause: BaseException = cause) -> None:
            raise ValueError("wrapped by Orbax") from cause

        monkeypatch.setattr(ocp, "load_checkpointables", fail)
        with pytest.raises(type(cause)):
            restored(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"].update(wte=jnp.zeros((32, 8), jnp.bfloat16)), r"wte is bfloat16\[256,8\] .*\[32,8\]"),
        (lambda s: s["params"].update(wte=jnp.zeros((256, 8))), r"wte is bfloat16\[256,8\] there, float32\[256,8\]"),
        (lambda s: s["params"].update(new=jnp.zeros(3)), r"params/new is absent there, float32\[3\]"),
        (lambda s: s["params"]["blocks"].pop(), r"params/blocks/1/.* is .* there, absent"),
        (lambda s: s.update(ema=jnp.zeros(3)), r"ema is absent there, float32\[3\]"),
    ],
)
def test_another_config_is_no_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any], message: str
) -> None:
    save(tmp_path, 10, 20)
    other = make_state()
    change(other)
    caplog.clear()
    with pytest.raises(UserError, match=f"{tmp_path / '20'} .*{message}"):
        Checkpoints(tmp_path).restore(like_of(other))
    assert not [r for r in caplog.records if r.name == "nanochat_jax.checkpoint"]


def test_a_failed_background_save_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10)
    large = make_state(20) | {"large": jnp.asarray(np.random.default_rng(0).standard_normal(500_000, np.float32))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # like a full disk: writes fail half-way
    try:
        with pytest.raises(UserError, match=f"could not save checkpoint {tmp_path / '20'}; .*File too large"):
            checkpoints.save(20, large, meta={}, tokenizer=b"")
            checkpoints.save(30, make_state(30), meta={}, tokenizer=b"")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert to_bytes(restored(tmp_path)[0]) == to_bytes(make_state(10))
    checkpoints.save(20, make_state(20), meta={}, tokenizer=b"")
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=f"{tmp_path}/file/checkpoints"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_kill_in_the_middle_of_a_save_leaves_the_previous_step(tmp_path: Path) -> None:
    program = """
        import os, pathlib, signal, sys
        import jax.numpy as jnp, numpy as np
        from nanochat_jax.checkpoint import Checkpoints

        folder = pathlib.Path(sys.argv[1])
        state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(24_000_000, np.float32))}
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, {"w": jnp.arange(9.0)}, meta={"n": 1}, tokenizer=b"t")
        checkpoints.save(2, state, meta={"n": 2}, tokenizer=b"t")
        while not list(folder.glob("2.*/state")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path], env=environment, timeout=300)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir() if path.name != "1"], "killed before or after the save"
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((9,), jnp.float32)})
        assert found is not None and found[1].meta == {"n": 1}
        assert checkpoints.steps() == [1]
        checkpoints.save(2, found[0], meta={"n": 2}, tokenizer=b"t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
