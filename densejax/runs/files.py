"""Files that are whole whenever they are read."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from typing import Any, BinaryIO

from etils import epath

from densejax.config import UserError

VISIBLE = 60.0  # seconds within which every host sees what process 0 wrote


def appears(path: epath.Path) -> bool:
    """Whether a file is there, now or within `VISIBLE` seconds.

    A network disk may show what another host wrote only after its cache has expired.
    """
    deadline = time.monotonic() + VISIBLE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def path_of(flag: str, text: str) -> epath.Path:
    """The path that a person names; UserError for one that nothing here can open."""
    try:
        text.encode()
        path = epath.Path(text)
        path.exists()  # object stores need a package of their own
        return path
    except KeyError as error:
        problem = f"{error} is no kind of storage that is known; give a path without ://"
        raise UserError(f"{flag}={text}: {problem}") from error
    except (UnicodeError, OSError, ImportError) as error:
        raise UserError(f"{flag}={text}: {error}; give another path") from error


def opened(path: epath.Path) -> BinaryIO:
    """A file to read; OSError, at once, for a FIFO and whatever else is no regular file."""
    if "://" in os.fspath(path):
        return path.open("rb")
    file = open(path, "rb", opener=lambda *a: os.open(a[0], a[1] | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def read_text(path: epath.Path) -> str | None:
    """The text of a small file, None where there is none. It never waits, as for a FIFO.

    Raises UserError for what is there and is no file of UTF-8 text that may be read.
    """
    try:
        if "://" in os.fspath(path) and not path.exists():
            return None
        with opened(path) as file:
            return file.read().decode()
    except (OSError, UnicodeError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not os.path.islink(path):
            return None
        raise UserError(
            f"{path} cannot be read ({error}): put the file that belongs there in its place, or "
            f"move away what is there"
        ) from error


def parse_json(text: str) -> Any:
    """The value that JSON text stands for; ValueError for anything else, however deeply nested."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes such that a reader, or a kill at any moment, finds the old or the new file."""
    temporary = path.parent / f"{path.name}.{secrets.token_hex(4)}.tmp"
    content = content.encode() if isinstance(content, str) else bytes(content)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:  # a full disk needs no half of a file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON as `write` does."""
    write(epath.Path(path), json.dumps(value, indent=2) + "\n")


def remove_leftovers(directory: epath.Path) -> None:
    """Removes what a kill within `write` has left; for whoever alone writes in the directory."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if re.search(r"\.[0-9a-f]+\.tmp$", path.name):
            with contextlib.suppress(OSError):  # it may be anything, of anybody
                path.unlink()


class Growing:
    """A file that is appended to. What a disk refuses is kept and written the next time.

    Object stores have no append: there the file is written whole each time.

    Attributes:
      content: all of it.
    """

    def __init__(self, path: epath.Path, content: str | bytes = b""):
        """`content` replaces what is there, at the first `write`."""
        self._path, self._appends = path, "://" not in str(path)
        self.content, self._written = bytearray(), 0
        self.add(content)

    def add(self, content: str | bytes) -> None:
        """Appends in memory alone."""
        self.content += content.encode() if isinstance(content, str) else content

    def write(self) -> None:
        """Brings the file up to date; OSError where the disk refuses."""
        size, begin = len(self.content), self._written
        self._written = 0  # after a failure the file is written whole: its end may be torn
        if not (begin and self._appends):
            write(self._path, self.content)
        elif begin < size:
            with self._path.open("ab") as file:
                file.write(self.content[begin:])
        self._written = size


def seal(record: dict) -> dict:
    """The record with a SHA-256 of all else in it, by which `unseal` sees damage."""
    return record | {"sha256": _digest(record)}


def unseal(record: dict, is_old: bool = False) -> dict:
    """What was sealed; ValueError where it is not as it was.

    `is_old`: whether it is of a time without seals, unless it has one.
    """
    content = {key: value for key, value in record.items() if key != "sha256"}
    if (len(content) < len(record) or not is_old) and record.get("sha256") != _digest(content):
        raise ValueError("its content is not what was written")
    return content


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
