"""One process at a time in a directory: a lock file with its owner and a heartbeat."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from densejax import files
from densejax.config import UserError

HEARTBEAT = 20.0  # seconds between two signs of life in a lock
STALE = 60.0  # seconds without one after which another host's lock is taken over


class LockError(UserError):
    """Another process works in the directory."""


@contextlib.contextmanager
def hold(directory: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a directory that exists; LockError names the process that has it."""
    lock, pid = epath.Path(directory) / "lock", os.getpid()
    me = {"host": socket.gethostname(), "machine": _machine(), "pid": pid}
    me |= {"started": _started(pid), "time": time.time()}
    mine = json.dumps(me)
    while not _created(lock, mine):
        with contextlib.suppress(FileNotFoundError):  # released or taken over in this moment
            seen = lock.read_text()
            _require_stale(lock, seen)
            logging.warning("Taking over the stale lock %s: %s", lock, seen)
            grave = lock.rename(lock.parent / f"lock.{me['host']}.{pid}")
            # Another process may have taken over first: what was moved is then its live lock.
            grave.unlink() if grave.read_text() == seen else grave.rename(lock)
    stop = threading.Event()

    def beat():
        while not stop.wait(HEARTBEAT):
            try:
                if not lock.exists() or lock.read_text() != mine:
                    logging.error("Another process took over %s: stop one of the two.", lock)
                    return
                files.write(lock, mine)
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


def require_free(directory: epath.PathLike) -> None:
    """LockError where a live process works in the directory; takes no lock."""
    lock = epath.Path(directory) / "lock"
    with contextlib.suppress(OSError):  # what cannot be opened is said when the run is
        _require_stale(lock, lock.read_text())


def _machine() -> str:
    # Where a pid means the same process: one boot, one namespace. Containers may share a host name.
    boot = epath.Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _created(lock, text) -> bool:
    if "://" in os.fspath(lock):  # object stores have no exclusive creation: a race is possible
        return not lock.exists() and bool(lock.write_text(text))
    try:
        with open(lock, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:  # a full disk: an empty lock would keep everybody out
        lock.unlink(missing_ok=True)
        raise
    return True


def _require_stale(lock, text) -> None:
    age = time.time() - lock.stat().mtime
    try:
        holder = json.loads(text)
    except ValueError:  # the holder died, or is, between creating and writing it
        holder = {"host": "an unknown host", "pid": "unknown"}
    alive = age < STALE
    if holder.get("machine") == _machine():
        alive = _started(holder["pid"]) == holder["started"]
    if alive:
        raise LockError(
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
