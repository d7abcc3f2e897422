"""Analysis of a compiled program: memory, collectives, and the compiler's sharding warnings.

Parses XLA's text form of programs ("HLO") for CPUs, GPUs and TPUs."""

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

from easyaira.errors import ConfigError

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
REMATERIALIZED = "Involuntary full rematerialization"  # an array was replicated to reshard it


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
        kind: one of COLLECTIVES.
        times: executions per run of the program.
        shapes: (dtype, sizes) of each of the collective's arrays on a device: the gathered shape of
            an all-gather, else the operand's.
        bytes: bytes that a device sends per execution, on a ring.
        channel: channel id in the program, or None.
    """

    kind: str
    times: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: float
    channel: int | None = None


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        seconds: compile time.
        arguments, temporaries, outputs: bytes per device; outputs exclude those that alias
            arguments. All are zero if the program does not fit.
        refused: the compiler's message if the program does not fit in memory, else "".
        collectives: the same for all devices; None if the program's text cannot be read.
        rematerialized: the compiler's warnings about arrays replicated to reshard them.
        counted: not compiled; see plan/counted.py.
    """

    seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    refused: str = ""
    collectives: list[Collective] | None = None
    rematerialized: tuple[str, ...] = ()
    counted: bool = False

    @property
    def memory(self) -> int:
        """Bytes needed per device; a lower bound if the program does not fit."""
        match = re.search(r"(?:Used |\()([\d.]+)([KMGT])\b", self.refused)
        if match:
            return int(float(match[1]) * 1024 ** " KMGT".index(match[2]))
        return self.arguments + self.temporaries + self.outputs


def compiled(lower: Callable[[], Any], loops: int) -> Program:
    """Compile the program of `lower` and analyse it.

    Args:
        lower: () -> jax.stages.Lowered.
        loops: trip count assumed for loops with a dynamic bound.

    Raises:
        ConfigError: the compiler refuses the program, other than for lack of memory.
    """
    begun = time.perf_counter()
    with _captured_stderr() as output, _uncached():
        try:
            program = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = lacking(error)
            if refused is None:
                raise ConfigError(
                    f"dry run: XLA cannot compile this: {str(error).splitlines()[0]}"
                ) from error
            return Program(time.perf_counter() - begun, refused=refused)
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    try:
        collectives = collectives_of(program.as_text(), loops)
    except jax.errors.JaxRuntimeError:  # libtpu does not match this JAX version
        collectives = None
    warnings = {_resharded(line) for line in output if REMATERIALIZED in line}
    return Program(
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives,
        rematerialized=tuple(sorted(warnings)),
    )


