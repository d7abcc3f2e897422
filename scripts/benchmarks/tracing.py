"""Traces of updates, and their cost by part of the model and pass.

The profiler identifies operations of compiled programs by names such as `fusion.12`. The program's
text gives the source of most of them in the model (`op_name`).
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from easyaira.plan.hlo import Line, computations_of

LOSS, OPTIMIZER = "the_loss", "the_optimizer"  # scopes of a measured step, in op_names

REST, LAYERS = "all else", "layers, all else"

PARTS = (  # first pattern that matches an op_name, and its part
    (r"/(attn|self_attn)/(c_attn|c_proj|[qkvo]_proj|out_proj)/", "attention's projections"),
    (r"/(attn|self_attn)/", "attention"),
    (r"/(mlp|fc1|fc2)/", "MLP"),
    (r"/(ln_\w|\w*norm)/", "norms"),
    (r"/(wte|wpe|embed\w*)/|/model/(jit\(\w*take\w*\)|gather|scatter)", "embedding"),
    (r"CausalLM", LAYERS),
    (LOSS, "head and loss"),
    (OPTIMIZER, "optimizer"),
)
PRODUCTS = {"dot", "convolution"}
HOLDERS = {"while", "call", "conditional"}  # their time is the time of their contents
LOOSE = {"constant", "parameter", "tuple"}  # their part says nothing about their users


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Record a trace to `folder`, for TensorBoard's profile page and for Perfetto."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, create_perfetto_trace=False, profiler_options=options):
        yield


def costs(folder: Path, texts: Mapping[str, str], updates: int) -> list[dict[str, Any]]:
    """Seconds of an update by part, pass and kind of operation, in descending order.

    Seconds are summed over all threads, so a share is a share of the operations' total time, not of
    the wall time.

    Args:
        folder: folder of traces; the newest is read.
        texts: texts of the compiled programs by name.
        updates: number of recorded updates.

    Raises:
        SystemExit: the trace has no operation of these programs.
    """
    parts = {name: places(text) for name, text in texts.items()}
    file = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(file) as stream:
        events = json.load(stream)["traceEvents"]
    total: dict[str, float] = defaultdict(float)
    for event in events:
        about = event.get("args") or {}
        program = about.get("hlo_module", "").removeprefix("jit_")
        if event.get("ph") == "X" and program in parts and "hlo_op" in about:
            place = parts[program].get(about["hlo_op"], REST)
            if place is not None:
                total[place] += event["dur"] / 1e6
    if not total:
        raise SystemExit(f"{file}: has no operation of {', '.join(texts)}")
    whole = sum(total.values())
    return [
        {"cost": place, "s an update": seconds / updates, "share": seconds / whole}
        for place, seconds in sorted(total.items(), key=lambda item: -item[1])
    ]


_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


class _Operation(NamedTuple):
    opcode: str
    operands: list[str]
    op_name: str
    calls: str | None


def _operation(line: Line) -> _Operation:
    op_name, calls = _NAME.search(line.rest), _CALLS.search(line.rest)
    named, called = op_name[1] if op_name else "", calls and calls[1]
    return _Operation(line.operation, line.operands(), named, called)


def places(text: str) -> dict[str, str | None]:
    """Part, pass and kind of every operation of a compiled program; None for mere containers.

    Operations without a name (copies, conversions, rewritten ones) take the part of the nearest
    named operation: first of the operations that they call, then along operands and users.
    """
    computations = {
        computation: {name: _operation(line) for name, line in lines.items()}
        for computation, lines in computations_of(text)[1].items()
    }

    def called(operation: _Operation) -> list[_Operation]:
        return list(computations.get(operation.calls, {}).values())

    def own_part(operation: _Operation) -> str | None:
        if operation.op_name:
            return part_of(operation.op_name)
        counts = Counter(part_of(inner.op_name) for inner in called(operation) if inner.op_name)
        return max(counts, key=counts.__getitem__) if counts else None

    places: dict[str, str | None] = {}
    for operations in computations.values():
        parts = {name: own_part(operation) for name, operation in operations.items()}
        parts = _spread(parts, operations)
        for name, operation in operations.items():
            product = any(
                one.opcode in PRODUCTS or one.op_name.endswith("dot_general")
                for one in (operation, *called(operation))
            )
            kind = "products" if product else "all but products"
            places[name] = None if operation.opcode in HOLDERS else f"{parts[name]}: {kind}"
    return places


def _spread(
    parts: Mapping[str, str | None], operations: Mapping[str, _Operation]
) -> dict[str, str]:
    """Parts for all operations of a computation, each from the nearest operation with a part.

    Parts more specific than `layers` spread first, and not through loops; then all parts do."""
    known = {name: part for name, part in parts.items() if part and part != REST}
    for sources, loose in (
        ([name for name, part in known.items() if not part.startswith(LAYERS)], LOOSE | HOLDERS),
        (list(known), LOOSE),
    ):
        neighbours: dict[str, list[str]] = defaultdict(list)
        for name, operation in operations.items():
            for operand in operation.operands:
                if operand in operations and not (
                    {operation.opcode, operations[operand].opcode} & loose
                ):
                    neighbours[name].append(operand)
                    neighbours[operand].append(name)
        queue = deque(sources)
        while queue:
            name = queue.popleft()
            for other in neighbours[name]:
                if other not in known:
                    known[other] = known[name]
                    queue.append(other)
    usual = Counter(known.values()).most_common(1)
    return {name: known.get(name, usual[0][0] if usual else REST) for name in parts}


def part_of(op_name: str) -> str:
    """Name of part and pass: jit(step)/transpose(jvp(the_loss))/... -> head and loss, backward."""
    part = next((part for pattern, part in PARTS if re.search(pattern, op_name)), None)
    if part is None or part == "optimizer":
        return part or REST
    if "rematted_computation" in op_name:
        return f"{part}, computed again"
    return f"{part}, {'backward' if 'transpose(' in op_name else 'forward'}"
