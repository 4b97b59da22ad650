"""Faults put into real runs and counted: make test-faults.

    python experiments/faults.py --folder=/tmp/faults [--only=save]

Each case is a small run of configs/digits.py that is hurt, started again and compared with one that
was left alone: the arrays of its last checkpoint, metrics.jsonl and the result must be equal bit
for bit. A case leaves one JSON in the folder, so a second call does what is missing; the table of
all of them comes last. Survived: the run ended as it should have. Silent: it said that all is
well, and it was not. What needs root (a disk that is full or read-only) is skipped aloud without.
"""

import argparse
import json
import logging
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

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (
    *("--config=configs/digits.py:depth=10,growth_rate=4", "--config.train.epochs=12"),
    *("--config.evaluate.every_epochs=1", "--config.checkpoint.every_epochs=1"),
    *("--config.evaluate.batch_size=8", "--config.log.every_steps=2"),
)
EPOCH, STEPS = 22, 264
NAN = """
import os, signal
import jax.numpy as jnp
from densejax.data import memory
plain = memory.MemorySet.batch
def batch(self, step):
    found = plain(self, step)
    if step + 1 == {stop}:
        os.kill(os.getpid(), signal.SIGTERM)
    if step + 1 in {bad}:
        found["image"] = found["image"] * jnp.float32("nan")
    return found
memory.MemorySet.batch = batch
"""
SLOW = """
import time
from densejax import checkpoint
plain = checkpoint._write_manifest
checkpoint._write_manifest = lambda *arguments: (time.sleep(1.5), plain(*arguments))
"""


class Failed(Exception):
    """The run did not end as it should have; `silent` if it did not say so."""

    def __init__(self, text, silent=False):
        """What was seen."""
        super().__init__(text)
        self.silent = silent


def require(true, text, silent=False):
    """Fails with a text where something is not true."""
    if not true:
        raise Failed(text, silent)


