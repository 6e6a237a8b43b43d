"""What a program does: kernels by time from a profiler's trace, collectives from its text."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

GROUPS = (  # the first that matches a kernel's name
    ("communication", r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|permute"),
    ("attention", r"fmha|flash|attention|sdpa|cudnn.*(bprop|fprop)|splash"),
    ("matrix", r"gemm|cutlass|cublas|xmma|nvjet|matmul|dot|convolution|wgmma|gram_block"),
    ("copy", r"memcpy|memset|copy|transpose"),
)


def kernels_by_time(folder: Path, calls: int, most: int = 25) -> dict[str, Any]:
    """Milliseconds of device time a call, by group and by kernel.

    Args:
        folder: where jax.profiler.trace wrote to; the newest trace is read.
        calls: how many calls the trace holds.
        most: kernels to list.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    nanoseconds: Counter[str] = Counter()
    first, last = float("inf"), 0.0
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                nanoseconds[event.name] += event.duration_ns
                first, last = min(first, event.start_ns), max(last, event.end_ns)
    groups: Counter[str] = Counter()
    for name, value in nanoseconds.items():
        kind = next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "element-wise")
        groups[kind] += value
    busy = sum(groups.values())
    per_call = 1e-6 / calls
    return {
        "groups": {name: round(value * per_call, 3) for name, value in groups.most_common()},
        "idle": round(max(0.0, last - first - busy) * per_call, 3),
        "kernels": {name[:100]: round(value * per_call, 3) for name, value in nanoseconds.most_common(most)},
    }


class Collective(NamedTuple):
    """An operation of a compiled program by which devices talk to each other."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
    bytes: int  # of its result on one device
    calls: int  # each time that the program runs
    name: str  # the operation of the traced program that it comes from

    @property
    def is_repeated(self) -> bool:
        return self.calls > 1


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
