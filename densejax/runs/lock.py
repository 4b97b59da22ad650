"""One process at a time in a directory: a lock file with its owner and a heartbeat that counts.

A process that was frozen may have lost its lock while it stood still, so it asks before every
write. Clocks and file times of two machines are never compared: a holder on another machine is dead
when whoever watches its lock sees no change for `STALE` seconds.
"""

import contextlib
import itertools
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath

from densejax.config import UserError
from densejax.runs import files

HEARTBEAT = 20.0  # seconds between two changes of a lock that is held
STALE = 60.0  # seconds without one after which another machine's lock is taken over
LOOK = 1.0  # seconds between two looks at it

_looks: dict[str, tuple[str, float]] = {}  # lock -> (content, when this process saw it first)


class LockError(UserError):
    """Another process works in the directory, or has taken it over."""


@contextlib.contextmanager
def locked(directory: epath.PathLike, wait: bool = True) -> Iterator[Callable[[], None]]:
    """Holds the lock of a directory that exists; LockError names the process that has it.

    Args:
      directory: whose lock it is.
      wait: as in `require_free`.

    Yields:
      `require_held`, for before every write: LockError where another process has the lock by now.
    """
    lock, pid, token = epath.Path(directory) / "lock", os.getpid(), uuid.uuid4().hex
    me = {"host": socket.gethostname(), "machine": _machine(), "pid": pid}
    me |= {"started": _started(pid), "token": token}
    while not _created(lock, json.dumps(me | {"beat": 0})):
        if (seen := _dead(lock, wait)) is None:
            continue  # released in this moment
        logging.warning("Taking over the stale lock %s: %s", lock, seen)
        with contextlib.suppress(FileNotFoundError):  # taken over by another in this moment
            grave = lock.rename(lock.parent / f"lock.{me['host']}.{pid}")
            # Another process may have taken over first: what was moved is then its live lock.
            grave.unlink() if grave.read_text() == seen else grave.rename(lock)

    def require_held():
        try:
            held = token.encode() in lock.read_bytes()
        except FileNotFoundError:
            held = False
        except OSError:
            return  # the disk refuses for a moment: what is to be written will say so
        if not held:
            raise LockError(
                f"workdir={lock.parent}: another process took it over (or its file lock was "
                f"removed) while this one stood still; this one writes nothing more"
            )

    stop = threading.Event()

    def beat():
        for count in itertools.count(1):
            if stop.wait(HEARTBEAT):
                return
            try:
                require_held()
                files.write(lock, json.dumps(me | {"beat": count}))
            except LockError:
                return  # who writes next says it
            except OSError as error:  # perhaps the disk is full for a moment: try the next time
                logging.warning("Cannot refresh %s: %s", lock, error)

    heart = threading.Thread(target=beat, name="workdir heartbeat", daemon=True)
    heart.start()
    try:
        yield require_held
    finally:
        stop.set()
        heart.join()
        with contextlib.suppress(LockError, OSError):
            require_held()
            lock.unlink()


def require_free(directory: epath.PathLike, wait: bool = True) -> None:
    """LockError where a live process works in the directory; takes no lock.

    Whether the holder on another machine lives is known after `STALE` seconds at most, counted from
    this process's first look. Until then this waits, or without `wait` takes it for alive.
    """
    _dead(epath.Path(directory) / "lock", wait)


def _machine() -> str:
    # Where a pid means the same process: one boot, one namespace. Containers may share a host name.
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
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


def _dead(lock, wait) -> str | None:
    # What a dead holder's lock says, None where there is no lock; LockError where it is held.
    waits = False
    while (text := files.read_text(lock)) is not None:
        holder, alive = _holder(text)
        if is_news := _looks.get(str(lock), (None,))[0] != text:
            _looks[str(lock)] = text, time.monotonic()
        if alive is None and time.monotonic() - _looks[str(lock)][1] >= STALE:
            alive = False
        if alive is False:
            return text
        if alive or not wait or (waits and is_news):
            raise LockError(
                f"workdir={lock.parent} is in use on {holder}: stop it or choose another --workdir."
            )
        if not waits:
            logging.warning(
                "workdir=%s is locked on %s, which cannot be asked from here: waiting %.0f s for a "
                "sign of life.", lock.parent, holder, STALE)  # fmt: skip
        waits = True
        time.sleep(LOOK)
    return None


def _holder(text) -> tuple[str, bool | None]:
    # Who it is, and whether it lives: None where that cannot be seen from here.
    try:
        holder = files.parse_json(text)
        name = f"{holder['host']} by process {holder['pid']}"
        if holder.get("machine") != _machine():
            return name, None
        return name, _started(holder["pid"]) in ("", holder["started"])
    except (ValueError, LookupError, TypeError, OverflowError):  # killed as it wrote, or a person's
        return "an unknown host by an unknown process", None


def _started(pid: int) -> str | None:
    # When a live process started, in clock ticks ("" where /proc hides it); None when it is dead.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, of another user
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_bytes()  # a program's name may be any bytes
    except OSError:
        return ""
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state == b"Z" else fields[18].decode()