def lacking(error: Exception) -> str | None:
    """The out-of-memory message of an error, or None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    words = re.search(r"([Rr]an o|O)ut of memory[^\n]*", str(error))
    return words[0] if words else str(error).splitlines()[0]


@contextmanager
def _uncached() -> Iterator[None]:
    """Disable the compilation cache, since cached programs come without the compiler's warnings."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it reads the setting only once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Capture the lines written to standard error during the block, also by native libraries.

    The block yields a list that is filled when the block ends."""
    output: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield output
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            output += file.read().decode(errors="replace").splitlines()


def _resharded(warning: str) -> str:
    """The array of a rematerialisation warning, and its old and new sharding."""
    match = re.search(r"go from sharding (.*) to (.*) efficiently .*?(%\S+ = \S+)", warning)
    return f"{match[3]} from {match[1]} to {match[2]}" if match else warning[:200]


# HLO syntax: a computation is a name and lines in braces, and a line is
# `%name = shape operation(operands), attributes`.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)")
_SHAPE = re.compile(r"\b(pred|bf16|token|[suf]\d+|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


class Line(NamedTuple):
    """One operation (one line) of an HLO program."""

    name: str
    shape: str
    operation: str
    rest: str  # text after the opening parenthesis of the operands

    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.partition(")")[0])


Lines = Mapping[str, Mapping[str, Line]]  # computation: name: line, the last being its result


def collectives_of(text: str, loops: int = 1) -> list[Collective]:
    """The collectives of a program and how often each is executed.

    Counts in a loop's body are multiplied by the loop's trip count. Of several branches, the one
    that sends most counts.

    Args:
        text: HLO.
        loops: trip count assumed for loops with a dynamic bound.
    """
    entry, lines = computations_of(text)
    count = int(match[1]) if (match := re.search(r"num_partitions=(\d+)", text)) else 1
    known: dict[str, list[Collective]] = {}

    def inside(name: str) -> list[Collective]:
        if name not in known:
            unique: dict[Any, Collective] = {}
            for line in lines.get(name, {}).values():
                for i, c in enumerate(of(line, name)):
                    # TPUs fuse pieces of one collective with several products; count it once
                    piece = line.operation == "fusion" and c.channel is not None
                    unique[(c.kind, c.channel) if piece else (line.name, i)] = c
            known[name] = list(unique.values())
        return known[name]

    def of(line: Line, where: str) -> list[Collective]:
        kind = line.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # on TPUs, an all-reduce is its first half
            given = [lines[where][o].shape for o in line.operands() if o in lines[where]]
            return [_collective(kind, " ".join(given), line.rest, count)]
        if line.operation in ("async-update", "async-done"):
            return []  # counted at async-start
        collectives = [c for called in _CALLED.findall(line.rest) for c in inside(called)]
        if branches := _BRANCHES.search(line.rest):
            each = [inside(name) for name in _NAME.findall(branches[1])]
            collectives += max(each, key=lambda branch: sum(c.times * c.bytes for c in branch))
        if line.operation != "while":
            return collectives
        times = _trips(line, lines[where], lines) or loops
        return [c._replace(times=c.times * times) for c in collectives]

    return inside(entry)


def computations_of(text: str) -> tuple[str, Lines]:
    """Name of the entry computation, and the lines of all computations."""
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
    """Trip count of a loop: as annotated (CPU, GPU) or from its counter (TPU); None for a dynamic
    bound."""
    if annotated := _TRIPS.search(loop.rest):
        return int(annotated[1])

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
    increment = at_place(result, body)
    steps = [number(body.get(name), body) for name in increment.operands()] if increment else []
    step = next((n for n in steps if n), 1)
    return max(0, -(-(stop - start) // step))


def _collective(kind: str, given: str, rest: str, count: int) -> Collective:
    """Build a Collective.

    Args:
        given: shapes of its operands, as text.
        rest: see `Line`.
        count: number of devices.
    """
    size = _group(rest) or count
    shapes = [(t, tuple(map(int, n.split(","))) if n else ()) for t, n in _SHAPE.findall(given)]
    axis = int(match[1]) if (match := re.search(r"dimensions=\{(\d+)", rest)) else 0
    if kind == "all-gather":
        shapes = [(t, (*n[:axis], n[axis] * size, *n[axis + 1 :])) for t, n in shapes]
    sent = {
        "all-gather": (size - 1) / size,
        "reduce-scatter": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
        "collective-permute": 1,
    }[kind]
    channel = int(match[1]) if (match := re.search(r"channel_id=(\d+)", rest)) else None
    return Collective(kind, 1, tuple(shapes), sum(map(_bytes, shapes)) * sent, channel)


def _group(rest: str) -> int | None:
    """Size of a replica group, in any of HLO's three notations; None: all devices."""
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(groups[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])  # a sub-axis gives its size
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    return None


def _bytes(shape: tuple[str, tuple[int, ...]]) -> float:
    dtype, sizes = shape
    bits = {"pred": 8, "bf16": 16, "token": 0, "c64": 64, "c128": 128}.get(dtype)
    if bits is None:
        bits = int(re.search(r"\d+", dtype)[0])
    return math.prod(sizes) * bits / 8
