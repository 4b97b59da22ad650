"""One line on the terminal that says how far a command is; without a terminal, nothing is shown.

The cursor stays at the start of that line. So the next text, such as a message or the ^C of a
terminal, replaces the line and does not follow it.
"""

import contextlib
import shutil
import sys

CLEAR = "\r\x1b[K"


def is_terminal() -> bool:
    """Whether somebody may look at the line."""
    return sys.stderr.isatty()


def show(*parts: str) -> None:
    """Shows the line in place of the old one; its first parts are left out if not all fit."""
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
