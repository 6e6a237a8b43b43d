"""fit(): the one training loop, shared by all stages.

Step n is dispatched before step n-1's metrics are read, so that the device never waits for the host.
"""

import contextlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from nanochat_jax.errors import Stopped, UserError
from nanochat_jax.hosts import Watch, is_first
from nanochat_jax.metrics import MetricsLog
from nanochat_jax.state import Batch, StepMetrics, TrainState


@dataclass(frozen=True)
class Hook:
    """Something to do every so many steps and after the last one; what it returns is logged."""

    every: int  # steps; 0 only after the last
    run: Callable[[int, TrainState], dict[str, float]]
    at_start: bool = False  # before the first step too

    def due(self, step: int, last: int) -> bool:
        if step == 0:
            return self.at_start
        return step == last or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class Units:
    """What turns seconds into rates."""

    tokens_per_step: int
    flops_per_step: float
    peak_flops: float  # of all devices together


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a flag while the context is open (main thread only).

    A second Ctrl-C is a KeyboardInterrupt. SIGTERM may come again: a job's manager sends it to every process of a
    job, and its launcher passes it on.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._watch = Watch()

    def agreed(self) -> int | None:
        """The signal, once all processes know of it; all ask after each step, and stop at the same one."""
        return self._watch.ask(self.received)

    def _receive(self, number: int, _frame: object) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received != signal.SIGINT:
            self.received = number

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Clock:
    """Seconds a step takes, averaged over the last few: results arrive in bursts, since dispatch runs ahead.

    What hooks take, and waiting for data, is left out, and so is the first step, which compiles.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._laps: deque[float] = deque(maxlen=10)

    def lap(self) -> float | None:
        now, last = time.perf_counter(), self._last
        self._last = now
        if last is not None:
            self._laps.append(now - last)
        return sum(self._laps) / len(self._laps) if self._laps else None

    def restart(self) -> None:
        self._last = time.perf_counter()


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    batches: Iterator[Batch],
    *,
    steps: int,
    hooks: list[Hook],
    save: Callable[[int, TrainState], object],
    log: MetricsLog,
    units: Units | None,
    stop: StopSignal | None = None,
    max_bad_steps: int = 20,
) -> TrainState:
    """Train from the state's step up to a number of steps.

    Args:
        state: where to begin; its buffers are donated.
        train_step: as state.make_train_step gives.
        batches: from the state's step on; {} while the next one is waited for.
        steps: the total, those already done included.
        hooks: evaluation, samples, checkpoints; run in this order.
        save: called once more when a signal stops the run.
        log: receives loss, gradient norm and rates of every step, and what hooks return.
        units: for tokens/s and MFU; None where steps differ in their work.
        stop: looked at after each step and each {}; default: none stops the run.
        max_bad_steps: so many steps in a row may be skipped as not finite.

    Returns:
        The state after the last step.

    Raises:
        Stopped: after SIGTERM or Ctrl-C; the state has been saved.
        UserError: too many steps in a row were not finite.
    """
    start, bad_steps, clock = int(state.step), 0, _Clock()
    seconds_between_updates = 0.5 if sys.stderr.isatty() else 30  # a log file wants few lines
    bar = tqdm(
        total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=seconds_between_updates,
        disable=not is_first(),
    )  # fmt: skip

    def report(step: int, metrics: StepMetrics) -> None:
        nonlocal bad_steps
        loss, applied = float(metrics.loss), bool(metrics.applied)
        means = {name: float(value) for name, value in metrics.means.items()}
        norms = {"grad_norm": float(metrics.grad_norm), "update_norm": float(metrics.update_norm)}
        values = {"loss": loss, **means, **norms}
        if not applied:
            values["skipped"] = 1.0
        shown = ", ".join(f"{name} {value:.4f}" for name, value in {"loss": loss, **means}.items())
        if seconds := clock.lap():
            values["seconds_per_step"] = seconds
            if units is not None:
                values["tokens_per_second"] = units.tokens_per_step / seconds
                values["mfu"] = units.flops_per_step / seconds / units.peak_flops
                shown += f", {values['tokens_per_second']:,.0f} tok/s, MFU {100 * values['mfu']:.1f} %"
        log.write(step, values)
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
        bad_steps = 0 if applied else bad_steps + 1
        if bad_steps >= max_bad_steps:
            raise UserError(
                f"training: {bad_steps} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
                "nothing of them entered the parameters. Lower the learning rates or look at the data of these steps"
            )

    def agreed() -> int | None:
        return stop.agreed() if stop is not None else None

    def run_hooks(step: int, due: list[Hook]) -> None:
        for hook in due:
            if values := hook.run(step, state):
                log.write(step, values)
                tqdm.write(f"step {step:,}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    with bar:
        if start == 0:
            run_hooks(0, [hook for hook in hooks if hook.due(0, steps)])
        unread: tuple[int, StepMetrics] | None = None
        for step in range(start + 1, steps + 1):
            while (batch := next(batches)) == {}:
                if unread is not None:
                    report(*unread)
                    unread = None
                if (stopped := agreed()) is not None:
                    save(step - 1, state)
                    raise Stopped(step - 1, stopped)
                clock.restart()
            state, metrics = train_step(state, batch)
            if unread is not None:
                report(*unread)
            unread = (step, metrics)
            stopped = agreed()
            due = [hook for hook in hooks if hook.due(step, steps)]
            if due or step == steps or stopped is not None:
                report(*unread)
                unread = None
            if stopped is not None:  # before the hooks: the time until the process is killed may be short
                save(step, state)
            run_hooks(step, due)  # also when stopped: who goes on from here begins with the next step
            if stopped is not None:
                raise Stopped(step, stopped)
            if due:
                clock.restart()
    return state