class Run:
    """A run, in one process or in several, of which the one is meant that `which` says."""

    def __init__(self, path, *flags, processes=1, which=0, patch="", folder=None):
        """Starts it; `folder` is that of the whole program."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.processes, self.clock = path, [], 0.0
        self.seen, self.last = len(self.records()), time.monotonic()
        command = [sys.executable, "-m", "densejax.main"]
        if patch:
            code = f"{patch}\nimport runpy\nrunpy.run_module('densejax.main', run_name='__main__')"
            command = [sys.executable, "-c", code]
        folder = folder or path.parent.parent
        command += [*FLAGS, f"--config.data.directory={folder / 'data'}", f"--workdir={path}"]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        environment["PYTHONPATH"] = str(ROOT)
        (folder / "output").mkdir(exist_ok=True)
        self.output = folder / "output" / f"{path.parent.name}.{time.monotonic_ns()}"
        with self.output.open("w") as output:
            for number in range(processes):
                number = [f"--process_id={number}"] * (processes > 1)
                self.processes.append(
                    subprocess.Popen(
                        [*command, *number, *flags],
                        cwd=ROOT,
                        env=os.environ | environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        self.process = self.processes[which]

    def records(self):
        """The steps in timings.jsonl, which is never cut."""
        file = self.path / "timings.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def alive(self, seconds=0.002):
        """Sleeps a moment; whether the process still runs."""
        time.sleep(seconds)
        now = time.monotonic()
        self.clock += min(now - self.last, seconds + 0.1)  # not the time a whole machine stood
        self.last = now
        return self.process.poll() is None

    def until(self, condition):
        """Waits for a condition; whether the process is still there then."""
        while self.alive():
            if condition():
                return True
        return False

    def until_records(self, count):
        """Waits for so many more records."""
        return self.until(lambda: len(self.records()) >= self.seen + count)

    def says(self, text):
        """Whether its output has a text."""
        return text in self.output.read_text()

    def stop(self, number):
        """Sends a signal; returns the exit codes and the seconds until the last has ended."""
        begin = self.clock
        self.process.send_signal(number)
        return self.end(), self.clock - begin

    def end(self):
        """The exit codes."""
        while any([self.alive(), *(process.poll() is None for process in self.processes)]):
            require(self.clock < 300, "does not end")
        return [process.returncode for process in self.processes]

    def kill(self):
        """Leaves nothing behind."""
        for process in self.processes:
            process.kill()
            process.wait()


def newest(path):
    """(step, digests of its arrays by name) of the newest checkpoint."""
    steps = [int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit()]
    manifest = (path / "checkpoints" / str(max(steps)) / "MANIFEST").read_text()
    return max(steps), json.loads(manifest)["leaves"]


def finish(path, *flags, says="", **options):
    """Runs to the end; it must end well and like a run that was left alone."""
    run = Run(path, *flags, **options)
    codes = run.end()
    require(not any(codes), f"exit codes {codes}: {run.output.read_text()[-500:]}")
    require(run.says(says), f"did not say {says!r}", silent=True)
    compare(path, options.get("processes", 1), options.get("folder"))


def compare(path, processes=1, folder=None):
    """Bit for bit."""
    other = reference(folder or path.parent.parent, processes)
    require(newest(path) == newest(other), "other arrays", silent=True)
    files = [(folder / "metrics.jsonl").read_bytes() for folder in (path, other)]
    require(files[0] == files[1], "another metrics.jsonl", silent=True)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (path, other)]
    results = [{key: r[key] for key in r if key.startswith("test_")} for r in results]
    require(results[0] == results[1], "another result", silent=True)


def reference(folder, processes=1):
    """A run that was left alone."""
    path = folder / "reference" / str(processes)
    if not (path / "summary.json").exists():
        run = Run(path, processes=processes)
        require(run.end() == [0] * processes, run.output.read_text())
    return path


# --- The faults: each takes a folder for its run and random numbers, and returns how often it hit.


def killed(moment):
    """Kill -9, five times in one run."""

    def fault(path, draw):
        hits = 0
        for _ in range(5):
            run, there = Run(path), True
            if moment == "any" and draw.random() < 0.25:  # while it starts
                until = run.clock + draw.uniform(0, 4)
                run.until(lambda run=run, until=until: run.clock > until)
            elif moment == "any":
                there = run.until_records(draw.randint(1, 40))
            elif moment == "save":
                run.until_records(draw.randint(1, 12))
                before = saves(path)
                there = run.until(lambda before=before: saves(path) - before)
            else:
                first = len(run.records())
                there = run.until(lambda run=run, first=first: at_evaluation(run, first))
            time.sleep(draw.uniform(0, 0.03))
            run.kill()
            hits += there and run.process.returncode == -9
        finish(path)
        return hits

    return fault


def saves(path):
    """Where a save is under way, or was when it was killed."""
    folder = path / "checkpoints"
    entries = os.scandir(folder) if folder.exists() else ()
    return {entry.inode() for entry in entries if "tmp" in entry.name}


def at_evaluation(run, first):
    """Whether the last step of an epoch has been logged since record `first`."""
    return any(step % EPOCH == 0 for step in run.records()[first:][-1:])


def stopped(number, code):
    """A signal at a random moment."""

    def fault(path, draw):
        run = Run(path)
        require(run.until_records(draw.randint(1, 100)), "ended before the signal")
        codes, seconds = run.stop(number)
        require(codes == [code], f"exit codes {codes}")
        require(seconds < 5, f"took {seconds:.1f} s")
        require(run.says(f"{number.name}: saved step {newest(path)[0]};"), "saved another step")
        finish(path)
        return 1

    return fault


def one_of_two_stopped(path, draw):
    """SIGTERM to one of two processes."""
    run = Run(path, processes=2, which=draw.randint(0, 1))
    require(run.until_records(draw.randint(1, 60)), "ended before the signal")
    codes, seconds = run.stop(signal.SIGTERM)
    require(codes == [0, 0], f"exit codes {codes}")
    require(seconds < 5, f"took {seconds:.1f} s")
    require(run.says(f"SIGTERM: saved step {newest(path)[0]};"), "saved another step")
    finish(path, processes=2)
    return 1


def one_of_two_killed(path, draw):
    """Kill -9 of one of two processes: the other ends too, and says so."""
    run = Run(path, processes=2, which=draw.randint(0, 1))
    require(run.until_records(draw.randint(20, 60)), "ended before the signal")
    codes, _ = run.stop(signal.SIGKILL)
    require(all(codes), f"exit codes {codes}")
    require(run.says("another process died"), "did not say why")
    finish(path, processes=2)
    return 1


def damaged(harm):
    """What the newest checkpoint of a stopped run becomes, and how the run goes on from it."""

    def fault(path, draw):
        run = Run(path)
        require(run.until_records(draw.randint(30, 80)), "ended before the signal")
        run.stop(signal.SIGTERM)
        step, _ = newest(path)
        files = [f for f in (path / f"checkpoints/{step}").rglob("*") if f.is_file()]
        harm(draw.choice(sorted(files)), draw)
        finish(path, says=f"{step} is damaged")
        return 1

    return fault


def flip(file, draw):
    """One bit."""
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file, draw):
    """The file's end is missing, all of its content, or the file."""
    content = file.read_bytes()
    file.write_bytes(content[: draw.choice((0, draw.randrange(len(content))))])
    if draw.random() < 0.34:
        file.unlink()


