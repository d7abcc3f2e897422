"""What can go wrong, and the exit status that tells a scheduler what to do about it.

Every message is one line: where, what was found, what was wanted, and how to mend it.
"""

from __future__ import annotations


def told(error: BaseException) -> tuple[str, int]:
    """An error in a line, and the exit status that tells a scheduler what to do about it."""
    if isinstance(error, EasyAiraError):
        kind = "stopped" if error.exit_status == Preempted.exit_status else "error"
        return f"{kind}: {error}", error.exit_status
    lines = str(error).strip().splitlines()
    return f"error: {type(error).__name__}: {lines[0][:300] if lines else 'a bug'}", 1


class EasyAiraError(Exception):
    """Base of all errors that a user can mend. Names and texts out of files are in the message as
    they print: one line, whatever they hold."""

    exit_status = 1

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class ConfigError(EasyAiraError):
    exit_status = 2


class DataError(EasyAiraError):
    exit_status = 2


class TokenizerError(EasyAiraError):
    exit_status = 2


class WeightsError(EasyAiraError):
    exit_status = 2


class UnsafeInputError(EasyAiraError):
    exit_status = 2


class CheckFailed(EasyAiraError):
    """A check of the self-test."""

    exit_status = 2


class NonFiniteError(EasyAiraError):
    """A loss or a gradient was NaN or infinite; the parameters from before it are kept."""

    exit_status = 3


class StorageError(EasyAiraError):
    """Reading or writing a run folder failed."""

    exit_status = 4


class HostError(EasyAiraError):
    """A host hangs or is lost."""

    exit_status = 5


class Preempted(EasyAiraError):
    """The run was told to stop and has saved its state; the same command continues it."""

    exit_status = 75
