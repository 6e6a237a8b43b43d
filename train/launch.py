"""Start several processes of one command, which make one run; the first of them speaks for all.

On one machine, a process for each of 8 GPUs:

    python -m train.launch --processes 8 -- train.pretrain --data runs/my/data --run.out runs/my/base

On two machines with 8 GPUs each, the second begins with process 8 (the folder of the run must be the same on both):

    python -m train.launch --processes 16 --here 8 --coordinator node0:8476 -- train.pretrain …
    python -m train.launch --processes 16 --here 8 --first 8 --coordinator node0:8476 -- train.pretrain …

One process can drive all GPUs of a machine too: then no launcher is needed. If a process ends with an error, the others
are ended; Ctrl-C and SIGTERM are passed on, so that the run saves and stops.
"""

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

GRACE_SECONDS = 20  # for the others, once a process has ended with an error


@dataclass(frozen=True)
class Config:
    processes: int
    """In all, on all machines."""
    here: int = 0
    """On this machine; 0 for all."""
    first: int = 0
    """Number of the first process on this machine."""
    coordinator: str = ""
    """HOST:PORT on which process 0 listens; default: a free port of this machine."""
    devices: int = 1
    """GPUs of each process."""


def main(config: Config, command: list[str]) -> int:
    """Run the command's processes to their end, and return the first exit code that is not 0."""
    here = config.here or config.processes
    if config.processes < 1 or config.first + here > config.processes or not command:
        print("error: --first and --here must fit into --processes, and a module must follow --", file=sys.stderr)
        return 2
    if here < config.processes and not config.coordinator:
        print("error: several machines need --coordinator HOST:PORT, the address of process 0", file=sys.stderr)
        return 2
    coordinator = config.coordinator or f"127.0.0.1:{free_port()}"
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for local in range(here):
        devices = range(local * config.devices, (local + 1) * config.devices)
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(config.processes),
            "JAX_PROCESS_ID": str(config.first + local),
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, devices)),
        }
        if config.first + local:
            environment["TQDM_DISABLE"] = "1"
        # A session of its own: Ctrl-C would reach it twice, and twice means at once.
        processes.append(subprocess.Popen([sys.executable, "-m", *command], env=environment, start_new_session=True))
    return wait(processes)


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The first exit code that is not 0, once all have ended."""
    failed = 0
    while running := [process for process in processes if process.poll() is None]:
        failed = failed or next((process.returncode for process in processes if process.returncode), 0)
        if failed and not running_until(running, time.monotonic() + GRACE_SECONDS):
            for process in running:
                process.kill()
        time.sleep(0.1)
    failed = failed or next((process.returncode for process in processes if process.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def running_until(processes: list[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Whether all have ended by then."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = sys.argv[1:split], sys.argv[split + 1 :]
    sys.exit(main(tyro.cli(Config, args=arguments, description=inspect.cleandoc(__doc__ or "")), command))