def restored(harm, tries):
    """Restores the newest of two checkpoints, again and again damaged, in this process."""

    def fault(path, draw):
        from configs import digits
        from densejax import checkpoint, experiment

        whole = reference(path.parent.parent)
        config = digits.get_config("depth=10,growth_rate=4")
        abstract = experiment.without_data(config).abstract_state
        steps = sorted(int(entry.name) for entry in (whole / "checkpoints").iterdir())
        leaves = {s: checkpoint._manifest(whole / f"checkpoints/{s}")["leaves"] for s in steps}
        said, handler = [], logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("absl").addHandler(handler)
        for _ in range(tries):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole / "checkpoints", path)
            files = [f for f in sorted((path / str(steps[-1])).rglob("*")) if f.is_file()]
            sizes = [f.stat().st_size for f in files]
            evenly = draw.random() < 0.5  # every file alike, or every byte
            harm(draw.choice(files) if evenly else draw.choices(files, sizes)[0], draw)
            said.clear()
            checkpoints = checkpoint.Checkpoints(path)
            state = checkpoints.restore_latest(abstract)
            checkpoints.close()
            step, loud = int(state.step), any(f"{steps[-1]} is damaged" in line for line in said)
            require(checkpoint._leaves(state) == leaves[step], "other arrays", silent=True)
            require(loud or step == steps[-1], "fell back without a word", silent=True)
        logging.getLogger("absl").removeHandler(handler)
        return tries

    return fault


def prepared(path, draw):
    """One bit of a prepared data set: refused, in one line, before anything is trained."""
    data, (whole,) = path.parent / "data", (path.parent.parent / "data/digits").iterdir()
    for _ in range(5):
        shutil.rmtree(data, ignore_errors=True)
        folder = shutil.copytree(whole, data / "digits" / whole.name)
        flip(draw.choice([f for f in sorted(folder.iterdir()) if f.stat().st_size]), draw)
        run = Run(path, f"--config.data.directory={data}")
        require(run.end() == [2], "trained on it", silent=True)
        require(run.says("a prepared file is damaged or missing"), run.output.read_text()[-500:])
    return 5


