import json
import math

import pytest

from nanochat_jax.errors import UserError
from nanochat_jax.metrics import MetricsLog, peak_flops, read_metrics


def test_records_are_read_back_and_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.5})
        log.write(2, {"loss": math.nan, "grad_norm": math.inf})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "grad_norm": None}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") == 1


def test_a_resumed_log_forgets_what_came_after_its_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with MetricsLog(tmp_path, step=3) as log:
        log.write(4, {"loss": 40.0})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "lo\xff": 1}'])
def test_a_last_line_torn_by_a_crash_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps({"step": 1, "loss": 1.0}).encode() + b"\n" + torn)
    with MetricsLog(tmp_path, step=2) as log:
        log.write(2, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("damaged", [b"garbage", b'{"step": 2, "\xff": 1}'])
def test_a_damaged_line_is_named(tmp_path, damaged):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        MetricsLog(tmp_path / "file" / "run")


def test_a_full_disk_is_told_and_nothing_waits_for_it(tmp_path):
    log = MetricsLog(tmp_path)
    log._events._py_recordio_writer._writer = open("/dev/full", "wb", buffering=64)  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device; free some space"), log:
        for step in range(100):
            log.write(step, {f"loss {number}": 1.0 for number in range(100)})


def test_wandb_is_asked_for_by_name_when_missing(tmp_path):
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsLog(tmp_path, wandb={"project": "x"})


def test_an_unknown_device_is_measured():
    peak, source = peak_flops("float32")
    assert source == "measured matrix product" and 1e8 < peak < 1e14
