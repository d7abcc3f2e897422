"""Orbax's errors in one line, without the pages that its threads print.

Importing this file changes the hooks of the process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from easyaira.distributed import hosts, watchdog
from easyaira.errors import StorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _Failures(logging.Handler):
    """Log handler that ends the run when a process fails to write its shards.

    With several processes such a failure deadlocks Orbax's barrier. Its log record is the earliest
    signal."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "in background save thread" in message and record.exc_info and hosts.several():
            folder = message.rpartition("directory: ")[2]
            reason = short(record.exc_info[1])
            watchdog.leave(StorageError(f"{folder}: cannot be saved: {reason}"))


logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file at INFO
logging.getLogger("absl").addHandler(_Failures())
logging.getLogger("absl").propagate = False  # pages of tracebacks for errors that Orbax raises, too


def _without_closed_loops(print_error: Callable[..., Any]) -> Callable[..., None]:
    """An unraisablehook that drops the errors of TensorStore's threads after a failed save, whose
    event loop is closed."""

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_error(unraisable)

    return hook


sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # errors of abandoned tasks
# Orbax abandons the other writes of a failed save; Python warns when it collects them.
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the hundreds of lines that Orbax's threads and abandoned coroutines print for one
    damaged file. Errors must be caught inside the block."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = hooks


def short(error: BaseException) -> str:
    """One line with the array or file named in an Orbax error, and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    for cause in map(os.strerror, NO_ROOM):
        if cause in str(error):  # behind paths, in a long text
            return cause
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.split(" [tensorstore_spec")[0]
    if array := re.search(r'"([^"]+)/[^"/]*" in OCDBT database at [^"]*"([^"]*)/":? (.*)', text):
        item = array[2].rpartition("/")[2]
        return f"{item}/{array[1].replace('.', '/')}: {array[3]}"[:300]
    return text[:300]
