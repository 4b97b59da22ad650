"""Faults put into real runs, and counted: make test-faults.

    python experiments/faults.py --folder=~/faults [--only="kill -9"]

Each case is a small run of configs/digits.py that is hurt, started again and compared with one that
was left alone: the arrays of the last checkpoint, metrics.jsonl and the result must be equal bit
for bit. A case leaves one JSON in the folder, so that a second call does what is missing; the table
of all comes last. Survived: the run ended as it should. Silent: it said that all is well, and it
was not. What needs root (a disk of its own) is skipped aloud without. A run is a process of its
own, forked from one that has imported the packages, which would take half of the time.
"""

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT, FOLDER = pathlib.Path(__file__).parents[1], pathlib.Path()
EPOCH = 22  # steps; a run has eight epochs
FLAGS = (
    *("--config=configs/digits.py:depth=10,growth_rate=4", "--config.train.epochs=8"),
    *("--config.evaluate.every_epochs=1", "--config.checkpoint.every_epochs=1"),
    *("--config.evaluate.batch_size=8", "--config.log.every_steps=2"),
)
FORK = multiprocessing.get_context("fork")
NAN = """
import os, signal
from densejax.data import memory
plain = memory.MemorySet.batch
def batch(self, step):
    found = plain(self, step)
    if step + 1 == {stop}:
        os.kill(os.getpid(), signal.SIGTERM)
    return found | ({{"image": found["image"] * float("nan")}} if step + 1 in {bad} else {{}})
memory.MemorySet.batch = batch
"""
SLOW = """
import time
from densejax.runs import checkpoint
plain = checkpoint._write_manifest
checkpoint._write_manifest = lambda *arguments: (time.sleep(1.5), plain(*arguments))
"""


class Failed(Exception):
    """(what went wrong, whether the run was silent about it)."""


def require(true, text, silent=False):
    """Fails with a text where something is not true."""
    if not true:
        raise Failed(text, silent)


