"""Several processes that are one program: how they find each other, agree, and let the first act for all.

Every process runs the same commands in the same order. What is said here goes over the devices' own links, so that
all processes must say it, at the same point. One process alone needs none of this, and pays nothing for it.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its client has no public name; Orbax uses it in the same way
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax.config import differences, to_json
from nanochat_jax.errors import UserError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Present with more than one task, or on a pod: jax.distributed finds the rest itself.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
POD_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
SLICES = "MEGASCALE_COORDINATOR_ADDRESS"
PATIENCE_SECONDS = 60  # without a sign of life from a process, until all others give up
CPU_THREADS = 64  # of XLA, where several processes use CPUs
FAIL_SECONDS = 5  # in which the others may fail too


def is_first() -> bool:
    """Whether this process acts for all: writes files and logs."""
    return jax.process_index() == 0


def join() -> None:
    """Find the other processes, where there are any; before the first use of a device.

    By hand: JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, as train.launch
    sets them; in an indexed Kubernetes Job the last is JOB_COMPLETION_INDEX by itself. Slurm and Open MPI tasks and
    Cloud TPU pods are found without.

    Raises:
        UserError: some of it is missing, or makes no sense.
    """
    environment = dict(os.environ)
    if "JOB_COMPLETION_INDEX" in environment:
        environment.setdefault("JAX_PROCESS_ID", environment["JOB_COMPLETION_INDEX"])
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": PATIENCE_SECONDS,
        "shutdown_timeout_seconds": PATIENCE_SECONDS,
    }
    if "JAX_NUM_PROCESSES" in environment:
        if missing := [name for name in BY_HAND if not environment.get(name)]:
            raise UserError(f"{missing[0]} is not set: several processes need {', '.join(BY_HAND)}")
        address, *numbers = (environment[name] for name in BY_HAND)
        if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(f"JAX_PROCESS_ID={numbers[1]} must be a number below JAX_NUM_PROCESSES={numbers[0]}")
        if int(numbers[0]) == 1:
            return
        options |= {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    elif not (
        any(int(environment.get(name, "1")) > 1 for name in TASKS)
        or any("," in environment.get(name, "") for name in POD_HOSTS)
        or SLICES in environment
        or on_cloud_tpu()
    ):
        return
    # On CPUs a thread waits in every operation that needs the others: there must be enough, and one program at a time.
    os.environ.setdefault("NPROC", str(CPU_THREADS))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot join the other processes ({reason}); see docs/multihost.md") from error
    if jax.default_backend() == "cpu":
        # Only the first process would find its programs again, and not wait until the others have compiled theirs.
        jax.config.update("jax_enable_compilation_cache", False)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def fail(error: str) -> NoReturn:
    """End this process with an error; one that all processes have is told once.

    The usual way out would wait for the others, who may be waiting for this one.
    """
    client, told = distributed.global_state.client, {jax.process_index(): error}
    if client is None:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    key, deadline = "nanochat_jax/failed/{}".format, time.monotonic() + FAIL_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # where others go on, or are gone
        client.key_value_set(key(jax.process_index()), error)
        for number in range(jax.process_count()):
            left = max(1, int(1000 * (deadline - time.monotonic())))
            told[number] = client.blocking_key_value_get(key(number), left)
    everyone = len(told) == jax.process_count()
    if not everyone:
        print(f"error: process {jax.process_index()}: {error}", file=sys.stderr, flush=True)
    elif is_first():
        alike = len(set(told.values())) == 1
        lines = [error] if alike else [f"process {number}: {text}" for number, text in sorted(told.items())]
        print("error: " + "\n".join(lines), file=sys.stderr, flush=True)
        time.sleep(1)  # until the others, too, have heard everyone: this process keeps what was said
    os._exit(2)


def crash() -> None:
    """End a process of several on an exception that is no user's: at once, as in `fail`."""
    if distributed.global_state.client is not None:
        print(f"process {jax.process_index()}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def on_cloud_tpu() -> bool:
    """Whether this is a TPU virtual machine, which may be one of a pod's: only its metadata server knows."""
    return jax.config.jax_platforms in (None, "", "tpu") and any(Path("/dev").glob("accel*"))


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << int(max(sizes)).bit_length(), np.uint8)  # of few sizes, for each is a program
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first[T](function: Callable[[], T]) -> T:
    """Call a function on the first process alone; all get its JSON value, or its UserError."""
    if jax.process_count() == 1:
        return function()
    value: Any = None
    error = ""
    if is_first():
        try:
            value = function()
        except UserError as raised:
            error = str(raised)
    value, error = gather([value, error])[0]
    if error:
        raise UserError(error)
    return value


@contextlib.contextmanager
def first_holds(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context on the first process alone; its UserError is everyone's."""
    with contextlib.ExitStack() as stack:
        first(lambda: stack.enter_context(context))
        yield


def share[T](function: Callable[[Sequence[T]], list[Any]], items: Sequence[T]) -> list[Any]:
    """JSON values of all items, by a function of some of them: each process computes its part."""
    processes = jax.process_count()
    every = gather(function(items[jax.process_index() :: processes]))
    return [every[i % processes][i // processes] for i in range(len(items))]


def agree(**things: Any) -> None:
    """All processes run the same code with the same things.

    Raises:
        UserError: names what differs, and where.
    """
    if jax.process_count() == 1:
        return
    mine = {"code": code_version(), "jax": jax.__version__, **json.loads(json.dumps(to_json(things), default=str))}
    theirs = gather(mine)
    differing = [
        f"{name}: {one} of process 0, but {other} of process {number}"
        for number, there in enumerate(theirs)
        for name, one, other in differences(theirs[0], there)
    ]
    if differing:
        raise UserError("the processes of a run must be alike:\n  " + "\n  ".join(differing))


def code_version() -> str:
    """Of all source files that a run may use."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted([*root.glob("nanochat_jax/**/*.py"), *root.glob("train/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Watch:
    """A number that any process may come to know, such as a signal, and that all learn at the same point.

    Asking costs a small sum over the devices, whose result is read when asked again: all answer a call later.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def ask(self, number: int | None) -> int | None:
        """The largest number of any process at the last call, None for none; all processes must call it."""
        if jax.process_count() == 1:
            return number
        heard = None if self._asked is None else int(self._asked)
        self._asked = _largest(number or 0)
        return heard or None


def _largest(number: int) -> jax.Array:
    at, largest = _reduction()
    mine = np.full(jax.local_device_count(), number, np.int32)
    return largest(jax.make_array_from_process_local_data(at, mine))


@cache
def _reduction() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(
        jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
