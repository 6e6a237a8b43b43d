"""What a program does: kernels by time from a profiler's trace, collectives from its text."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

GROUPS = (  # the first that matches a kernel's name
    ("communication", r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|permute"),
    ("attention", r"fmha|flash|attention|sdpa|cudnn.*(bprop|fprop)|splash"),
    ("matrix", r"gemm|cutlass|cublas|xmma|nvjet|matmul|dot|convolution|wgmma|gram_block"),
    ("copy", r"memcpy|memset|copy|transpose"),
)


class Kernel(NamedTuple):
    """One run of a kernel on a device; times in nanoseconds."""

    name: str
    start: float
    end: float


def kernels_by_time(folder: Path, calls: int, most: int = 25) -> dict[str, Any]:
    """Milliseconds of a device's time a call, by group and by kernel; of several devices the mean.

    Args:
        folder: where jax.profiler.trace wrote to; the newest trace is read.
        calls: how many calls the trace holds.
        most: kernels to list.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    devices = [
        [
            Kernel(event.name, event.start_ns, event.end_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        for plane in jax.profiler.ProfileData.from_file(str(newest)).planes
        if plane.name.startswith("/device:")
    ]
    return summary([kernels for kernels in devices if kernels], calls, most)


def summary(devices: list[list[Kernel]], calls: int, most: int) -> dict[str, Any]:
    """As kernels_by_time, of each device's kernels.

    Communication is hidden while something else runs on its device, and waiting for other devices is part of it.
    """
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    idle = hidden = 0.0
    for kernels in devices:
        for kernel in kernels:
            groups[group_of(kernel.name)] += kernel.end - kernel.start
            names[kernel.name] += kernel.end - kernel.start
        said = covered([kernel for kernel in kernels if group_of(kernel.name) == "communication"])
        rest = covered([kernel for kernel in kernels if group_of(kernel.name) != "communication"])
        busy = covered(kernels)
        hidden += said + rest - busy
        idle += max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels) - busy
    per_call = 1e-6 / calls / max(len(devices), 1)

    def longest_first(times: dict[str, float], most: int | None = None) -> dict[str, float]:
        listed = sorted(times.items(), key=lambda entry: -entry[1])[:most]
        return {name[:100]: round(time * per_call, 3) for name, time in listed}

    found = {"groups": longest_first(groups), "idle": round(idle * per_call, 3), "kernels": longest_first(names, most)}
    return found | ({"hidden_communication": round(hidden * per_call, 3)} if "communication" in groups else {})


def group_of(kernel: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), "element-wise")


def covered(kernels: list[Kernel]) -> float:
    """Nanoseconds in which at least one of the kernels runs."""
    total, until = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


class Collective(NamedTuple):
    """An operation of a compiled program by which devices talk to each other."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
    bytes: int  # of its result on one device
    calls: int  # each time that the program runs
    name: str  # the operation of the traced program that it comes from


COLLECTIVE = re.compile(
    r"^ +(?:ROOT )?%\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(.*",
    re.MULTILINE,
)
COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{\n((?:  .*\n|\n)*)", re.MULTILINE)
ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(program: str) -> list[Collective]:
    """What devices say to each other in a compiled program, given its text (jax.stages.Compiled.as_text)."""
    bodies = dict(COMPUTATION.findall(program))
    entry = re.search(r"^ENTRY %(\S+) ", program, re.MULTILINE)
    assert entry is not None
    calls: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        calls[name] += times
        for line in bodies[name].splitlines():
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", line):
                visit(callee, times * (int(trips[1]) if trips else 1))
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"%([\w.\-]+)", group):
                    visit(callee, times)

    visit(entry[1], 1)
    found = []
    for computation, times in calls.items():
        for match in COLLECTIVE.finditer(bodies[computation]):
            shapes = ARRAY.findall(match[1])
            if match[3]:  # an asynchronous one: operands come before the results
                shapes = shapes[len(shapes) // 2 :]
            sizes = [
                max(1, int(bits or 8) // 8) * math.prod(map(int, filter(None, dims.split(","))))
                for _, bits, dims in shapes
            ]
            name = re.search(r'op_name="([^"]*)"', match[0])
            found.append(Collective(match[2], sum(sizes), times, name[1] if name else ""))
    return found
