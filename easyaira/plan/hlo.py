"""What a compiled program says of itself: memory, communication between devices, and what the
compiler could not do well. Reads XLA's text form of programs ("HLO"), of CPUs, GPUs and TPUs."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
REMATERIALIZED = "Involuntary full rematerialization"  # of an array that had to be moved


class Collective(NamedTuple):
    """A communication between devices, as it stands in a program.

    Attributes:
        kind: of COLLECTIVES.
        times: that it happens in a run of the program.
        shapes: of what each device has in the end, (dtype, sizes) each.
        bytes: that a device sends each time, on a ring.
        channel: its number in the program, if it has one.
    """

    kind: str
    times: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: float
    channel: int | None = None


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        seconds: that the compiler took.
        arguments, temporaries, outputs: bytes on each device; outputs without those that take the
            place of arguments. Zero where it does not fit.
        refused: the compiler's words, where a device has not got the memory.
        collectives: of all devices alike; None where the program cannot be read.
        rematerialized: the compiler's warnings of arrays that were gathered whole to be moved.
    """

    seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    refused: str = ""
    collectives: list[Collective] | None = None
    rematerialized: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes that a device needs; at least, where the compiler gave up."""
        found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\b", self.refused)
        if found:
            return int(float(found[1]) * 1024 ** " KMGT".index(found[2]))
        return self.arguments + self.temporaries + self.outputs


def compiled(lower: Callable[[], Any], loops: int) -> Program:
    """The program that `lower` describes, compiled and read.

    Args:
        lower: () -> jax.stages.Lowered.
        loops: how often loops go round whose number is decided while the program runs.
    """
    begun = time.perf_counter()
    with _standard_error() as said, _uncached():
        try:
            program = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = lacking(error)
            if refused is None:
                raise
            return Program(time.perf_counter() - begun, refused=refused)
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    try:
        collectives = collectives_of(program.as_text(), loops)
    except jax.errors.JaxRuntimeError:  # of a libtpu that this JAX was not made for
        collectives = None
    warnings = {_moved(line) for line in said if REMATERIALIZED in line}
    return Program(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives,
        rematerialized=tuple(sorted(warnings)),
    )


def lacking(error: Exception) -> str | None:
    """What an error says of a device's memory, if that is what was missing."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    words = re.search(r"([Rr]an o|O)ut of memory[^\n]*", str(error))
    return words[0] if words else str(error).splitlines()[0]


@contextmanager
def _uncached() -> Iterator[None]:
    """A program out of the cache of compiled ones comes without the compiler's warnings."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # which has looked at that once, and would not again
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """What is written to standard error, also by libraries that are no Python: much, and little of
    it of use to others."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()


def _moved(warning: str) -> str:
    """Which array it was, and from where to where it had to go."""
    found = re.search(r"go from sharding (.*) to (.*) efficiently .*?(%\S+ = \S+)", warning)
    return f"{found[3]} from {found[1]} to {found[2]}" if found else warning[:200]


# HLO: a line is `%name = shape operation(operands), attributes`, in a computation's braces.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)")
_SHAPE = re.compile(r"\b(pred|bf16|token|[suf]\d+|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


class Line(NamedTuple):
    """An operation of a program, as it stands there."""

    name: str
    shape: str
    operation: str
    rest: str  # from the operands on

    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.partition(")")[0])


Lines = Mapping[str, Mapping[str, Line]]  # of each computation, by name, the last one its result


