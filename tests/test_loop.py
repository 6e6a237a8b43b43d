import os
import signal
import threading

import jax.numpy as jnp
import pytest

from nanochat_jax.errors import Stopped, UserError
from nanochat_jax.loop import Hook, StopSignal, Units, fit
from nanochat_jax.metrics import MetricsLog, read_metrics
from nanochat_jax.state import StepMetrics, TrainState

UNITS = Units(tokens_per_step=10, flops_per_step=1e6, peak_flops=1e9)


def start_state(step: int = 0) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.float32(step)}, ())


def counting_step(state, batch):
    """Adds the batch to w; a negative batch is a step that is not finite."""
    applied = batch >= 0
    new = TrainState(state.step + 1, {"w": state.params["w"] + batch}, ())
    return new, StepMetrics(jnp.float32(batch), jnp.float32(1), jnp.float32(2), jnp.bool_(applied))


def run(tmp_path, batches, *, steps, hooks=(), start=0, save=lambda step, state: None, **options):
    with MetricsLog(tmp_path, step=start) as log, StopSignal().listening() as stop:
        return fit(
            start_state(start), counting_step, iter(batches), steps=steps, hooks=list(hooks), save=save, log=log,
            units=UNITS, stop=stop, **options,
        )  # fmt: skip


def test_every_step_is_logged_once_and_in_order(tmp_path):
    state = run(tmp_path, range(7), steps=7)
    assert int(state.step) == 7 and float(state.params["w"]) == sum(range(7))
    records = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in records] == [(i + 1, float(i)) for i in range(7)]
    assert all(record["mfu"] > 0 for record in records[1:])


def test_hooks_run_when_due_in_order_and_after_the_last_step(tmp_path):
    seen = []

    def note(name):
        def hook(step, state):
            assert int(state.step) == step
            seen.append((name, step))
            return {name: float(step)}

        return hook

    run(tmp_path, [0] * 5, steps=5, hooks=[Hook(2, note("a")), Hook(0, note("b"))])
    assert seen == [("a", 2), ("a", 4), ("a", 5), ("b", 5)]
    logged = [(record["step"], record["a"]) for record in read_metrics(tmp_path) if "a" in record]
    assert logged == [(2, 2.0), (4, 4.0), (5, 5.0)]


def test_it_goes_on_from_the_states_step(tmp_path):
    run(tmp_path, [0] * 3, steps=3)
    run(tmp_path, [1] * 2, steps=5, start=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_bad_steps_are_counted_and_too_many_in_a_row_stop_the_run(tmp_path):
    state = run(tmp_path / "few", [0, -1, -1, 0, -1, -1], steps=6, max_bad_steps=3)
    assert int(state.step) == 6
    assert [record.get("skipped") for record in read_metrics(tmp_path / "few")] == [None, 1, 1, None, 1, 1]
    with pytest.raises(UserError, match="3 steps in a row"):
        run(tmp_path / "many", [0, -1, -1, -1, 0, 0], steps=6, max_bad_steps=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    saved = []

    def batches():
        for step in range(100):
            if step == 3:
                os.kill(os.getpid(), number)
            yield 0

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stopped:
        run(
            tmp_path, batches(), steps=100, save=lambda step, state: saved.append((step, int(state.step))),
            hooks=[Hook(4, lambda step, state: {"saved_before": float(saved == [(step, int(state.step))])})],
        )  # fmt: skip
    assert saved == [(4, 4)]
    assert read_metrics(tmp_path)[-1] == {"step": 4, "saved_before": 1.0}  # due, and no later run does it
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]


def test_a_signal_while_data_is_waited_for_saves_and_stops(tmp_path):
    saved = []

    def batches():
        yield from (0, 1, {})
        os.kill(os.getpid(), signal.SIGTERM)
        yield {}
        pytest.fail("waits on")

    with pytest.raises(Stopped, match="SIGTERM after step 2"):
        run(tmp_path, batches(), steps=100, save=lambda step, state: saved.append((step, float(state.params["w"]))))
    assert saved == [(2, 1.0)]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_only_a_second_ctrl_c_ends_at_once():
    with StopSignal().listening() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_it_runs_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, [0] * 3), kwargs={"steps": 3})
    thread.start()
    thread.join()
    assert len(read_metrics(tmp_path)) == 3
