"""Read a compiled TPU program: what its time goes to, what its devices send each other.

XLA notes its own estimate of the cycles of almost every operation in the optimised program. What it does not estimate
is added here from rooflines: Pallas kernels, gathers and scatters, and communication. The program's operations are then
gone through in their scheduled order, on one clock for the cores and one for the links, so that only that communication
is waited for which no computation hides.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanochat_jax.products import product_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id", "iota",
    "broadcast", "copy-start", "copy-done", "optimization-barrier",
}  # fmt: skip
ANNOTATIONS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked")
MOVING = FREE | {"copy", "transpose", "reshape", "slice", "concatenate", "pad", "dynamic-slice", "dynamic-update-slice"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)")
_PART = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_BODY = re.compile(r"body=%([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}


@dataclass(frozen=True)
class Operation:
    name: str
    shape: str  # with layout, as printed
    opcode: str
    line: str

    def estimated_cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found else 0

    def called(self) -> list[str]:
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.line)
        named = re.findall(r"%([\w.-]+)", branches[1]) if branches else []
        return named + _CALLED.findall(self.line)

    def operands(self) -> list[str]:
        inside = self.line.split(f" {self.opcode}(", 1)[1].split(")", 1)[0]
        return re.findall(r"%([\w.-]+)", inside)


@dataclass
class Traffic:
    """Collectives of one kind."""

    count: int = 0
    bytes: float = 0  # that one device sends
    seconds: float = 0

    def add(self, count: int, sent: float, seconds: float) -> None:
        self.count, self.bytes, self.seconds = self.count + count, self.bytes + sent, self.seconds + seconds


@dataclass
class Execution:
    """What a device does in one call of a program; seconds follow from cycles and rooflines, not from a clock."""

    seconds: float = 0  # to the end, with what communication is waited for
    waiting_seconds: float = 0  # of it
    kinds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds of computation
    rematerialized_seconds: float = 0  # of it, computed anew by the compiler to save memory
    traffic: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    matrix_flops: float = 0
    without_estimate: Counter[str] = field(default_factory=Counter)  # operations that took no time here

    def wait(self, now: float, until: float) -> float:
        """Let the clock go on to a later time, if that is later; what passes counts as waiting."""
        self.waiting_seconds += max(0.0, until - now)
        return max(now, until)

    def add(self, other: "Execution", times: int = 1) -> None:
        """Another program's computation and traffic, so many times; the clock is set by whoever calls this."""
        self.rematerialized_seconds += times * other.rematerialized_seconds
        self.matrix_flops += times * other.matrix_flops
        self.waiting_seconds += times * other.waiting_seconds
        for kind, seconds in other.kinds.items():
            self.kinds[kind] += times * seconds
        for operation, count in other.without_estimate.items():
            self.without_estimate[operation] += times * count
        for kind, moved in other.traffic.items():
            self.traffic[kind].add(times * moved.count, times * moved.bytes, times * moved.seconds)


@dataclass(frozen=True)
class Rates:
    """What turns a program into seconds."""

    clock_hz: float  # of the cycles that XLA estimates
    kernel_seconds: Callable[[str, int], float]  # of a Pallas kernel, by name and elements of its last result
    memory_bytes_per_second: float
    link_bytes_per_second: Callable[[frozenset[str]], float]  # that a device sends, in collectives over some mesh axes
    mesh: dict[str, int]  # sizes of the mesh's axes


def read(text: str, rates: Rates) -> Execution:
    """Go through a scheduled program, as Compiled.as_text() prints it."""
    computations, entry = _parse(text)
    return _Reader(computations, rates).run(entry)


def loop_body(text: str, rates: Rates) -> Execution:
    """One round of the program's longest loop, for loops whose end is decided while they run."""
    computations, _ = _parse(text)
    reader = _Reader(computations, rates)
    bodies = {
        body
        for lines in computations.values()
        for op in lines
        if op.opcode == "while"
        for body in _BODY.findall(op.line)
    }
    return max((reader.run(body) for body in bodies), key=lambda found: found.seconds)


