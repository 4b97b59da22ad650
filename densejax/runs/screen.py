"""One line on the terminal that says how far a command is; where there is none, nothing is shown.

The cursor waits at the start of that line, so that what is written next, such as the ^C of a
terminal or a message, comes in its place and not behind it.
"""

import contextlib
import shutil
import sys

CLEAR = "\r\x1b[K"


def is_terminal() -> bool:
    """Whether somebody may look at the line."""
    return sys.stderr.isatty()


def show(*parts: str) -> None:
    """Shows the line in place of the one before, without its first parts where all do not fit."""
    while len(" ".join(parts)) > shutil.get_terminal_size().columns:
        parts = parts[1:]
    if is_terminal():
        _write(f"{CLEAR}{' '.join(parts)}\r")


def say(text: str) -> None:
    """Writes a line that stays, on standard error."""
    _write(f"{CLEAR if is_terminal() else ''}{text}\n")


def _write(text):
    with contextlib.suppress(OSError):  # the output may be a file on a full disk
        sys.stderr.write(text)
        sys.stderr.flush()
