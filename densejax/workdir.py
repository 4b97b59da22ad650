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
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from densejax.config import UserError

# What a resume may change: these keys and everything below them.
RESUMABLE = (
    *("checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.keep_latest"),
    *("data.directory", "data.manual_dir", "log", "parallel.mode", "profile", "train.epochs"),
)
PACKAGES = ("densejax", "flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
HEARTBEAT = 20.0  # seconds between two signs of life in a lock
STALE = 120.0  # seconds without one after which another host's lock is taken over


class WorkdirError(UserError):
    """The run directory is in use, of another configuration, or cannot be written."""


def default(config_name: str, config: ml_collections.ConfigDict) -> str:
    """`runs/<name>-<digest>`, the same for all configurations that may resume one another."""
    return f"runs/{config_name}-{digest(config)[:8]}"


def digest(config: ml_collections.ConfigDict) -> str:
    """SHA-256 of the canonical JSON of the configuration without the `RESUMABLE` keys."""
    flat = {key: text for key, text in _flat(config.to_dict()).items() if not _resumable(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def difference(old: dict, new: dict) -> list[str]:
    """One "dotted.key: old -> new" per key that differs; values as JSON, a tuple is a list."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def write_json(path: epath.PathLike, value) -> None:
    """Writes JSON such that a reader, or a kill at any moment, finds the old or the new file."""
    _write(epath.Path(path), json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def open_run(
    path: epath.PathLike, config: ml_collections.ConfigDict, force: bool = False
) -> Iterator[epath.Path]:
    """Makes or reopens the directory that all processes share, holds its lock, yields its path.

    The stored configuration may differ in the `RESUMABLE` keys, with `force` in any; `config.json`
    then takes the new values and `history.jsonl` records the change. Raises WorkdirError on every
    process when one of them refuses.
    """
    path, config, is_writer = epath.Path(path), config.to_dict(), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        for my_turn in (is_writer, not is_writer):  # process 0 writes, then the others compare
            problem = ""
            try:
                if my_turn and is_writer:
                    path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_locked(path))
                    _record_start(path, config, _accepted_changes(path, config, force))
                elif my_turn:
                    _accepted_changes(path, config, force=False)
            except WorkdirError as error:
                problem = str(error)
            except (OSError, ValueError) as error:
                problem = f"workdir={path}: {error}. Choose a --workdir that can be written."
            if not multihost_utils.process_allgather(np.asarray(not problem)).all():
                raise WorkdirError(problem or f"workdir={path}: refused by another process.")
        yield path


def _accepted_changes(path, config, force) -> list[str] | None:
    stored = path / "config.json"
    if not stored.exists():
        return None
    changes = difference(json.loads(stored.read_text()), config)
    refused = [line for line in changes if not _resumable(line.partition(":")[0])]
    if refused and not force:
        lines = "\n  ".join([f"workdir={path} has another configuration:", *refused])
        raise WorkdirError(f"{lines}\nChoose another --workdir, or --resume=force to take the new.")
    return changes


def _record_start(path, config, changes) -> None:
    history = path / "history.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    versions = {"python": sys.version.split()[0]}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    if lines and (other := difference(json.loads(lines[-1])["versions"], versions)):
        logging.warning("Versions differ from the last start: %s", ", ".join(other))
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "versions": versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,
        "changes": changes or [],
    }
    _write(history, "\n".join([*lines, json.dumps(start)]) + "\n")
    if changes != []:  # new, or changed
        write_json(path / "config.json", config)


@contextlib.contextmanager
def _locked(path) -> Iterator[None]:
    lock, pid = path / "lock", os.getpid()
    me = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "time": time.time()}
    mine = json.dumps(me)
    while not _created(lock, mine):
        with contextlib.suppress(FileNotFoundError):  # released or taken over in this moment
            seen = lock.read_text()
            _require_stale(lock, seen)
            logging.warning("Taking over the stale lock %s: %s", lock, seen)
            grave = lock.rename(path / f"lock.{me['host']}.{pid}")
            # Another process may have taken over first: what was moved is then its live lock.
            grave.unlink() if grave.read_text() == seen else grave.rename(lock)
    stop = threading.Event()

    def beat():
        while not stop.wait(HEARTBEAT):
            try:
                if not lock.exists() or lock.read_text() != mine:
                    logging.error("Another process took over %s: stop one of the two.", lock)
                    return
                _write(lock, mine)
            except OSError as error:  # perhaps the disk is full for a moment: try the next time
                logging.warning("Cannot refresh %s: %s", lock, error)

    heart = threading.Thread(target=beat, name="workdir heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if lock.exists() and lock.read_text() == mine:
            lock.unlink()


def _created(lock, text) -> bool:
    if "://" in os.fspath(lock):  # object stores have no exclusive creation: a race is possible
        return not lock.exists() and bool(lock.write_text(text))
    try:
        with open(lock, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _require_stale(lock, text) -> None:
    age = time.time() - lock.stat().mtime
    try:
        holder = json.loads(text)
    except ValueError:  # the holder died, or is, between creating and writing it
        holder = {"host": "an unknown host", "pid": "unknown"}
    alive = age < STALE
    if holder["host"] == socket.gethostname():
        alive = _started(holder["pid"]) == holder["started"]
    if alive:
        raise WorkdirError(
            f"workdir={lock.parent} is in use on {holder['host']} by process {holder['pid']}: "
            "stop it or choose another --workdir."
        )


def _started(pid: int) -> str | None:
    # When a live process started, in clock ticks ("" without /proc); None when it is dead.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, of another user
    stat = epath.Path(f"/proc/{pid}/stat")
    state, *fields = stat.read_text().rpartition(")")[2].split() if stat.exists() else [""] * 21
    return None if state == "Z" else fields[18]


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat


def _resumable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in RESUMABLE)


def _write(path: epath.Path, text: str) -> None:
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