class Run:
    """A run in one process or in several; `victim` is the one that is hurt."""

    def __init__(self, path, *flags, processes=1, victim=0, patch="", each=None):
        """Starts it, after the code `patch`; `each` has flags for each single process."""
        self.path, self.clock, self.last = path, 0.0, time.monotonic()
        self.before, output = len(self.records()), FOLDER / "output"
        output.mkdir(parents=True, exist_ok=True)
        self.output = output / f"{path.parent.name}.{time.monotonic_ns()}"
        flags = [*FLAGS, f"--config.data.directory={FOLDER / 'data'}", f"--workdir={path}", *flags]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                flags.append(f"--coordinator=localhost:{free.getsockname()[1]}")
            flags.append(f"--num_processes={processes}")
        self.processes = []
        for number in range(processes):
            mine = flags + [f"--process_id={number}"] * (processes > 1)
            mine += each[number] if each else ()
            self.processes.append(FORK.Process(target=self.work, args=(mine, patch)))
            self.processes[-1].start()
        self.victim = self.processes[victim]

    def work(self, flags, patch):
        """What the processes do: densejax.main."""
        import densejax
        from densejax import command_line, main

        densejax.STARTED = time.monotonic()
        with self.output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["densejax.main", *flags]
        exec(patch, {})
        command_line.run(main.main)

    def records(self):
        """The steps in timings.jsonl, which is never cut."""
        file = self.path / "timings.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a try has harmed it
            return [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        return []

    def until(self, condition):
        """Waits for a condition; returns whether the victim is still alive when it is met."""
        while self.victim.is_alive():
            if condition():
                return True
            time.sleep(0.002)
            now = time.monotonic()
            self.clock += min(now - self.last, 0.1)  # not the time that the whole machine stood
            self.last = now
            require(self.clock < 1000, "it does not end")
        return False

    def until_records(self, count):
        """Waits for `count` more records."""
        here = self.until(lambda: len(self.records()) >= self.before + count)
        require(here, f"it ended too early: {self.said()[-500:]}")

    def wait(self, seconds):
        """Its exit code; None if it has not ended after so many seconds: then it is killed."""
        begin = self.clock
        self.until(lambda: self.clock - begin > seconds)
        if self.victim.is_alive():
            self.victim.kill()
            return None
        self.victim.join()
        return self.victim.exitcode

    def said(self):
        """What it has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def end(self, *codes, says="", silent=False):
        """Waits for the end; requires these exit codes, and these words in the output."""
        for self.victim in self.processes:  # noqa: B020
            self.until(lambda: False)
        found = tuple(process.exitcode for process in self.processes)
        require(found == codes, f"exit codes {found}: {self.said()[-500:]}", silent)
        require(says in self.said(), f"it did not say {says!r}: {self.said()[-500:]}", True)


def newest(path):
    """(step, digests of its arrays by name) of the newest checkpoint."""
    step = max(int(entry.name) for entry in (path / "checkpoints").glob("*[0-9]"))
    return step, json.loads((path / f"checkpoints/{step}/MANIFEST").read_text())["leaves"]


@functools.cache
def reference(processes=1):
    """A run that was left alone."""
    path = FOLDER / "reference" / str(processes)
    if not (path / "summary.json").exists():
        Run(path, processes=processes).end(*[0] * processes)
    return path


def finish(path, *flags, says="", processes=1, patch=""):
    """Runs to the end, which must be equal to that of a run that was left alone."""
    Run(path, *flags, processes=processes, patch=patch).end(*[0] * processes, says=says)
    return same_end(path, processes)


def same_end(path, processes=1):
    """A finished run must be equal to one that was left alone."""
    other = reference(processes)
    require(newest(path) == newest(other), "other arrays", True)
    records = [(folder / "metrics.jsonl").read_text() for folder in (path, other)]
    require(records[0] == records[1], "another metrics.jsonl", True)
    return same_result(path, processes)


def same_result(path, processes=1):
    """A run's result must be that of a run that was left alone."""
    paths = [folder / "summary.json" for folder in (path, reference(processes))]
    found = [json.loads(path.read_text()) for path in paths]
    for key in ("test_loss", "test_accuracy", "steps"):
        require(found[0][key] == found[1][key], f"another {key}", True)
    return 1


# --- The faults: each takes a folder for its run and random numbers, and returns its tries.


def killed(path, draw, moment, processes=1):
    """Kill -9, five times in one run; or of one of many processes, which the others notice."""
    tries = 0
    for _ in range(5 if processes == 1 else 1):
        run = Run(path, processes=processes, victim=draw.randrange(processes))
        if moment == "save":
            run.until_records(draw.randint(1, 12))
            before = saves(path)
            run.until(lambda before=before: saves(path) - before)
        elif moment == "evaluation":  # it follows the record of an epoch's last step
            run.until(
                lambda run=run: run.records()[run.before :][-1:] in [[EPOCH * i] for i in range(9)]
            )
        elif draw.random() < 0.25:  # while it starts
            until = draw.uniform(0, 4)
            run.until(lambda run=run, until=until: run.clock > until)
        else:
            run.until_records(draw.randint(1, 30))
        time.sleep(draw.uniform(0, 0.03))
        run.victim.kill()
        run.victim.join()
        tries += run.victim.exitcode == -signal.SIGKILL
        if processes > 1:
            for process in run.processes:
                process.join(100)
            codes = [process.exitcode for process in run.processes]
            require(all(codes) and "another process died" in run.said(), f"exit codes {codes}")
    finish(path, processes=processes)
    return tries


def saves(path):
    """Where saves are under way, or were when they were killed."""
    entries = os.scandir(path / "checkpoints") if (path / "checkpoints").exists() else ()
    return {entry.inode() for entry in entries if "tmp" in entry.name}


def stopped(path, draw, number, *codes):
    """A signal to one process; all end within five seconds, their step saved."""
    run = Run(path, processes=len(codes), victim=draw.randrange(len(codes)))
    run.until_records(draw.randint(1, 70))
    begin = run.clock
    os.kill(run.victim.pid, number)
    run.end(*codes)
    require(run.clock - begin < 5, f"it took {run.clock - begin:.1f} s")
    require(f"saved step {newest(path)[0]};" in run.said(), "it saved another step")
    return finish(path, processes=len(codes))


def flip(file, draw):
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file, draw):
    """Removes the end of a file, all of its content, or the file itself."""
    size = file.stat().st_size
    os.truncate(file, draw.choice((0, draw.randrange(size))))
    if draw.random() < 0.34:
        file.unlink()


