"""The run directory: its default name, its lock, its configuration and what a resume accepts.

It holds `config.json` (written last when it is made), `history.jsonl` (one line per start), `lock`
while a run works in it, and what training writes. Process 0 writes, the others compare.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from densejax import files, lock
from densejax.config import UserError, flatten

# What a resume may change: these keys and everything below them.
RESUMABLE = (
    *("checkpoint.every_epochs", "checkpoint.keep_latest", "data.directory", "data.manual_dir"),
    *("data.workers", "evaluate.batch_size", "log", "parallel.mode", "profile", "train.epochs"),
    "train.max_skipped_steps",
)
PACKAGES = ("densejax", "flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


class WorkdirError(UserError):
    """The run directory is in use, of another configuration, or cannot be written."""


def default(config_name: str, config: ml_collections.ConfigDict) -> str:
    """`runs/<name>-<digest>`: the same command finds the same directory again."""
    return f"runs/{config_name}-{digest(config)[:8]}"


def digest(config: ml_collections.ConfigDict) -> str:
    """SHA-256 of all that a result depends on: of the `RESUMABLE` keys `train.epochs` alone.

    A short trial must not become the first part of the real run without a word: the same directory
    goes on to more epochs only where --workdir names it.
    """
    flat = _flat(config.to_dict())
    kept = {key: flat[key] for key in flat if not _resumable(key) or key == "train.epochs"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def difference(old: dict, new: dict) -> list[str]:
    """One "dotted.key: old -> new" per key that differs; values as JSON, a tuple is a list."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def same_run(old: dict, config: ml_collections.ConfigDict) -> bool:
    """Whether a finished run's configuration asks for the same steps and the same result."""
    return not any(
        line.startswith("train.epochs:") or not _resumable(line.partition(":")[0])
        for line in difference(old, config.to_dict())
    )


def changes(path: epath.Path) -> list[str]:
    """Every change of the configuration that starts in a run directory have made, oldest first."""
    lines = (path / "history.jsonl").read_text().splitlines()
    return [change for line in lines for change in json.loads(line)["changes"]]


def versions() -> dict[str, str]:
    """The versions that a result depends on; "code" is a digest of this package's files."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    code = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {"python": sys.version.split()[0], "code": code.hexdigest()[:12]} | found


def write_json(path: epath.PathLike, value) -> None:
    """Writes JSON such that a reader, or a kill at any moment, finds the old or the new file."""
    files.write(epath.Path(path), json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def open_run(
    path: epath.PathLike,
    config: ml_collections.ConfigDict,
    force: bool = False,
    found: dict[str, str] | None = None,
) -> Iterator[epath.Path]:
    """Makes or reopens the directory that all processes share, holds its lock, yields its path.

    The stored configuration may differ in the `RESUMABLE` keys, with `force` in any; `config.json`
    then takes the new values and `history.jsonl` records the change. The same holds for the
    versions `found`, of the code, its packages and the data. Raises WorkdirError on every process
    when one of them refuses.
    """
    found = versions() if found is None else found
    path, config, is_writer = epath.Path(path), config.to_dict(), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        for my_turn in (is_writer, not is_writer):  # process 0 writes, then the others compare
            problem = ""
            try:
                if my_turn and is_writer:
                    is_remote = "://" in os.fspath(path)  # object stores have no modes
                    path.mkdir(parents=True, exist_ok=True, mode=None if is_remote else 0o700)
                    stack.enter_context(lock.hold(path))
                    _record_start(
                        path, config, found, _accepted_changes(path, config, found, force)
                    )
                elif my_turn:
                    _wait_for(path / "config.json")
                    _accepted_changes(path, config, found, force=False)
            except (WorkdirError, lock.LockError) as error:
                problem = str(error)
            except (OSError, ValueError) as error:
                problem = f"workdir={path}: {error}. Choose a --workdir that can be written."
            if not multihost_utils.process_allgather(np.asarray(not problem)).all():
                raise WorkdirError(problem or f"workdir={path}: refused by another process.")
        yield path


def check(
    path: epath.PathLike, config: ml_collections.ConfigDict, found: dict[str, str] | None = None
) -> None:
    """For readers, who take no lock: WorkdirError unless `path` is a run of this configuration.

    And of the versions `found`, for those who mean to train.
    """
    path = epath.Path(path)
    try:
        if _accepted_changes(path, config.to_dict(), found or {}, force=False) is not None:
            return
    except OSError as error:
        raise WorkdirError(f"workdir={path}: {error}.") from error
    raise WorkdirError(f"workdir={path}: not a run directory (it has no config.json).")


def _accepted_changes(path, config, found, force) -> list[str] | None:
    stored, history = path / "config.json", path / "history.jsonl"
    if not stored.exists():
        return None
    try:
        changes = difference(json.loads(stored.read_text()), config)
        before = json.loads(history.read_text().splitlines()[-1])["versions"] if found else {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WorkdirError(
            f"workdir={path}: config.json or history.jsonl is damaged ({error}); restore it or "
            f"choose another --workdir"
        ) from error
    before = {"versions": {name: before.get(name) for name in found}}
    changes += difference(before, {"versions": found})
    refused = [line for line in changes if not _resumable(line.partition(":")[0])]
    if refused and not force:
        raise WorkdirError(
            f"workdir={path} is of another configuration, code or data ({'; '.join(refused)}). "
            "Choose another --workdir, or --resume=force to take the new."
        )
    return changes


def _wait_for(stored) -> None:
    if not files.appears(stored):
        raise WorkdirError(
            f"workdir={stored.parent}: process {jax.process_index()} does not see what process "
            f"0 wrote there. Choose a --workdir that all hosts share."
        )


def _record_start(path, config, found, changes) -> None:
    history = path / "history.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "versions": found,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,  # with --resume=force where it was forced
        "changes": changes or [],
    }
    files.write(history, "\n".join([*lines, json.dumps(start)]) + "\n")
    if changes != []:  # new, or changed
        write_json(path / "config.json", config)


def _flat(tree: dict) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in flatten(tree).items()}


def _resumable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in RESUMABLE)
