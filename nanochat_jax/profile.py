"""Read a profiler's trace: which kernels the time went to."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

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