def choose(folder, draw):
    """Draws a file; either every file or every byte is equally likely."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    sizes = [file.stat().st_size for file in files]
    return draw.choice(files) if draw.random() < 0.5 else draw.choices(files, sizes)[0]


def damaged(path, draw, harm):
    """A run goes on although its newest checkpoint is damaged."""
    run = Run(path)
    run.until_records(draw.randint(25, 70))
    os.kill(run.victim.pid, signal.SIGTERM)
    run.end(0)
    step, _ = newest(path)
    harm(choose(path / f"checkpoints/{step}", draw), draw)
    return finish(path, says=f"{step} is damaged")


def restored(path, draw, harm, tries):
    """The newer of two checkpoints is damaged, in another way each time; then one is restored."""
    from configs import digits
    from densejax.runs import checkpoint
    from densejax.training import experiment

    whole, (newer, _) = reference() / "checkpoints", newest(reference())
    config = digits.get_config("depth=10,growth_rate=4")
    abstract, said = experiment.build(config).abstract_state, []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("absl").handlers[:] = [handler]
    for _ in range(tries):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        harm(choose(path / str(newer), draw), draw)
        said.clear()
        with contextlib.closing(checkpoint.Checkpoints(path)) as checkpoints:
            state = checkpoints.restore_latest(abstract)
        leaves = json.loads((whole / f"{state.step}/MANIFEST").read_text())["leaves"]
        require(checkpoint._leaves(state) == leaves, "other arrays", True)
        loud = any(f"{newer} is damaged" in line for line in said)
        require(loud or state.step == newer, "it fell back without a word", True)
    return tries


def prepared(path, draw):
    """A prepared data set with a flipped bit is refused."""
    (whole,) = (FOLDER / "data/digits").iterdir()
    for number in range(5):
        data = path.parent / f"data{number}"
        flip(choose(shutil.copytree(whole, data / "digits" / whole.name), draw), draw)
        run = Run(path, f"--config.data.directory={data}")
        run.end(2, says="a prepared file is damaged or missing", silent=True)
    return 5


def refused(path, draw, disk, ends=False):
    """A disk refuses writes for a while, or until the run has ended; then the run says so."""
    run = Run(path / "run")
    run.until_records(draw.randint(1, 45))
    with disk(run):
        if ends:
            run.end(2, says="could not be saved", silent=True)
        else:
            require(run.until(lambda: "could not be saved" in run.said()), "no save failed")
    if not ends:
        run.end(0)
    return finish(path / "run")


@contextlib.contextmanager
def full(run):
    """A disk without a free byte."""
    filler = run.path.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(run):
    """A disk that is mounted again as read-only; the mount is refused while somebody writes."""
    mount = ["mount", run.path.parent, "-o"]
    require(run.until(lambda: not subprocess.run([*mount, "remount,ro"]).returncode), "busy")
    yield
    subprocess.run([*mount, "remount,rw"], check=True)


@contextlib.contextmanager
def quota(run):
    """No file may grow beyond 20 kB: what the run prints can, its checkpoints cannot."""
    for size in (20000, resource.RLIM_INFINITY):
        if run.victim.is_alive():
            limits = (size, resource.RLIM_INFINITY)
            resource.prlimit(run.victim.pid, resource.RLIMIT_FSIZE, limits)
        if size == 20000:
            yield


def on_own_disk(path, draw, disk, ends=False):
    """As `refused`, on a file system of 8 MiB."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True)
    try:
        return refused(path, draw, disk, ends)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def not_finite(path, draw):
    """A batch of NaN leaves all that is trained the same, bit for bit, and is reported."""
    step, states = draw.randint(2, 60), []
    for stop, bad in ((step - 1, ()), (step, (step,))):
        run = Run(path / str(stop), patch=NAN.format(stop=stop, bad=bad))
        run.end(0, says=f"Step {step} is skipped" if bad else "")
        trained = ("params", "batch_stats", "opt_state")
        states.append([leaf for leaf in newest(run.path)[1].items() if leaf[0].startswith(trained)])
    require(states[0] == states[1] and states[0], "the state has moved", True)
    return 1


def slow(path, draw):
    """Each save takes longer than the steps between two."""
    return finish(path, says="s for the save of step", patch=SLOW)


