"""One process at a time in a directory: a file `lock` names its owner and changes every 20 s.

The lock of a process that died is taken over. So a process that was suspended may have lost its
lock without knowing it; it has to ask before every write. The clocks of two machines are never
compared: an owner on another machine counts as dead once the watching process has seen no change
for `STALE` seconds by its own clock.
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

HEARTBEAT = 20.0  # seconds between two changes that the owner makes
STALE = 60.0  # seconds without a change after which another machine's lock is taken over
POLL = 1.0  # seconds between two looks at another machine's lock

_watched: dict[str, tuple[str, float]] = {}  # lock -> (content, when it was first seen)


class LockError(UserError):
    """Another process works in the directory, or has taken it over."""


@contextlib.contextmanager
def locked(directory: epath.PathLike, wait: bool = True) -> Iterator[Callable[[], None]]:
    """Holds the lock of an existing directory; LockError names the process that has it.

    Args:
      directory: to lock.
      wait: as in `require_free`.

    Yields:
      A function to call before every write; LockError if another process has the lock by now.
    """
    lock, pid, token = epath.Path(directory) / "lock", os.getpid(), uuid.uuid4().hex
    me = {"host": socket.gethostname(), "machine": _machine(), "pid": pid}
    me |= {"started": _started(pid), "token": token}
    while not _created(lock, json.dumps(me | {"beat": 0})):
        if (stale := _stale_content(lock, wait)) is None:
            continue  # it was released a moment ago
        logging.warning("Taking over the stale lock %s: %s", lock, stale)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            moved = lock.rename(lock.parent / f"lock.{me['host']}.{pid}")
            # Another process may have taken over first: then its live lock was moved.
            moved.unlink() if moved.read_text() == stale else moved.rename(lock)

    def require_held():
        try:
            held = token.encode() in lock.read_bytes()
        except FileNotFoundError:
            held = False
        except OSError:
            return  # the disk refuses for a moment: the write that follows reports it
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
                return  # the next write of the run reports it
            except OSError as error:  # perhaps the disk is full for a moment
                logging.warning("Cannot refresh %s: %s", lock, error)

    heartbeat = threading.Thread(target=beat, name="workdir heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield require_held
    finally:
        stop.set()
        heartbeat.join()
        with contextlib.suppress(LockError, OSError):
            require_held()
            lock.unlink()


def require_free(directory: epath.PathLike, wait: bool = True) -> None:
    """LockError where a live process works in the directory; takes no lock.

    It takes up to `STALE` seconds, from the first look, to know whether an owner on another machine
    lives. With `wait`, this function waits for that; without it, the owner counts as alive until
    then.
    """
    _stale_content(epath.Path(directory) / "lock", wait)


def _machine() -> str:
    # Where a pid means the same process: one boot, one namespace. Containers may share a host name.
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _created(lock: epath.Path, text: str) -> bool:
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


def _stale_content(lock: epath.Path, wait: bool) -> str | None:
    # What the lock of a dead owner says; None where there is no lock; LockError where it is held.
    has_waited = False
    while (text := files.read_text(lock)) is not None:
        owner, is_alive = _owner(text)
        if has_changed := _watched.get(str(lock), (None,))[0] != text:
            _watched[str(lock)] = text, time.monotonic()
        if is_alive is None and time.monotonic() - _watched[str(lock)][1] >= STALE:
            is_alive = False
        if is_alive is False:
            return text
        if is_alive or not wait or (has_waited and has_changed):
            raise LockError(
                f"workdir={lock.parent} is in use on {owner}: stop it or choose another --workdir."
            )
        if not has_waited:
            logging.warning(
                "workdir=%s is locked on %s, which cannot be asked from here: waiting %.0f s for a "
                "sign of life.", lock.parent, owner, STALE)  # fmt: skip
        has_waited = True
        time.sleep(POLL)
    return None


def _owner(text: str) -> tuple[str, bool | None]:
    # Its name, and whether it is alive: None where that cannot be seen from this machine.
    try:
        owner = files.parse_json(text)
        name = f"{owner['host']} by process {owner['pid']}"
        if owner.get("machine") != _machine():
            return name, None
        return name, _started(owner["pid"]) in ("", owner["started"])
    except (ValueError, LookupError, TypeError, OverflowError):  # a kill while it was created
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
