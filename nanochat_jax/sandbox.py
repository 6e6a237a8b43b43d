"""Runs Python programs that nobody has read, such as a model's answers, in a process of their own.

A program gets an empty working folder, an empty environment, no standard input, the standard library alone, and
limits on time, memory, output, files and processes. Where Linux lets us make namespaces, it also sees no network, finds
every file outside its folder read-only, and takes its descendants with it when it ends; `Result.held` says which
of these held.

This is no perfect jail. A program can read files that we can read, can attack the kernel, and, knowing this file, can
cheat its own limits on processes or pretend that it ran to its end. Code of someone who means harm belongs in a
virtual machine.
"""

import ctypes
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

# This file is also the program that runs in the child, without site-packages: it imports the standard library alone.

GRACE_SECONDS = 10.0  # for the child to start, and to end what it started
_NOBODY = 65534
_TIMED_OUT = 124


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20  # of address space, Python's own 30 MB included
    output_bytes: int = 64 << 10  # stdout and stderr together; also the size of any file
    folder_bytes: int = 16 << 20  # all files together, where namespaces hold


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    status: Literal["done", "error", "timeout"]  # done: ran to its last line; error: anything else, even sys.exit(0)
    output: str  # stdout and stderr; ends with the traceback, if there is one
    seconds: float
    held: tuple[str, ...]  # what was limited on this machine: memory, processes, network, files, …

    @property
    def ok(self) -> bool:
        return self.status == "done"


def run_python(code: str, limits: Limits = Limits()) -> Result:
    """Run a program to its end, or to the first limit; nothing of it goes on running.

    Safe to call from any thread.
    """
    secret = secrets.token_hex(16)  # written by the child after the last line: an exit in mid-program is no success
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as report,
    ):
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", __file__, str(report.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            start_new_session=True,
            pass_fds=(report.fileno(),),
        ) as process:
            try:
                job = json.dumps({"code": code, "secret": secret, "limits": asdict(limits)})
                process.communicate(job.encode(), timeout=limits.seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                pass  # of the child, which should have ended the program long before
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - started
        output.seek(0)
        report.seek(0)
        text = output.read(limits.output_bytes).decode(errors="replace")
        held, reported, end = report.read(limits.output_bytes).decode(errors="replace").partition("\n")
    if not reported:
        raise RuntimeError(f"the sandbox could not start, status {process.returncode}: {text}")
    timed_out = process.returncode in (_TIMED_OUT, -signal.SIGKILL)
    return Result("done" if end == secret else "timeout" if timed_out else "error", text, seconds, tuple(held.split()))


def _child() -> None:
    """Shut ourselves in, fork the program, and end it when its time is over."""
    report = int(sys.argv[1])
    job = json.load(sys.stdin.buffer)
    limits = Limits(**job["limits"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    held = _isolate(limits)
    os.write(report, " ".join((*held, *_limit_resources(limits, held))).encode() + b"\n")
    program = os.fork()
    if program == 0:
        if "descendants" in held and (inner := os.fork()):
            os.waitpid(inner, 0)  # we are init of a pid namespace: all that is in it dies with us
            os._exit(0)
        _run(job["code"], job["secret"].encode(), report)
    deadline = time.monotonic() + limits.seconds
    while os.waitpid(program, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(program, signal.SIGKILL)
            os.waitpid(program, 0)
            os._exit(_TIMED_OUT)
        time.sleep(0.002)
    os._exit(0)


def _run(code: str, secret: bytes, report: int) -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os.write(report, secret)
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
            sys.stdout.flush()
    os._exit(0)


def _limit_resources(limits: Limits, held: tuple[str, ...]) -> tuple[str, ...]:
    """Set what the program inherits; the names of what this system can limit."""
    wanted = {
        "memory": (resource.RLIMIT_AS, limits.memory_bytes),
        "output": (resource.RLIMIT_FSIZE, limits.output_bytes),
        "cpu": (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        "open-files": (resource.RLIMIT_NOFILE, 64),
        "core": (resource.RLIMIT_CORE, 0),
    }
    done = ["processes"] if held or os.getuid() else []  # no limit on processes binds root outside a namespace
    for name, (kind, value) in wanted.items():
        with suppress(ValueError, OSError):  # macOS knows no limit of address space
            resource.setrlimit(kind, (value, value))
            done.append(name)
    return tuple(done)


def _isolate(limits: Limits) -> tuple[str, ...]:
    """Enter namespaces of our own, give up what rights they bring; the names of what is shut off."""
    if not hasattr(os, "unshare"):
        return ()
    uid, gid, folder = os.geteuid(), os.getegid(), os.getcwd()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if uid == 0:
            os.setresuid(_NOBODY, 0, 0)  # root's real id would exempt us from the limit of processes
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWNS)
    except OSError:
        if uid == 0:
            os.setresuid(0, 0, 0)
        return ()
    held = ["network", "descendants"]
    with suppress(OSError):
        for name, line in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        with suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # in one of its own, the program could mount more memory to write to
        _mount_read_only(libc, folder, limits.folder_bytes)
        held.append("files")
    PR_SET_SECUREBITS, NOROOT_LOCKED = 28, 0b11  # else execve gives back to uid 0 what capset takes
    _call(libc.prctl, PR_SET_SECUREBITS, *map(ctypes.c_ulong, (NOROOT_LOCKED, 0, 0, 0)))
    _call(libc.capset, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    return tuple(held)


def _mount_read_only(libc: ctypes.CDLL, folder: str, folder_bytes: int) -> None:
    """Make every mount read-only, and the working folder a small file system in memory."""
    MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
    SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
    _call(libc.mount, None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    _call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    options = f"size={folder_bytes}".encode()
    _call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), options)
    os.chdir(folder)


def _call(function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    _child()
