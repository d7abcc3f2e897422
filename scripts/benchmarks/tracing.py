"""A trace of updates, and what of them costs most: which part of the model, in which pass.

The profiler knows operations of compiled programs by names such as `fusion.12`. The program's text
says which line of the model each comes from (`op_name`), and which have no name of their own.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOSS, OPTIMIZER = "the_loss", "the_optimizer"  # scopes that a measured step puts into names

PARTS = (  # of an op_name, the first that is found in it
    (r"/(attn|self_attn)/(c_attn|c_proj|[qkvo]_proj|out_proj)/", "attention's projections"),
    (r"/(attn|self_attn)/", "attention"),
    (r"/(mlp|fc1|fc2)/", "MLP"),
    (r"/(ln_\w|\w*norm)/", "norms"),
    (r"/(wte|wpe|embed\w*)/|/model/(jit\(\w*take\w*\)|gather|scatter)", "embedding"),
    (r"CausalLM", "layers, all else"),
    (LOSS, "head and loss"),
    (OPTIMIZER, "optimizer"),
)
HOLDERS = {"while", "call", "conditional"}  # their time is that of what is in them
REST = "all else"


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """What happens is written to `folder`, for TensorBoard's profile page and for Perfetto."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, create_perfetto_trace=False, profiler_options=options):
        yield


def costs(folder: Path, texts: Mapping[str, str], updates: int) -> list[dict[str, Any]]:
    """Seconds of an update by part, pass and kind of operation, the largest first.

    They are added up over all threads, so that a share is one of what all operations take and not
    of the time on the clock.

    Args:
        folder: of the newest trace.
        texts: the compiled programs by name.
        updates: how many were recorded.

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
        raise SystemExit(f"{file}: no operation of {', '.join(texts)} in it")
    whole = sum(total.values())
    return [
        {"cost": place, "s an update": seconds / updates, "share": seconds / whole}
        for place, seconds in sorted(total.items(), key=lambda item: -item[1])
    ]


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def places(text: str) -> dict[str, str | None]:
    """The place of every operation of a compiled program; None for those that only hold others.

    An operation without a name takes that of the computation that it calls, or else that of most
    operations around it.
    """
    computations: dict[str, list[tuple[str, str, str | None, str | None]]] = {}
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            inside = computations.setdefault(begin[1], [])
        elif operation := _OPERATION.match(line):
            named, calls = _NAME.search(line), _CALLS.search(line)
            inside.append((*operation.groups(), named and named[1], calls and calls[1]))

    def usual(computation: str | None) -> str | None:
        found = Counter(
            part_of(name) for _, _, name, _ in computations.get(computation, ()) if name
        )
        return max(found, key=found.__getitem__) if found else None

    told: dict[str, str | None] = {}
    for computation, operations in computations.items():
        for name, opcode, op_name, calls in operations:
            part = part_of(op_name) if op_name else usual(calls) or usual(computation)
            product = opcode in ("dot", "convolution") or (op_name or "").endswith("dot_general")
            kind = "products" if product else "all between products"
            told[name] = None if opcode in HOLDERS else f"{part or REST}: {kind}"
    return told


def part_of(op_name: str) -> str:
    """`head and loss, backward`, from jit(step)/transpose(jvp(the_loss))/while/body/..."""
    part = next((part for pattern, part in PARTS if re.search(pattern, op_name)), None)
    if part is None or part == "optimizer":
        return part or REST
    if "rematted_computation" in op_name:
        return f"{part}, computed again"
    return f"{part}, {'backward' if 'transpose(' in op_name else 'forward'}"