def collectives_of(text: str, loops: int = 1) -> list[Collective]:
    """The collectives of a program, with how often each happens: what stands in the body of a loop
    happens as often as that goes round, and of branches the one that sends most is taken.

    Args:
        text: HLO.
        loops: how often loops go round that do not say so themselves.
    """
    entry, lines = computations_of(text)
    count = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    known: dict[str, list[Collective]] = {}

    def inside(name: str) -> list[Collective]:
        if name not in known:
            found: dict[Any, Collective] = {}
            for line in lines.get(name, {}).values():
                for i, c in enumerate(of(line, name)):
                    # a TPU fuses pieces of one collective with several products: it is in each
                    piece = line.operation == "fusion" and c.channel is not None
                    found[(c.kind, c.channel) if piece else (line.name, i)] = c
            known[name] = list(found.values())
        return known[name]

    def of(line: Line, where: str) -> list[Collective]:
        kind = line.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # of which it is the first half, on a TPU
            given = [lines[where][o].shape for o in line.operands() if o in lines[where]]
            return [_collective(kind, " ".join(given), line.rest, count)]
        if line.operation in ("async-update", "async-done"):
            return []  # they name what async-start began
        found = [c for called in _CALLED.findall(line.rest) for c in inside(called)]
        if branches := _BRANCHES.search(line.rest):
            each = [inside(name) for name in _NAME.findall(branches[1])]
            found += max(each, key=lambda branch: sum(c.times * c.bytes for c in branch))
        if line.operation != "while":
            return found
        times = _trips(line, lines[where], lines) or loops
        return [c._replace(times=c.times * times) for c in found]

    return inside(entry)


def computations_of(text: str) -> tuple[str, Lines]:
    """The name of the program's first computation, and the lines of all."""
    lines: dict[str, dict[str, Line]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            lines[name] = {}
            entry = name if head[1] else entry
        elif name and (match := _LINE.match(line)):
            lines[name][match[1]] = Line(*match.groups())
    return entry, lines


def _trips(loop: Line, around: Mapping[str, Line], lines: Lines) -> int | None:
    """How often a loop goes round: as it says (CPU, GPU), or as its counter does (TPU); None if
    that is decided while the program runs."""
    if said := _TRIPS.search(loop.rest):
        return int(said[1])

    def number(line: Line | None, among: Mapping[str, Line]) -> int | None:
        while line and line.operation in ("copy", "bitcast"):
            line = among.get(line.operands()[0])
        constant = line and re.match(r"-?\d+\)", line.rest) and line.operation == "constant"
        return int(line.rest.partition(")")[0]) if constant else None

    condition = lines[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    body = lines[re.search(r"body=%?([\w.\-]+)", loop.rest)[1]]
    *_, test = condition.values()
    if test.operation != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition[name] for name in test.operands())
    place = re.search(r"index=(\d+)", counter.rest)
    stop = number(bound, condition)
    if stop is None or place is None:
        return None

    def at_place(result: Line | None, among: Mapping[str, Line]) -> Line | None:
        if result is None or result.operation != "tuple":
            return None
        return among.get(result.operands()[int(place[1])])

    start = number(at_place(around.get(loop.operands()[0]), around), around) or 0
    *_, result = body.values()
    more = at_place(result, body)
    steps = [number(body.get(name), body) for name in more.operands()] if more else []
    step = next((n for n in steps if n), 1)
    return max(0, -(-(stop - start) // step))


def _collective(kind: str, given: str, rest: str, count: int) -> Collective:
    """One collective.

    Args:
        given: the shapes of its operands.
        rest: its line from the operands on.
        count: devices.
    """
    size = _group(rest) or count
    shapes = [(t, tuple(map(int, n.split(","))) if n else ()) for t, n in _SHAPE.findall(given)]
    axis = int(found[1]) if (found := re.search(r"dimensions=\{(\d+)", rest)) else 0
    if kind == "all-gather":
        shapes = [(t, (*n[:axis], n[axis] * size, *n[axis + 1 :])) for t, n in shapes]
    sent = {
        "all-gather": (size - 1) / size,
        "reduce-scatter": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
        "collective-permute": 1,
    }[kind]
    channel = int(found[1]) if (found := re.search(r"channel_id=(\d+)", rest)) else None
    return Collective(kind, 1, tuple(shapes), sum(map(_bytes, shapes)) * sent, channel)


def _group(rest: str) -> int | None:
    """How many devices take part together, in one of HLO's three ways to say so; None: all."""
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(groups[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])  # a part of an axis: its size
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    return None


def _bytes(shape: tuple[str, tuple[int, ...]]) -> float:
    dtype, sizes = shape
    bits = {"pred": 8, "bf16": 16, "token": 0, "c64": 64, "c128": 128}.get(dtype)
    if bits is None:
        bits = int(re.search(r"\d+", dtype)[0])
    return math.prod(sizes) * bits / 8
