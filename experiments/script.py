"""What the scripts in this folder share: their flags, and one-line reports of bad input."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from etils import epath

from densejax.config import UserError
from densejax.runs import files


class Parser(argparse.ArgumentParser):
    """The flags of a script."""

    def __init__(self, document: str):
        """Describes the script by the first line of its docstring."""
        super().__init__(description=document.splitlines()[0])

    def error(self, message: str) -> NoReturn:
        """Raises UserError with what is wrong with a flag."""
        raise UserError(f"{message}; --help lists the flags")


# Types of flags. Their names stand in error messages, as in "invalid positive value: '0'".
def path(text: str) -> epath.Path:
    """A path; "" is refused, since it would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("name a file or a folder, such as runs/here")
    return files.path_of("path", text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def fields(text: str) -> dict[str, Any]:
    """Fields with their values, such as {"depth": 40}."""
    return dict(**files.parse_json(text))


def read_json(file: epath.Path, missing: Any = None, lines: bool = False) -> Any:
    """The content of a JSON file; with `lines`, of JSON lines, whose last may be incomplete.

    Raises UserError if the file is damaged; returns `missing` if there is no file.
    """
    if (text := files.read_text(file)) is None:
        return missing
    try:
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [files.parse_json(line) for line in whole] if lines else files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): restore it, or move it away") from error


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with the code of `main`; with 2 and one line where the input or a file is bad."""
    try:
        sys.exit(main())
    except UserError as error:
        text = str(error)
    except OSError as error:
        text = str(UserError(f"{error.filename or 'a file'}: {error.strerror or error}"))
    print(f"densejax: {text}", file=sys.stderr)
    sys.exit(2)