def never_finite(path, draw):
    """Ten batches of NaN in a row end the run; a new start goes on from its last checkpoint."""
    step = EPOCH * draw.randint(1, 2) + draw.randint(1, 10)
    run = Run(path, patch=NAN.format(stop=0, bad=tuple(range(step, step + 10))))
    run.end(3, says=f"in a row, up to {step + 9}, were not finite", silent=True)
    require(f"checkpoint is of step {newest(path)[0]};" in run.said(), "it names another")
    return finish(path)


def two_runs(path, draw):
    """A second run in a directory is refused and does no harm."""
    run = Run(path)
    run.until_records(draw.randint(1, 20))
    says = f"is in use on {socket.gethostname()} by process {run.victim.pid}"
    Run(path).end(2, says=says, silent=True)
    run.end(0)
    return finish(path)


# Another machine; its lock waits for a twentieth of the time, so that a try takes seconds.
QUICK = """
from densejax.runs import lock
lock.HEARTBEAT, lock.STALE, lock.POLL = 1.0, 3.0, 0.2
"""
ELSEWHERE = QUICK + "lock._machine = lambda: 'elsewhere'\n"
AHEAD = ELSEWHERE + "import time\nplain = time.time\ntime.time = lambda: plain() + 90\n"


def frozen(path, draw):
    """A suspended run is taken over; when it goes on, it writes nothing and says so."""
    run = Run(path, patch=QUICK)
    run.until_records(draw.randint(5, 70))
    os.kill(run.victim.pid, signal.SIGSTOP)
    other = Run(path, patch=ELSEWHERE)
    other.until(lambda: "stale lock" in other.said())
    time.sleep(draw.uniform(0, 3))
    os.kill(run.victim.pid, signal.SIGCONT)
    run.end(2, says="another process took it over", silent=True)
    other.end(0)
    return same_end(path)


def fast_clock(path, draw):
    """A machine whose clock is 90 s ahead does not take over a run that lives."""
    run = Run(path, patch=QUICK + SLOW)
    run.until_records(draw.randint(1, 10))
    Run(path, patch=AHEAD).end(2, says="is in use on", silent=True)
    run.end(0)
    return same_end(path)


DIFFERENT = {  # what one of two processes is told, and what is said of it
    "--config.train.epochs=9": "train.epochs",
    "--config.checkpoint.every_epochs=2": "checkpoint.every_epochs",
    "--config.evaluate.batch_size=16": "evaluate.batch_size",
    "--config.optimizer.momentum=0.8": "optimizer.momentum",
    "--mode=eval": "mode",
}


def disagreeing(path, draw):
    """Two processes with different flags end before the first step and name the difference."""
    for flag, says in DIFFERENT.items():
        each = [(), (flag,)]
        draw.shuffle(each)
        run = Run(path, processes=2, each=each)
        codes = [run.wait(60) for run.victim in run.processes]
        require(None not in codes, f"{flag}: it hangs: {run.said()[-300:]}")
        require(codes == [2, 2], f"{flag}: exit codes {codes}: {run.said()[-300:]}", 0 in codes)
        require(says in run.said(), f"{flag}: it is not said: {run.said()[-300:]}")
        require("Traceback" not in run.said(), f"{flag}: a traceback: {run.said()[-300:]}")
    return len(DIFFERENT)


def another_run(path, draw):
    """Another configuration, code or data is refused with the difference, unless it is forced."""
    from densejax.runs import files

    run, history = Run(path), path / "history.jsonl"
    run.until_records(draw.randint(25, 70))
    os.kill(run.victim.pid, signal.SIGTERM)
    run.end(0)
    other = "--config.optimizer.momentum=0.8"
    Run(path, other).end(2, says="optimizer.momentum: 0.9 -> 0.8", silent=True)
    recorded = files.unseal(json.loads(history.read_text().splitlines()[-1]))
    for name in ("code", "data", "jax"):
        start = recorded | {"versions": recorded["versions"] | {name: "other"}}
        history.write_text(json.dumps(files.seal(start)) + "\n")
        Run(path).end(2, says=f'versions.{name}: "other" -> ', silent=True)
    finish(path, "--resume=force")
    changes = json.loads(history.read_text().splitlines()[-1])["changes"]
    require(any("versions.jax" in change for change in changes), "it is not recorded", True)
    return 4