def refused(hurt, heal, ends=False):
    """A disk that refuses for a while, or (`ends`) until the run has ended."""

    def fault(path, draw):
        path = path / "run"  # below what may be a mount point
        run = Run(path, folder=path.parent.parent.parent)
        require(run.until_records(draw.randint(1, 60)), "ended before the fault")
        undo = hurt(run)
        try:
            if ends:
                require(run.end() == [2], "ended as if all were saved", silent=True)
                lines = run.output.read_text().splitlines()
                require("saved" in lines[-1] or "written" in lines[-1], lines[-1])
            else:
                require(run.until(lambda: run.says("could not be saved")), "no save failed")
        finally:
            heal(run, undo)
        require(ends or run.end() == [0], run.output.read_text()[-500:])
        finish(path, folder=path.parent.parent.parent)
        return 1

    return fault


def fill(run):
    """No byte is left."""
    filler = run.path.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler


def write_protect(run):
    """Mounted again, read-only; while a file is being written that is refused."""
    command = ["mount", "-o", "remount,ro", str(run.path.parent)]
    require(run.until(lambda: not subprocess.run(command, capture_output=True).returncode), "busy")


def limit(run):
    """No file may grow beyond this, as with a quota."""
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def on_own_disk(fault):
    """On a file system of 8 MiB, which needs root to mount."""

    def mounted(path, draw):
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True)
        try:
            return fault(path, draw)
        finally:
            subprocess.run(["umount", "-l", path], check=True)

    return mounted if os.getuid() == 0 else None


def full(ends=False):
    """See above."""
    return on_own_disk(refused(fill, lambda run, filler: filler.unlink(), ends))


def unprotect(run, undo):
    """See above."""
    subprocess.run(["mount", "-o", "remount,rw", str(run.path.parent)], check=True)


def unlimit(run, undo):
    """See above."""
    if run.process.poll() is None:
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, limits)


def slow(path, draw):
    """A disk that takes 1.5 s for a save."""
    finish(path, says="s for the save of step", patch=SLOW)
    return 1


def not_finite(path, draw):
    """A batch of NaN: what is trained stays bit for bit, and the step is named."""
    step, states = draw.randint(2, 60), []
    for stop, bad in ((step - 1, ()), (step, (step,))):
        run = Run(path.with_name(f"{path.name}.{stop}"), patch=NAN.format(stop=stop, bad=bad))
        require(run.end() == [0], run.output.read_text()[-500:])
        leaves = newest(run.path)[1].items()
        trained = ("params", "batch_stats", "opt_state")
        states.append({name: leaf for name, leaf in leaves if name.startswith(trained)})
    require(run.says(f"Step {step} is skipped"), "did not name the step", silent=True)
    require(states[0] == states[1] and states[0], "the state has moved", silent=True)
    return 1


def never_finite(path, draw):
    """Ten such batches in a row."""
    step = EPOCH * draw.randint(1, 2) + draw.randint(1, 10)
    run = Run(path, patch=NAN.format(stop=0, bad=tuple(range(step, step + 10))))
    require(run.end() == [2], "went on")
    require(run.says(f"in a row, up to {step + 9}, were not finite"), "did not say why")
    require(run.says(f"the newest checkpoint is of step {newest(path)[0]};"), "another checkpoint")
    finish(path)
    return 1


def two_runs(path, draw):
    """A second run is refused while the first works, and harms nothing."""
    run = Run(path)
    require(run.until_records(draw.randint(1, 20)), "ended too early")
    second = Run(path)
    require(second.end() == [2], "two runs in one directory", silent=True)
    require(second.says(f"is in use on {socket.gethostname()} by process {run.process.pid}"), "?")
    require(run.end() == [0], "the first run failed")
    compare(path)
    return 1


def another_run(path, draw):
    """Another configuration, code or data is refused with the difference, unless it is forced."""
    run = Run(path)
    require(run.until_records(draw.randint(1, 100)), "ended too early")
    run.stop(signal.SIGTERM)
    history, recorded = path / "history.jsonl", (path / "history.jsonl").read_text()
    for name in ("code", "data", "jax"):
        start = json.loads(recorded.splitlines()[-1])
        start["versions"][name] = "other"
        history.write_text(json.dumps(start) + "\n")
        run = Run(path)
        require(run.end() == [2] and run.says(f'versions.{name}: "other" -> '), name, silent=True)
    finish(path, "--resume=force")
    require('versions.jax: \\"other\\" -> ' in history.read_text(), "not recorded", silent=True)
    (path / "summary.json").unlink()
    run = Run(path, "--config.optimizer.momentum=0.8")
    require(run.end() == [2] and run.says("optimizer.momentum: 0.9 -> 0.8"), "config", silent=True)
    return 4


