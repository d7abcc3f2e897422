"""Settings of the C library's allocator."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_memory() -> None:
    """Keep freed memory in the process, for the next update. Call it before JAX starts threads.

    On a CPU, XLA allocates the temporary arrays of a step anew in every update. By default, glibc
    maps large blocks and returns them to the system, which takes up to half of an update's time.
    Other C libraries have no such settings; nothing happens there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_ARENA_MAX, 1)  # other arenas cannot hold blocks above 64 MiB
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def give_back_memory() -> None:
    """Return to the system what `keep_memory` kept, before other processes need memory."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
