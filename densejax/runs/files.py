"""Small files that a crash cannot damage without notice.

`write` replaces a file as a whole: at any moment, even after a kill, there is the old file or the
new one. `seal` adds a SHA-256 to a record, by which `unseal` notices any later change. Reading
never hangs.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from densejax.config import UserError

VISIBILITY_TIMEOUT = 60.0  # seconds within which every host sees what process 0 wrote


@contextlib.contextmanager
def writing(place: str, advice: str) -> Iterator[None]:
    """Turns an OSError of its context into a UserError: where, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}; {advice}") from error


def becomes_visible(path: epath.Path) -> bool:
    """Whether a file exists now or within `VISIBILITY_TIMEOUT` seconds.

    A network disk may show what another host wrote only after its cache has expired.
    """
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def path_of(flag: str, text: str | os.PathLike) -> epath.Path:
    """The path that a user gave to `flag`; UserError where it cannot be opened here."""
    try:
        text = os.fspath(text)
        text.encode()
        path = epath.Path(text).expanduser()  # a shell leaves the ~ of --output=~/x as it is
        path.exists()  # an object store may need a package that is not installed
        return path
    except KeyError as error:
        problem = f"{error} is no known kind of storage; give a path without ://"
        raise UserError(f"{flag}={text}: {problem}") from error
    except (UnicodeError, OSError, ImportError) as error:
        raise UserError(f"{flag}={text}: {error}; give another path") from error


def new_path(flag: str, text: str | os.PathLike) -> epath.Path:
    """As `path_of`, of a directory that is to be made; UserError where it exists."""
    if (path := path_of(flag, text)).exists():
        raise UserError(f"{flag}={text}: exists; name a new directory")
    return path


def opened(path: epath.Path) -> BinaryIO:
    """Opens a file to read its bytes.

    Raises:
      OSError: there is no such file, or it is a FIFO or something else that could block forever.
    """
    if "://" in os.fspath(path):
        return path.open("rb")
    file = open(path, "rb", opener=lambda *a: os.open(a[0], a[1] | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def read_text(path: epath.Path) -> str | None:
    """The text of a small file; None where there is no file.

    Raises:
      UserError: it is no UTF-8 text, no regular file, or may not be read.
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
            f"{path} cannot be read ({error}): restore the file, or move away what is in its place"
        ) from error


def parse_json(text: str) -> Any:
    """The value of JSON text; ValueError for anything else, however deeply it is nested."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write(path: epath.Path, content: str | bytes) -> None:
    """Replaces a file as a whole; OSError where the disk refuses."""
    temporary = path.parent / f"{path.name}.{secrets.token_hex(4)}.tmp"
    content = content.encode() if isinstance(content, str) else bytes(content)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:  # perhaps the disk is full: half a file would waste room
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON as `write` does."""
    write(epath.Path(path), json.dumps(value, indent=2) + "\n")


def remove_leftovers(directory: epath.Path) -> None:
    """Removes the temporary files of `write` that a kill left; only for the directory's owner."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if re.search(r"\.[0-9a-f]+\.tmp$", path.name):
            with contextlib.suppress(OSError):  # it may be something else that only looks like one
                path.unlink()


class GrowingFile:
    """A file that grows at its end. What a full disk refuses stays in memory for the next `write`.

    Object stores cannot append: there the file is written as a whole each time.

    Attributes:
      content: all of it.
    """

    def __init__(self, path: epath.Path, content: str | bytes = b""):
        """The first `write` replaces the file by `content` and what was added to it."""
        self._path, self._can_append = path, "://" not in str(path)
        self.content, self._size_on_disk = bytearray(), 0
        self.add(content)

    def add(self, content: str | bytes) -> None:
        """Appends in memory only."""
        self.content += content.encode() if isinstance(content, str) else content

    def write(self) -> None:
        """Brings the file up to date; OSError where the disk refuses."""
        size_on_disk, self._size_on_disk = self._size_on_disk, 0  # a failure may cut off its end
        if not (size_on_disk and self._can_append):
            write(self._path, self.content)
        elif size_on_disk < len(self.content):
            with self._path.open("ab") as file:
                file.write(self.content[size_on_disk:])
        self._size_on_disk = len(self.content)


def digest(record: dict) -> str:
    """SHA-256 of a record of JSON values, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def seal(record: dict) -> dict:
    """The record with its `digest`, by which `unseal` notices damage."""
    return record | {"sha256": digest(record)}


def unseal(record: dict) -> dict:
    """The record that was sealed.

    Raises:
      ValueError, AttributeError: it is not what was sealed.
    """
    content = {key: value for key, value in record.items() if key != "sha256"}
    versions = record.get("versions")
    # Starts and results of runs were not sealed before their versions had a "matmul_precision".
    is_older_than_seals = isinstance(versions, dict) and "matmul_precision" not in versions
    if "sha256" not in record and is_older_than_seals:
        return content
    if record.get("sha256") != digest(content):
        raise ValueError("its content is not what was written")
    return content


def first_line(error: Exception) -> str:
    """An error's class and the first line of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