def _parse(text: str) -> tuple[dict[str, list[Operation]], str]:
    computations: dict[str, list[Operation]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _OPERATION.match(line):
            current.append(Operation(found[1], found[2], found[3], line))
    return computations, entry


class _Reader:
    def __init__(self, computations: dict[str, list[Operation]], rates: Rates) -> None:
        self.computations, self.rates = computations, rates
        self._opcodes: dict[str, frozenset[str]] = {}
        self._flops: dict[str, float] = {}
        self._shapes = {op.name: op.shape for lines in computations.values() for op in lines}

    def run(self, name: str) -> Execution:
        done, now, link_free = Execution(), 0.0, 0.0
        ends: dict[str, float] = {}  # of communication under way
        for op in self.computations[name]:
            if op.opcode == "while":
                for body in _BODY.findall(op.line):
                    once, times = self.run(body), self._rounds(op)
                    done.add(once, times)
                    now += times * once.seconds
            elif op.opcode in ("conditional", "call"):  # of branches the longest
                longest = max((self.run(called) for called in op.called()), key=lambda found: found.seconds)
                done.add(longest)
                now += longest.seconds
            elif op.opcode.endswith("-done"):
                now = done.wait(now, max((ends.get(operand, 0.0) for operand in op.operands()), default=0.0))
            elif (fused := self._fused(op)) is not None:
                part, channel, (kind, sent, seconds) = fused
                if part == "Start":
                    done.traffic[kind].add(1, sent, seconds)
                    ends[channel] = link_free = max(now, link_free) + seconds
                elif part == "Done":
                    now = done.wait(now, ends.get(channel, 0.0))
                else:
                    now += self._compute(op, done)
            elif (collective := self._collective(op)) is not None:
                kind, sent, seconds = collective
                done.traffic[kind].add(1, sent, seconds)
                ends[op.name] = link_free = max(now, link_free) + seconds
                if not op.opcode.endswith("-start"):
                    now = done.wait(now, link_free)
            else:
                now += self._compute(op, done)
        done.seconds = now
        return done

    def _rounds(self, op: Operation) -> int:
        """Of a loop: as the compiler notes them, or the largest number that its condition compares with."""
        if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.line):
            return int(trips[1])
        numbers = [1]
        conditions = re.findall(r"condition=%([\w.-]+)", op.line)
        while conditions:
            for inner in self.computations[conditions.pop()]:
                numbers += [int(found) for found in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", inner.line)]
                conditions += inner.called()
        return max(numbers)

    def _compute(self, op: Operation, done: Execution) -> float:
        kind = self._kind(op)
        if kind == "attention":
            results = [_elements(dims) for of, dims in _ARRAY.findall(op.shape) if of == "bf16"]
            seconds = self.rates.kernel_seconds(op.name, results[-1] if results else 0)
        elif kind == "gather and scatter":
            seconds = self._moved_bytes(op) / self.rates.memory_bytes_per_second
        else:
            seconds = op.estimated_cycles() / self.rates.clock_hz
        if any(f'"{name}"' in op.line for name in ANNOTATIONS):
            return 0.0
        if seconds == 0 and op.opcode in ("fusion", "custom-call", "gather", "scatter", "sort"):
            done.without_estimate[f"{op.opcode} ({kind})"] += 1
        if seconds:
            done.kinds[kind] += seconds
        done.matrix_flops += self._matrix_flops(op)
        if ".remat" in op.name:
            done.rematerialized_seconds += seconds
        return seconds

    def _kind(self, op: Operation) -> str:
        if op.opcode == "custom-call":
            return "attention" if '"tpu_custom_call"' in op.line else "other kernels"
        inside = self._inside(op)
        if inside & {"convolution", "dot"}:
            return "matrix products"
        if inside & {"gather", "scatter"}:
            return "gather and scatter"
        if inside <= MOVING:
            return "copies"
        if inside <= MOVING | {"convert", "reduce-precision"}:
            return "converts"
        return "element-wise"

    def _inside(self, op: Operation) -> frozenset[str]:
        """Opcodes of an operation and of what it calls."""
        found = frozenset({op.opcode} - {"fusion"})
        for name in op.called() if op.opcode in ("fusion", "async-start") else ():
            if name not in self._opcodes:
                self._opcodes[name] = frozenset().union(*(self._inside(inner) for inner in self.computations[name]))
            found |= self._opcodes[name]
        return found

    def _moved_bytes(self, op: Operation) -> float:
        """By gathers, which read and write their rows, and scatters, which read theirs and change others by them."""
        if op.opcode == "gather":
            return 2 * _largest_bytes(op.shape)
        if op.opcode == "scatter":
            return 3 * _largest_bytes(self._shapes[op.operands()[2]])
        inside = (inner for name in op.called() for inner in self.computations[name]) if op.opcode == "fusion" else ()
        return sum(self._moved_bytes(inner) for inner in inside)

    def _matrix_flops(self, op: Operation) -> float:
        """Of the matrix products in an operation; XLA for TPUs writes them as convolutions without a window."""
        if op.opcode == "convolution":
            return product_flops(op.line, op.shape, *(self._shapes[operand] for operand in op.operands()[:2]))
        total = 0.0
        for name in op.called() if op.opcode == "fusion" else ():
            if name not in self._flops:
                self._flops[name] = sum(self._matrix_flops(inner) for inner in self.computations[name])
            total += self._flops[name]
        return total

    def _collective(self, op: Operation) -> tuple[str, float, float] | None:
        """Kind, bytes that a device sends, and seconds; None for other operations."""
        opcode = op.opcode.removesuffix("-start")
        inside = {opcode} if opcode in COLLECTIVES else self._inside(op) & set(COLLECTIVES)
        if not inside:
            return None
        kind = min(inside)
        lines = (inner.line for inner in (op, *self._within(op)) if inner.opcode.removesuffix("-start") == kind)
        axes = _axes(next(lines, op.line), self.rates.mesh)
        devices = (
            math.prod(self.rates.mesh.get(axis, 1) for axis in axes) if axes else math.prod(self.rates.mesh.values())
        )
        sizes = [_elements(dims) * _BITS.get(of, 8) / 8 for of, dims in _ARRAY.findall(op.shape)]
        # What begins an asynchronous one names operands beside results.
        size = max(sizes, default=0.0) if op.opcode.endswith("-start") else sum(sizes)
        share = (devices - 1) / max(devices, 1)
        if kind == "reduce-scatter" and not op.opcode.endswith("-start"):
            size *= devices  # what goes in is as much larger than what comes out
        sent = size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        return kind, sent, sent / self.rates.link_bytes_per_second(axes)

    def _fused(self, op: Operation) -> tuple[str, str, tuple[str, float, float]] | None:
        """A part of an asynchronous collective that XLA cut up and put into fusions, beside what they compute.

        Returns:
            "Start", "Done" or, between them, nothing; its channel; kind, bytes and seconds of the whole. None for other
            operations.
        """
        if op.opcode != "fusion" or not self._inside(op) & set(COLLECTIVES):
            return None
        within = list(self._within(op))
        for collective in within:
            channel = re.search(r"channel_id=(\d+).*chain_id=", collective.line)
            if channel and (whole := self._collective(collective)):
                return "".join(part for inner in within for part in _PART.findall(inner.line)), channel[1], whole
        return None

    def _within(self, op: Operation) -> Iterator[Operation]:
        """The operations that an operation calls, and those that fusions among them call."""
        for inner in (inner for name in op.called() for inner in self.computations[name]):
            yield inner
            if inner.opcode == "fusion":
                yield from self._within(inner)


def _elements(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


def _largest_bytes(shape: str) -> float:
    return max((_elements(dims) * _BITS.get(of, 8) / 8 for of, dims in _ARRAY.findall(shape)), default=0.0)


def _axes(line: str, mesh: dict[str, int]) -> frozenset[str]:
    """The mesh axes that a collective goes over; empty where it does not say."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        names = frozenset(re.findall(r"'(\w+)'", named[2]))
        if names <= mesh.keys():
            return names
        group = math.prod(int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1]) if name in names)
    elif listed := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        group = int(listed[1])
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = len(listed[1].split(","))
    else:
        return frozenset()
    return next((frozenset({axis}) for axis, size in mesh.items() if size == group), frozenset())