def stopped_run():
    """A run that a signal ended after six of its eight epochs."""
    path = FOLDER / "stopped"
    if not (path / "config.json").exists():
        run = Run(path)
        run.until_records(6 * EPOCH // 2)
        os.kill(run.victim.pid, signal.SIGTERM)
        run.end(0)
    return path


OTHERS = (b"", b"1", b'"x"', b"[]", b"{}", b"null", b'{"config": null}', b'{"versions": 1}')
OTHERS += (b"\xff\xfe", b"9" * 5000, b"[" * 100000, b'{"config": {}, "versions": {"code": "1"}}')
HARMS = ("cut", "flip", "other", "missing", "folder", "dangling", "loop", "fifo")


def harmed(entry, draw):
    """Puts something else in the place of a file or a folder; returns what."""
    harm = draw.choice(HARMS)
    if harm in ("cut", "flip", "other") and entry.is_dir():
        harm = "missing"
    if harm == "flip" and entry.stat().st_size:
        flip(entry, draw)
    elif harm == "cut" and entry.stat().st_size:
        os.truncate(entry, draw.randrange(entry.stat().st_size))
    elif harm in ("cut", "flip", "other"):
        entry.write_bytes(draw.choice(OTHERS))
    else:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if harm == "folder":
            entry.mkdir()
        elif harm == "fifo":
            os.mkfifo(entry)
        elif harm != "missing":
            entry.symlink_to(entry if harm == "loop" else "/nowhere")
    return harm


def fuzzed(path, draw, tries):
    """Something in a run's directory is not what was written there.

    The run, or its evaluation, ends as if nothing had happened, or in one line that names it.
    """
    for _ in range(tries):
        shutil.rmtree(path, ignore_errors=True)
        whole = draw.choice((stopped_run(), reference()))
        shutil.copytree(whole, path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        records = [file for file in files if "checkpoints" not in file.parts]
        entry = draw.choice(draw.choice((records, files, sorted(path.rglob("*")))))
        name, harm = entry.relative_to(path), harmed(entry, draw)
        measures = draw.random() < 0.3
        run = Run(path, *["--mode=eval"] * measures)
        what = f"{'evaluation' if measures else 'training'} after {harm} of {name}"
        code = run.wait(60)
        said = run.said()
        require(code is not None, f"{what}: it hangs")
        require("Traceback" not in said, f"{what}: a traceback: {said[-300:]}")
        if code == 2:
            lines = [line for line in said.splitlines() if line.startswith("densejax: ")]
            require(len(lines) == 1, f"{what}: {len(lines)} lines: {said[-300:]}")
            require(any(part in lines[0] for part in name.parts), f"{what}: not named: {lines[0]}")
            continue
        require(code == 0, f"{what}: exit code {code}: {said[-300:]}")
        if measures:
            found = json.loads(said[said.index("{\n") :])
            is_newest = found["steps"] == newest(whole)[0]
            # A missing checkpoint counts as one that was never saved; the result says the steps.
            loud = "is damaged" in said or harm == "missing"
            require(is_newest or loud, f"{what}: of step {found['steps']} without a word", True)
            continue
        # A finished run prints its result without reading the rest. A run whose records are gone
        # says that they are lost.
        is_partial = whole == reference() or "are lost" in said
        try:
            same_result(path) if is_partial else same_end(path)
        except Failed as failure:
            raise Failed(f"{what}: {failure.args[0]}", True) from failure
    return tries


NOBODY = 65534


def another_users(path, draw):
    """A run directory, or its checkpoints, that belong to another user and are closed."""
    # A finished run needs only its result; an evaluation needs everything but the result.
    for whole, place, modes in (
        (stopped_run(), path, ((), ("--mode=eval",))),
        (stopped_run(), path / "checkpoints", ((), ("--mode=eval",))),
        (reference(), path / "summary.json", ((),)),
    ):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        for entry in (path, *path.rglob("*")):
            os.chown(entry, *(NOBODY, NOBODY) if entry != place else (0, 0))
        place.chmod(0o700)
        for mode in modes:
            run = Run(path, *mode, patch=f"import os; os.setuid({NOBODY})")
            run.end(2, says=place.name, silent=True)
            require("Traceback" not in run.said(), f"a traceback: {run.said()[-300:]}")
    return 5


DISK = os.getuid() == 0  # whether one can be mounted
FAULTS = {  # name: (cases, what happens in one, and its other arguments)
    "kill -9 at a random instant": (6, killed, "any"),
    "kill -9 within a save": (2, killed, "save"),
    "kill -9 within an evaluation": (2, killed, "evaluation"),
    "kill -9 of one of two processes": (2, killed, "any", 2),
    "SIGTERM": (5, stopped, signal.SIGTERM, 0),
    "SIGINT": (5, stopped, signal.SIGINT, 130),
    "SIGTERM to one of two processes": (3, stopped, signal.SIGTERM, 0, 0),
    "a flipped bit in the newest checkpoint": (4, restored, flip, 50),
    "the same, and the run goes on": (4, damaged, flip),
    "a truncated, empty or missing file in it": (2, restored, cut, 25),
    "that, and the run goes on": (2, damaged, cut),
    "a flipped bit in a prepared data set": (4, prepared),
    "a full disk, then room": (4, on_own_disk, full) if DISK else None,
    "a disk full to the end": (2, on_own_disk, full, True) if DISK else None,
    "a read-only disk, then writable": (2, on_own_disk, read_only) if DISK else None,
    "a quota, then lifted": (3, refused, quota),
    "a slow disk (1.5 s for each save)": (2, slow),
    "a batch of NaN": (4, not_finite),
    "ten batches of NaN in a row": (2, never_finite),
    "two runs in one directory": (2, two_runs),
    "another configuration, code or data": (1, another_run),
    "a frozen run, taken over": (4, frozen),
    "a clock that is 90 s ahead": (2, fast_clock),
    "two processes that were told different things": (1, disagreeing),
    "anything in a run's directory, harmed": (10, fuzzed, 50),
    "another user's run": (1, another_users) if DISK else None,
}


def table(folder):
    """What the cases in a folder have shown, as Markdown."""
    rows = ["| fault | tries | survived | silent errors |", "|---|---|---|---|"]
    for name in FAULTS:
        found = [json.loads(file.read_text()) for file in folder.glob(f"{name} [0-9]*.json")]
        counts = [str(sum(one[key] for one in found)) for key in ("tries", "survived", "silent")]
        rows.append(f"| {name} | {' | '.join(counts if found else ('not run', '', ''))} |")
    return "\n".join(rows)


def case(name, file, path):
    """Does one case and leaves its JSON."""
    result, begin = {"tries": 1, "survived": 0, "silent": 0, "problem": ""}, time.monotonic()
    try:
        tries = FAULTS[name][1](path, random.Random(file.name), *FAULTS[name][2:])
        result |= {"tries": tries, "survived": tries}
    except Failed as failure:
        result |= {"problem": failure.args[0], "silent": int(failure.args[1])}
    finally:
        for process in multiprocessing.active_children():
            process.kill()
    result["seconds"] = round(time.monotonic() - begin, 1)
    file.write_text(json.dumps(result))
    print(f"{file.stem}: {result}", flush=True)


def main():
    """Does the cases that are missing; returns 1 if a fault was not survived."""
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for runs and results")
    parser.add_argument("--only", default="", help="a part of the names of the faults to do")
    arguments = parser.parse_args()
    FOLDER = arguments.folder.expanduser().resolve()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(FOLDER / "compiled")
    import tensorboardX.record_writer  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    from densejax import main  # noqa: F401

    wanted = {name: fault for name, fault in FAULTS.items() if arguments.only in name}
    for name in (name for name, fault in wanted.items() if fault is None):
        print(f"skipped, it needs root: {name}", flush=True)
    cases = [(n, name) for name, fault in wanted.items() for n in range(fault[0] if fault else 0)]
    cases.sort(key=lambda case: case[0])
    places = [(name, FOLDER / f"{name} {number}.json") for number, name in cases]
    for name, file in places:
        if not file.exists():
            path = FOLDER / "runs" / name.replace(" ", "_") / "run"
            shutil.rmtree(path.parent, ignore_errors=True)
            process = FORK.Process(target=case, args=(name, file, path))
            process.start()
            process.join()
    print(table(FOLDER))
    results = [json.loads(file.read_text()) for _, file in places if file.exists()]
    return int(len(results) < len(places) or any(result["problem"] for result in results))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
