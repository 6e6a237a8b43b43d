"""What a run says of itself: metrics to JSONL, TensorBoard and (on request) W&B; device peaks and MFU."""

import functools
import hashlib
import json
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from nanochat_jax.errors import UserError
from nanochat_jax.files import CACHE, is_remote, telling

# Dense bfloat16 FLOP/s by vendor's datasheet (T4: float16), matched as a part of jax's device_kind, in this order.
PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("T4", 65e12),
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
FLUSH_SECONDS = 10.0  # between two looks at TensorBoard that show something new


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure is from: the datasheet, or a matrix product timed here."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS:
        if name in kind:
            return peak, "datasheet"
    size = 1024
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # All virtual CPU devices share one processor.
    shared_by = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    return 2 * size**3 / min(seconds) / shared_by, "measured matrix product"


class MetricsLog:
    """Appends records of numbers to <folder>/metrics.jsonl and <folder>/tensorboard, each with its step.

    Opened again at an earlier step, it first drops every record after that step, so that a resumed run's log reads
    like an uninterrupted one's.
    """

    def __init__(self, folder: Path, *, step: int = 0, wandb: dict[str, Any] | None = None) -> None:
        self.path, self._folder = folder / "metrics.jsonl", folder
        # In a bucket nothing can be added to an object: files grow on disk, and are copied there whole.
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        self._local = CACHE / "metrics" / name if is_remote(folder) else folder
        with telling(f"cannot write metrics into {folder}"):
            (self._local / "tensorboard").mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
            temporary = self._local / ".metrics.jsonl.tmp"
            temporary.write_text("".join(kept))
            self._file = temporary.replace(self._local / "metrics.jsonl").open("a", buffering=1)
            # Not its SummaryWriter, whose thread dies of a full disk, and all that is added then waits for ever.
            # EventsWriter names files by the second, and a second one of that name would take the first one's place.
            fraction = f".{time.time_ns() % 10**9:09}"
            self._events = EventsWriter(str(self._local / "tensorboard" / "events"), filename_suffix=fraction)
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()
        self._wandb = _start_wandb(folder, wandb) if wandb is not None else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step (1 is the first); what is not finite is logged as null."""
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._telling():
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            for name, value in record.items():
                if value is not None:
                    summary = scalar(name, value)
                    self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._copy()
                self._flushed = time.monotonic()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def _telling(self) -> AbstractContextManager[None]:
        return telling(f"cannot write {self.path}", "; free some space, run again to go on")

    def _copy(self) -> None:
        if self._local != self._folder:
            for file in (Path(self._file.name), Path(self._events._file_name)):
                (self._folder / file.relative_to(self._local)).write_bytes(file.read_bytes())

    def close(self) -> None:
        with self._telling():
            self._file.close()
            self._events.close()
            self._copy()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoLog(MetricsLog):
    """Writes nothing: of several processes, one logs for all."""

    def __init__(self, folder: Path, *, step: int = 0, wandb: dict[str, Any] | None = None) -> None:
        self.path = folder / "metrics.jsonl"

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a last line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line.decode()))
        except ValueError as error:  # neither JSON nor, perhaps, UTF-8
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON ({error}); delete the line or the file") from error
    return records


def _start_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--run.wandb needs the wandb package: pip install wandb") from error
    same_run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # also after a restart
    return wandb.init(dir=str(folder), id=same_run, resume="allow", **settings)
