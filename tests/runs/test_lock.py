"""One process at a time in a directory, whatever other clocks say and whoever was frozen."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import types

import pytest

from densejax.config import UserError
from densejax.runs import files, lock
from densejax.runs.lock import LockError

ELSEWHERE = {"host": "elsewhere", "machine": "another", "pid": 7, "started": "1"}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a sleep of the one who watches adds to; each look may do something first."""
    now = types.SimpleNamespace(seconds=1000.0, at_a_look=lambda: None)

    def sleep(seconds):
        now.seconds += seconds
        now.at_a_look()

    fake = types.SimpleNamespace(monotonic=lambda: now.seconds, sleep=sleep)
    monkeypatch.setattr(lock, "time", fake)
    monkeypatch.setattr(lock, "_watched", {})
    return now


@pytest.mark.parametrize("seconds_from_now", [-(10**9), 0, 9000])
@pytest.mark.parametrize(
    "holder",
    [json.dumps(ELSEWHERE), "", "[]", "7", "{}", '{"pid": -1}', '{"host": "a", "pid": []}'],
)
def test_a_holder_that_cannot_be_asked_is_watched_for_a_minute(
    tmp_path, clock, caplog, holder, seconds_from_now
):
    file_time = time.time() + seconds_from_now
    (tmp_path / "lock").write_text(holder)
    os.utime(tmp_path / "lock", (file_time, file_time))  # by whatever clock
    begin = clock.seconds
    with lock.locked(tmp_path):
        assert clock.seconds - begin == lock.STALE == 60
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    waited = [r.getMessage() for r in caplog.records if "sign of life" in r.getMessage()]
    name = "elsewhere by process 7" if "elsewhere" in holder else ""
    assert len(waited) == 1 and f"workdir={tmp_path} is locked on {name}" in waited[0]
    assert list(tmp_path.iterdir()) == []


def test_a_change_while_it_is_watched_shows_that_the_holder_lives(tmp_path, clock):
    (tmp_path / "lock").write_text(json.dumps(ELSEWHERE | {"beat": 1}))
    os.utime(tmp_path / "lock", (0, 0))

    def beat():
        if clock.seconds > 1000 + lock.STALE - 2:
            (tmp_path / "lock").write_text(json.dumps(ELSEWHERE | {"beat": 2}))

    clock.at_a_look = beat
    with pytest.raises(LockError, match="in use on elsewhere by process 7"):
        with lock.locked(tmp_path):
            pass
    assert json.loads((tmp_path / "lock").read_text())["beat"] == 2


def test_without_waiting_the_looks_of_a_process_add_up(tmp_path, clock):
    (tmp_path / "lock").write_text(json.dumps(ELSEWHERE))
    for passed in (0, 59):
        clock.seconds = 1000.0 + passed
        with pytest.raises(LockError, match="in use on elsewhere"):
            lock.require_free(tmp_path, wait=False)
    (tmp_path / "lock").write_text(json.dumps(ELSEWHERE | {"beat": 2}))
    for passed in (61, 120):
        clock.seconds = 1000.0 + passed
        with pytest.raises(LockError, match="in use"), lock.locked(tmp_path, wait=False):
            pass
    clock.seconds = 1000.0 + 121
    lock.require_free(tmp_path, wait=False)
    with lock.locked(tmp_path, wait=False):
        pass


def test_whoever_was_frozen_while_another_took_over_writes_nothing_more(tmp_path, clock):
    with lock.locked(tmp_path) as frozen:
        frozen()
        mine = json.loads((tmp_path / "lock").read_text())
        (tmp_path / "lock").write_text(json.dumps(mine | {"machine": "another"}))
        frozen()
        with lock.locked(tmp_path) as other:
            other()
            with pytest.raises(LockError, match=f"workdir={tmp_path}: another process took it"):
                frozen()
            other()
        with pytest.raises(LockError, match="took it over"):  # also once the other has ended
            frozen()
        (tmp_path / "lock").write_text("of a third")
    assert (tmp_path / "lock").read_text() == "of a third"


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path):
    with lock.locked(tmp_path) as require_held:
        (tmp_path / "lock").rename(tmp_path / "kept")
        (tmp_path / "lock").mkdir()
        require_held()
        (tmp_path / "lock").rmdir()
        (tmp_path / "kept").rename(tmp_path / "lock")
        require_held()


def test_a_reused_process_number_does_not_keep_the_lock(tmp_path, clock):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}
    holder["machine"] = lock._machine()
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock.locked(tmp_path):
        with pytest.raises(LockError, match="in use"), lock.locked(tmp_path):
            pass  # not even by this process
    assert clock.seconds == 1000


def test_a_live_process_keeps_its_lock_and_a_killed_one_loses_it(tmp_path, caplog):
    code = (
        "import sys; from densejax.runs import lock; held = lock.locked(sys.argv[1]); "
        "held.__enter__(); print('locked', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        os.utime(tmp_path / "lock", (0, 0))  # on this host the process counts, not its heartbeat
        owner = f"in use on {socket.gethostname()} by process {process.pid}"
        with pytest.raises(LockError, match=owner), lock.locked(tmp_path):
            pass
        process.kill()  # not yet waited for: a zombie is dead too
        while ") Z " not in pathlib.Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        with lock.locked(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "Taking over the stale lock" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_asked_for_without_taking_its_lock(tmp_path):
    for free in (tmp_path, tmp_path / "nowhere"):
        lock.require_free(free)
    with lock.locked(tmp_path), pytest.raises(LockError, match="in use"):
        lock.require_free(tmp_path)
    lock.require_free(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_what_is_no_file_in_the_place_of_a_lock_is_named(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UserError, match="lock cannot be read"), lock.locked(tmp_path):
        pass
    with pytest.raises(UserError, match="lock cannot be read"):
        lock.require_free(tmp_path)


def test_the_heart_beats_until_the_lock_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    path = tmp_path / "lock"
    with lock.locked(tmp_path):
        seen = {path.read_text()}
        deadline = time.monotonic() + 60
        while len(seen) < 4 and time.monotonic() < deadline:  # each change is a sign of life
            seen.add(path.read_text())
        assert len(seen) == 4
        heart = next(t for t in lock.threading.enumerate() if t.name == "workdir heartbeat")
        while heart.is_alive() and time.monotonic() < deadline:
            files.write(path, "of another")
            heart.join(0.1)
        assert not heart.is_alive()
    assert path.read_text() == "of another"