FAULTS = {  # name: (what happens in a case, how often)
    "kill -9 at a random moment": (killed("any"), 6),
    "kill -9 within a save": (killed("save"), 2),
    "kill -9 within an evaluation": (killed("evaluation"), 3),
    "SIGTERM": (stopped(signal.SIGTERM, 0), 5),
    "SIGINT": (stopped(signal.SIGINT, 130), 5),
    "SIGTERM to one of two processes": (one_of_two_stopped, 3),
    "kill -9 of one of two processes": (one_of_two_killed, 2),
    "a flipped bit in the newest checkpoint": (restored(flip, 50), 4),
    "the same, and the run goes on to its end": (damaged(flip), 4),
    "a cut, empty or missing file in it": (restored(cut, 25), 2),
    "the same, and the run goes on to its end ": (damaged(cut), 2),
    "a flipped bit in a prepared data set": (prepared, 4),
    "a full disk, then room again": (full(), 4),
    "a disk that is full to the end": (full(ends=True), 2),
    "a read-only disk, then writable again": (on_own_disk(refused(write_protect, unprotect)), 2),
    "a quota (no file may grow), then lifted": (refused(limit, unlimit), 3),
    "a slow disk (1.5 s for each save)": (slow, 1),
    "NaN in one batch": (not_finite, 4),
    "NaN in ten batches in a row": (never_finite, 2),
    "two runs in one directory": (two_runs, 2),
    "another configuration, code or data": (another_run, 1),
}


def table(folder):
    """What the cases of a folder have shown, as Markdown."""
    rows = ["| fault | tries | survived | silent errors |", "|---|---|---|---|"]
    for name in FAULTS:
        found = [
            json.loads(file.read_text()) for file in sorted(folder.glob(f"{slug(name)}.*.json"))
        ]
        counts = [sum(one[key] for one in found) for key in ("tries", "survived", "silent")]
        text = " | ".join(map(str, counts)) if found else "not run | |"
        rows.append(f"| {name.strip()} | {text} |")
    return "\n".join(rows)


def slug(name):
    """A file's name."""
    return "".join(c if c.isalnum() or c in "- " else "" for c in name).replace(" ", "_")


def main():
    """Does the cases that are missing; returns 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for runs and results")
    parser.add_argument("--only", default="", help="a part of the names of the faults to do")
    arguments = parser.parse_args()
    folder = arguments.folder.expanduser().resolve()
    missing = [
        (number, name, folder / f"{slug(name)}.{number}.json")
        for name, (_, count) in FAULTS.items()
        for number in range(count)
        if arguments.only in name
    ]
    for number, name, file in missing:
        if file.exists():
            continue
        if FAULTS[name][0] is None:
            print(f"skipped, it needs root: {name}", flush=True)
            continue
        reference(folder)
        path, begin = folder / slug(name) / str(number), time.monotonic()
        shutil.rmtree(path.parent, ignore_errors=True)
        result = {"tries": 1, "survived": 0, "silent": 0, "problem": ""}
        try:
            result["tries"] = result["survived"] = FAULTS[name][0](path, random.Random(file.name))
            shutil.rmtree(path.parent, ignore_errors=True)
        except Failed as failure:
            result |= {"silent": int(failure.silent), "problem": str(failure)}
        result["seconds"] = round(time.monotonic() - begin, 1)
        file.write_text(json.dumps(result))
        print(f"{name.strip()}, case {number}: {result}", flush=True)
    print(table(folder))
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return int(any(one["survived"] < one["tries"] for one in found))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
