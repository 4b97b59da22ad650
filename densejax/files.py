"""Files that are whole whenever they are read."""

import os

from etils import epath


def write(path: epath.Path, text: str) -> None:
    """Writes such that a reader, or a kill at any moment, finds the old or the new file."""
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
