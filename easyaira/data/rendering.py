"""Rendering of chat templates, within limits of time and memory.

A template is code that comes with a model, and Jinja's sandbox does not bound it: `7**(10**9)` is
one operation that holds the interpreter's lock for hours, and a text may be as long as the memory.
So a template that is not ours is rendered by a child process that the system limits.

python rendering.py SECONDS BYTES     answers each request, a line of JSON on stdin, with a line
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easyaira import torchless

MAX_SECONDS = 2  # processor time of one rendering
MAX_BYTES = 512 * 2**20  # memory of the child beyond that of its libraries
MAX_TEXT = 64 * 2**20  # characters of one rendering
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


class Rendered(NamedTuple):
    """The text of a conversation, and its spans inside {% generation %} blocks, if there are any
    in the template."""

    text: str
    marks: list[tuple[int, int]] | None


class Refused(Exception):
    """The template called raise_exception: it does not take these messages."""


class Broken(Exception):
    """The template cannot be rendered."""


class Ended(Broken):
    """The process that renders the template ended."""


def render(
    template: str,
    tokens: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = False,
) -> Rendered:
    """Render as `apply_chat_template` does; `tokens` are the tokenizer's special tokens by name.

    Raises:
        Refused, Broken: with the reason.
    """
    import jinja2

    utils = torchless.import_transformers(".utils.chat_template_utils")
    marked = GENERATION.search(template) is not None
    try:
        (text,), marks = utils.render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
        text.encode()
    except jinja2.TemplateSyntaxError as error:
        raise Broken(f"line {error.lineno}: {error.message}") from error
    except MemoryError as error:
        raise Broken(f"takes more than {MAX_BYTES >> 20} MiB of memory") from error
    except Exception as error:
        kind = Refused if type(error) is jinja2.TemplateError else Broken
        raise kind(" ".join(str(error).split())[:300] or type(error).__name__) from error
    if len(text) > MAX_TEXT:
        raise Broken(f"writes more than {MAX_TEXT >> 20} MiB")
    return Rendered(text, marks[0] if marked else None)


class Child:
    """A child process that renders one template until this object is gone."""

    def __init__(self, template: str, tokens: Mapping[str, Any]):
        self._process = subprocess.Popen(
            # -P: files beside this one must not hide libraries of the same name
            [sys.executable, "-P", __file__, str(MAX_SECONDS), str(MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each thread takes address space
            start_new_session=True,  # a signal to the run is not a fault of the template
        )
        weakref.finalize(self, _close, self._process)
        self._template: tuple[Any, ...] = (template, dict(tokens))  # sent with the first request

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> Rendered:
        """As the function `render`.

        Raises:
            Refused, Broken, Ended: with the reason.
        """
        request = json.dumps([*self._template, list(messages), add_generation_prompt])
        self._template = ()
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            status = self._process.wait()
            if status == -signal.SIGXCPU:
                raise Ended(f"does not finish within {MAX_SECONDS} seconds")
            raise Ended(f"the process that renders it ended with status {status}")
        kind, content, marks = json.loads(answer)
        if kind != "Rendered":
            raise {"Refused": Refused, "Broken": Broken}[kind](content)
        return Rendered(content, None if marks is None else [(a, b) for a, b in marks])


def _close(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _serve(seconds: int, memory: int) -> None:
    torchless.hide_torch()
    chat_template_utils: Any = torchless.import_transformers(".utils.chat_template_utils")
    started = chat_template_utils.datetime.now()
    # one date for all rows, also after midnight
    chat_template_utils.datetime = types.SimpleNamespace(now=lambda: started)
    pages = Path("/proc/self/statm")  # Linux
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    template, tokens = "", {}
    for line in sys.stdin.buffer:
        *first, messages, add_generation_prompt = json.loads(line)
        template, tokens = first or (template, tokens)
        until = math.ceil(time.process_time()) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            rendered = render(template, tokens, messages, add_generation_prompt)
            answer = ["Rendered", rendered.text, rendered.marks]
        except (Refused, Broken) as error:
            answer = [type(error).__name__, str(error), None]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
