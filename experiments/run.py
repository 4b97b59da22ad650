"""Runs a sweep: python experiments/run.py --sweep=growth_rate --config=CARD --root=DIR.

--values=6,12,24 takes these in place of the sweep's own; --axis model.depth=22,40 repeats the sweep
for each value of a key of the card. Without --sweep the card's own network is varied:
--axis model.growth_rate=6,12,24 --axis model.depth=22,40 is a grid of six points.

Any number of processes, on any machines that share DIR, work on it without a server. Each claims a
run by a lock in its directory, ROOT/SWEEP/RUN, and trains it in a process of its own, so that its
memory is freed and its failure is its own. What is finished is skipped, unless it is of other code
or data, which is said; what a dead process left is taken over and resumed.
--config.section.key=value holds for every run. `taskset -c 0 python ...` and `taskset -c 1 python
...` beside it give each of two workers a core; --workers=8 lets eight runs share a GPU. A run whose
numbers are not finite has diverged: that is its result, and it is not tried again.
"""

if __name__ == "__main__":
    from densejax.runs import large_pages

    large_pages.use()  # as the runs do: otherwise --training_time would measure other steps

import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import glob
import itertools
import math
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from script import read_json
from sweeps import (
    SWEEPS,
    Run,
    axis_names,
    differences,
    origin,
    parse_axes,
    parse_values,
    runs,
)

from densejax import command_line, data
from densejax.config import UserError, checked
from densejax.models import counts
from densejax.runs import files, formats, lock, workdir
from densejax.training import experiment, parallel, result
from densejax.training.experiment import Diverged
from densejax.training.step import train_step

SWEEP = flags.DEFINE_enum("sweep", None, list(SWEEPS), "What is varied.")
VALUES = flags.DEFINE_string("values", None, "What the sweep varies: 6,12,24.")
AXES = flags.DEFINE_multi_string("axis", [], "A key of the card and its values: model.depth=22,40.")
ROOT = flags.DEFINE_string("root", None, "Where results are: ROOT/SWEEP/RUN.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each point, from the card's seed.", lower_bound=1)
ONLY = flags.DEFINE_list("only", "*", "Names of runs, or patterns: 'k12_*,k16_seed0'.")
LEARNING_RATES = flags.DEFINE_string(
    "learning_rates",
    None,
    "Folder of finished tuning runs: each kind gets the peak rate with the best mean accuracy on "
    "held-out images.",
)
WORKERS = flags.DEFINE_integer(
    "workers", 1, "Runs at the same time, such as several on one GPU.", lower_bound=1
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs and the hours they would take.")
LATENCY = flags.DEFINE_bool("latency", False, "Time classification; let nothing else run beside.")
TRAINING_TIME = flags.DEFINE_bool(
    "training_time", False, "Time a training step; let nothing else run beside."
)
EQUAL_TIME = flags.DEFINE_string(
    "equal_time",
    None,
    "Name of a run, without _seedN. Every run trains as long as this one, by the times of a step "
    "that --training_time measured.",
)
RESUME = flags.DEFINE_enum(
    "resume", "same", ["same", "force"], "force: go on with, or measure again, runs of other code."
)
PRINT = flags.DEFINE_enum("print", None, ["shell", "slurm"], "Commands, or an array script.")
POLL = 2.0  # seconds between two looks at runs that others have claimed, and at the table
SLURM = """#!/usr/bin/env bash
# One run for each task: sbatch THIS_FILE; again after a time limit, finished runs are skipped.
#SBATCH --job-name={sweep}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
runs=({names})
exec {command} --only="${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


@dataclasses.dataclass(frozen=True)
class Work:
    """One run of the sweep and its directory.

    Attributes:
      run: from the sweep.
      path: ROOT/SWEEP/RUN.
      arguments: what `densejax.main` is called with, but for --workdir and --resume.
      force: --resume=force.
    """

    run: Run
    path: epath.Path
    arguments: tuple[str, ...]
    force: bool = False

    @property
    def sweep(self) -> str:
        """The name of the sweep."""
        return self.path.parent.name

    @property
    def point(self) -> str:
        """The name of the run without its seed."""
        return self.run.name.rpartition("_seed")[0]

    @property
    def command(self) -> list[str]:
        """What trains, or resumes, the run."""
        words = [*self.arguments, f"--workdir={self.path}", *["--resume=force"] * self.force]
        return [sys.executable, "-m", "densejax.main", *words]

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The whole configuration, read as the command reads it (raises UserError)."""
        values, arguments = flags.FlagValues(), ["run", *self.arguments]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        try:
            values(arguments)
        except Exception as error:  # a card is Python: anything may come out of it
            raise UserError(f"{self.run.name}: {command_line.explain(error, arguments)}") from error
        return checked(holder.value)  # as the run completes it

    def result(self) -> dict[str, Any] | None:
        """The summary of the finished run; None if it is not finished, or of another run.

        Raises:
          UserError: it is damaged, or of other code, data or weights.
        """
        summary = result.read(self.path)
        if summary is None or not workdir.same_run(summary["config"], self.config):
            return None
        others = workdir.version_changes(summary["versions"], self.versions)
        if others and not self.force:
            raise UserError(
                f"{self.path}: its result is of other code, data or weights ({'; '.join(others)}). "
                f"--resume=force measures its checkpoint again; another --root trains again"
            )
        return None if others else summary

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Today's versions, without those of the devices: the run itself compares these."""
        found = result.versions(self.config) | {"data": data_version(self.config)}
        return {name: found[name] for name in found if name not in ("matmul_precision", "devices")}

    @property
    def has_diverged(self) -> bool:
        """Whether training ended in numbers that were not finite, by today's code."""
        with contextlib.suppress(UserError):
            code = read_json(self.path / "sweep.json", {}).get("diverged")
            return bool(code) and code == self.versions["code"]
        return False

    def is_over(self) -> bool:
        """Whether there is nothing left to do: it has a result, or training it diverges."""
        return self.is_finished() or self.has_diverged

    def is_finished(self) -> bool:
        """Whether there is a result, of today's code, data and weights."""
        try:
            return self.result() is not None
        except UserError:
            return False

    def accuracy(self) -> float:
        """The accuracy of the finished run on the images that the card asks for."""
        return self.result()[f"{self.config.evaluate.final_split}_accuracy"]

    def state(self) -> str:
        """What a table says of it: its result, how far it is, or that nobody works on it."""
        if self.is_finished():
            return f"{self.config.evaluate.final_split} accuracy {formats.percent(self.accuracy())}"
        if self.has_diverged:
            return "diverged"
        try:
            lock.require_free(self.path / "claim", wait=False)
            return "waiting"
        except UserError:
            done = 0.0
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that is torn
                records = read_json(self.path / "metrics.jsonl", [], lines=True)
                last, train = records[-1], self.config.train
                done = last["epoch"] / train.epochs
                done = max(done, last["step"] / train.max_steps if train.max_steps else 0)
            return f"running, {done:.0%}"


DATA_VERSIONS: dict[str, str] = {}  # what `data_version` remembers


def data_version(config: ConfigDict) -> str:
    """As `densejax.data.version`; it reads all of the data, so its answers are remembered."""
    key = f"{config.data}{config.evaluate}"
    DATA_VERSIONS[key] = DATA_VERSIONS.get(key) or data.version(config)
    return DATA_VERSIONS[key]


def works() -> list[Work]:
    """The runs that the flags ask for, in the order in which they are tried (raises UserError)."""
    if not (ROOT.value and (SWEEP.value or AXES.value)):
        raise UserError("--sweep or --axis, and --root: say what is varied, and where results are")
    root = files.path_of("--root", ROOT.value)
    if "://" in ROOT.value or (root.exists() and not root.is_dir()):
        raise UserError(f"--root={ROOT.value}: give a folder, of a disk that all workers share")
    given = joined_words()
    card = flags.FLAGS["config"].config_filename
    overrides = [word for word in given if word.lstrip("-").startswith("config.")]
    tuned = LEARNING_RATES.value
    rates = best_rates(files.path_of("--learning_rates", tuned)) if tuned else None
    axes, values = parse_axes(AXES.value), parse_values(VALUES.value or "")
    folder = "_x_".join([SWEEP.value or "card", *axis_names(list(axes))])
    found = []
    for run in runs(SWEEP.value, command_line.CONFIG.value, SEEDS.value, values, axes):
        if not any(fnmatch.fnmatchcase(run.name, pattern) for pattern in ONLY.value):
            continue
        own = dict(run.overrides)
        if rates is not None:
            kind = run.axes.get("kind", "dense")
            if kind not in rates:
                raise UserError(f"--learning_rates={tuned}: no result of {kind!r}")
            own.setdefault("optimizer.learning_rate", rates[kind])
        kept = [word for word in overrides if _key(word) not in own]
        if run.model:  # overrides of the card's network do not fit another network
            kept = [word for word in kept if not _key(word).startswith("model.")]
        model = f"{',' if ':' in card else ':'}model={run.model}" if run.model else ""
        arguments = [f"--config={card}{model}", *kept]
        arguments += [f"--config.{key}={value}" for key, value in own.items()]
        path = root / folder / run.name
        work = Work(run, path, tuple(arguments), RESUME.value == "force")
        _ = work.config  # a card without `model` is reported before anything is trained
        found.append(of_equal_time(work, EQUAL_TIME.value) if EQUAL_TIME.value else work)
    if not found:
        raise UserError(f"--only={','.join(ONLY.value)}: no run of {folder} has such a name")
    return found


def of_equal_time(work: Work, point: str) -> Work:
    """The run with as many steps as it does in the time that the run `point` takes, as measured.

    Raises:
      UserError: one of the two was not measured.
    """
    file = work.path.parent / "training_time.json"
    seconds = read_json(file, {}).get("seconds", {})
    if missing := {point, work.point} - seconds.keys():
        raise UserError(
            f"--equal_time={point}: {file} has no {' and no '.join(sorted(missing))}; "
            f"--training_time measures all runs that --only names in one call, and replaces what "
            f"was measured before"
        )
    longer = seconds[point] / seconds[work.point]
    steps = max(1, round(longer * experiment.build(work.config).steps))
    changes = {
        "train.max_steps": steps,
        "train.epochs": math.ceil(longer * work.config.train.epochs),
    }
    arguments = (*work.arguments, *(f"--config.{key}={value}" for key, value in changes.items()))
    return dataclasses.replace(work, arguments=arguments)


def joined_words() -> list[str]:
    """The flags of this command, each as one word: --seeds=1 for --seeds 1."""
    words, left = [], sys.argv[1:]
    while left:
        word = left.pop(0)
        name = word.lstrip("-")
        takes_value = name in flags.FLAGS and not flags.FLAGS[name].boolean
        words.append(f"{word}={left.pop(0)}" if takes_value and left else word)
    return words


def _key(word: str) -> str:
    return word.lstrip("-").removeprefix("config.").partition("=")[0]


def best_rates(path: epath.Path) -> dict[str, float]:
    """For each kind of network, the rate with the best mean over seeds on held-out images.

    Raises:
      UserError: there is no such folder, or a run in it that cannot be compared.
    """
    found, origins = collections.defaultdict(list), collections.defaultdict(dict)
    diverged = set()
    if not path.is_dir():
        raise UserError(f"--learning_rates={path}: there is no such folder; name that of a sweep")
    for sweep in sorted(epath.Path(glob.escape(str(path))).glob("*/sweep.json")):
        run, summary = sweep.parent, result.read(sweep.parent)
        axes = read_json(sweep).get("axes", {})
        if not {"kind", "learning_rate"} <= axes.keys():
            raise UserError(f"--learning_rates={path}: {run.name} is no run of that sweep")
        point = axes["kind"], axes["learning_rate"]
        if summary is None and read_json(sweep).get("diverged"):
            diverged.add(point)  # with one seed: the worst that a rate can do
            continue
        if summary is None:
            raise UserError(f"--learning_rates={path}: {run.name} is not finished")
        if "validation_accuracy" not in summary:
            raise UserError(f"--learning_rates={path}: {run} was not measured on held-out images")
        found[point].append(summary["validation_accuracy"])
        origins[point][run.name] = origin(run.name, summary)
        if others := differences(origins[point]):
            raise UserError(f"--learning_rates={path}: no mean is taken over {others}")
    means = sorted((statistics.mean(found[point]), point) for point in found.keys() - diverged)
    rates = {kind: rate for _, (kind, rate) in means}  # the best of a kind comes last
    if "one_shot" in rates:
        rates["vovnet"] = rates["one_shot"]  # joined alike
    return rates


def prepare_data(all_works: list[Work]) -> None:
    """Prepares the data of all runs that are left, once for all (raises UserError)."""
    left = (work.config for work in all_works if not work.is_over())
    for config in {str(config.data): config for config in left}.values():
        data.prepare(config)
        data.info(config)


class Worker:
    """Takes one free run after the other until no run is left."""

    def __init__(self, all_works: list[Work], failed: dict[str, str] | None = None):
        """Claims nothing yet. Workers of one process share `failed`; the first one reports it."""
        self.works, self.child, self.stopped, self.said = all_works, None, None, {}
        self.is_first = failed is None
        self.failed = {} if self.is_first else failed

    def stop(self, number, frame) -> None:
        """Passes a signal on: the run saves its step and ends, and then the worker ends."""
        self.stopped = signal.Signals(number)
        if self.child:
            self.child.send_signal(number)

    def work(self) -> int:
        """Returns the exit code: 1 where a run failed."""
        while not self.stopped and (left := self.left()):
            if not any(self.attempt(work) for work in left):
                self.show()
                time.sleep(POLL)
        for work in self.works:  # a worker may have died after its run, before it removed the claim
            if work.is_over() and (work.path / "claim").exists():
                self.attempt(work)
        if not self.is_first:
            return 0
        self.show()
        result.say(table_of_results(self.works))
        self.failed = {
            w.run.name: self.failed[w.run.name] for w in self.works if self.has_failed(w)
        }
        for name, reason in self.failed.items():
            print(f"failed: {name}: {UserError(reason)}", file=sys.stderr)
        if self.stopped:
            return 128 + signal.SIGINT if self.stopped is signal.SIGINT else 0
        return int(bool(self.failed))

    def left(self) -> list[Work]:
        """What is neither finished nor has failed here; others may be working on it."""
        return [w for w in self.works if w.run.name not in self.failed and not w.is_over()]

    def has_failed(self, work: Work) -> bool:
        """Whether a run failed here and nobody has finished it since."""
        return work.run.name in self.failed and not work.is_finished()

    def attempt(self, work: Work) -> bool:
        """Trains a run; returns False if somebody else does that."""
        if self.stopped:
            return True
        claim = work.path / "claim"
        try:
            work.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            claim.mkdir(exist_ok=True)
            with lock.locked(claim, wait=False):
                # The worker that held the claim may be dead while its run is alive.
                lock.require_free(work.path, wait=False)
                # Another worker of this process may have seen it fail a moment ago.
                if not (work.result() or work.has_diverged or work.run.name in self.failed):
                    self.train(work)
            if work.is_over():
                # Another worker may just have claimed it; etils has an error of its own for that.
                with contextlib.suppress(OSError, ValueError):
                    claim.rmdir()
        except lock.LockError:
            return False
        except (UserError, OSError) as error:  # a damaged result, a full disk, a file in its place
            self.failed.setdefault(work.run.name, str(error))
        return True

    def train(self, work: Work) -> None:
        """Trains, or resumes, a claimed run in a process of its own; notes what went wrong."""
        facts = {"sweep": work.sweep, "run": work.run.name, "axes": work.run.axes}
        facts |= {"seed": work.run.axes["seed"], "mismatch": work.run.mismatch}
        facts["command"] = shlex.join(dataclasses.replace(work, force=False).command)
        files.write_json(work.path / "sweep.json", facts)
        output = work.path / "output.txt"
        with open(output, "a") as file:
            # A session of its own: Ctrl-C reaches it through this process alone, once.
            self.child = subprocess.Popen(
                work.command, stdout=file, stderr=file, start_new_session=True
            )
            if self.stopped:  # before there was a child
                self.child.send_signal(self.stopped)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self.child.wait(POLL)
                    break
                self.show()
        self.child = None
        if code == Diverged.exit_code:
            files.write_json(work.path / "sweep.json", facts | {"diverged": work.versions["code"]})
        elif not work.is_finished() and not self.stopped:
            lines = output.read_bytes().decode(errors="replace").splitlines() or ["said nothing"]
            said = lines[-1].replace("--workdir", "--root")  # as it is called here
            self.failed[work.run.name] = f"exit code {code}, {said} ({output})"

    def show(self) -> None:
        """The table of all runs on a terminal, elsewhere a line for each that has changed."""
        if not self.is_first:
            return
        states = {w.run.name: w.state() for w in self.works}
        states |= dict.fromkeys(self.failed, "failed")
        done = sum(w.is_over() for w in self.works)
        title = f"{self.works[0].sweep}: {done} of {len(states)} runs are finished"
        if sys.stdout.isatty():
            result.say(f"\x1b[H\x1b[J{formats.table(list(states.items()))}\n{title}")
            return
        for name, state in states.items():
            word = state.partition(",")[0]
            if self.said.get(name, "waiting") != word:
                result.say(f"{title}; {name}: {word}")
            self.said[name] = word


def work_together(all_works: list[Work], count: int) -> int:
    """Runs `count` workers in this process; a signal stops all. Returns the exit code."""
    first = Worker(all_works)
    workers = [first, *(Worker(all_works, first.failed) for _ in range(count - 1))]

    def stop(number, frame):
        for worker in workers:
            worker.stop(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        return max(pool.map(Worker.work, workers))


def table_of_results(all_works: list[Work]) -> str:
    """Each point of the sweep with its finished seeds: their number, mean and deviation."""
    points = collections.defaultdict(list)
    for work in all_works:
        if work.is_finished():
            points[work.point].append(work)
    split = all_works[0].config.evaluate.final_split
    rows = [("run", "seeds", f"{split} accuracy", "standard deviation")]
    for name, done in points.items():
        values = [work.accuracy() for work in done]
        spread = formats.percent(statistics.stdev(values)) if len(values) > 1 else "-"
        mean = formats.percent(statistics.mean(values))
        if differences({work.run.name: origin(work.run.name, work.result()) for work in done}):
            mean, spread = "of different code, data or versions: no mean", "-"
        rows.append((name, str(len(values)), mean, spread))
    return formats.table(rows, right=3)


def dry_run(all_works: list[Work]) -> None:
    """Prints every run with its counts, its mismatch, and the hours that are left.

    The times come from a few steps on this machine's devices, for each network that is left.
    """
    parallel.start()  # the compiled programs are kept for the runs
    measured, rows, total = {}, [], 0.0
    for number, work in enumerate(all_works, 1):
        config, summary = work.config, work.result()
        built, hours = experiment.build(config), "finished"
        parts = (config.model, config.data, config.augmentation)
        network = "\n".join(map(str, (*parts, config.train.batch_size, config.train.dtype)))
        if summary:
            found = summary["parameters"], summary["multiply_adds"]
        elif work.has_diverged:
            found = counts.of_network(built.task.model, built.task.network_shape)
            hours = "diverged"
        else:
            if network not in measured:
                place = f"run {number} of {len(all_works)}"
                print(f"measuring a step of {work.run.name}, {place}", file=sys.stderr, flush=True)
                measured[network] = step_seconds(config)
            *found, start, step = measured[network]
            total += (seconds := start + built.steps * step)
            hours = f"{seconds / 3600:.3f}"
        equal = "" if work.run.mismatch is None else f"{work.run.mismatch:+.2%}"
        row = (work.run.name, formats.count(found[0]), formats.si(found[1]), equal)
        rows.append((*row, formats.count(built.steps), hours))
    head = ("run", "parameters", "multiply-adds", "mismatch", "steps", "hours")
    print(formats.table([head, *rows], right=5))
    print(f"{total / 3600:.2f} hours by one worker on {jax.devices()[0].device_kind}")


def step_seconds(config: ConfigDict) -> tuple[int, int, float, float]:
    """(parameters, multiply-adds, seconds until a first step, seconds of a step), measured."""
    begin = time.perf_counter()
    built = experiment.build(config)
    found = counts.of_network(built.task.model, built.task.network_shape)
    step, state, number = built.map(train_step, donate=True), built.start(), 0
    with contextlib.closing(built.data):
        state, _ = jax.block_until_ready(step(state, built.data.train.batch(0)))
        start = time.perf_counter()
        while time.perf_counter() - start < 3.0:
            number += 1
            state, _ = jax.block_until_ready(step(state, built.data.train.batch(number)))
        return *found, start - begin, (time.perf_counter() - start) / number


def latency(all_works: list[Work]) -> None:
    """Writes ROOT/SWEEP/latency.json: seconds of classifying 1 and 64 images, by point.

    The programs are those that densejax.predict compiles, without the preparation of images.
    """
    programs, random = {}, np.random.default_rng(0)

    def weights(leaf):  # of a plausible size; a norm's are ones
        drawn = random.normal(0, 0.05, leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    def classify(task, variables, images):
        return task.model.apply(variables, images)[0]

    for point, work in {work.point: work for work in all_works}.items():
        task = experiment.build(work.config).computed_task
        images = jnp.ones((64, *task.network_shape), task.preparation.dtype)
        variables = jax.eval_shape(task.model.init, jax.random.key(0), images[:1])
        variables = jax.tree.map(weights, variables)
        program = jax.jit(functools.partial(classify, task))
        for size in (1, 64):
            with jax.default_matmul_precision(experiment.matmul_precision(work.config)):
                compiled = program.lower(variables, images[:size]).compile()
            programs[point, size] = functools.partial(compiled, variables, images[:size])
    seconds = collections.defaultdict(dict)
    for (point, batch_size), value in in_turns(programs, 10).items():
        seconds[point][batch_size] = value
    write_times(all_works, "latency.json", seconds)
    rows = [(point, *map(_milliseconds, values.values())) for point, values in seconds.items()]
    print(formats.table([("run", "ms for 1 image", "ms for 64"), *rows], right=2))


def training_time(all_works: list[Work]) -> None:
    """Writes ROOT/SWEEP/training_time.json: seconds of a batch and its step, by point."""

    def training(built):
        step, state = built.map(train_step, donate=True), built.start()
        for number in itertools.count():
            state, metrics = step(state, built.data.train.batch(number))
            yield metrics

    with contextlib.ExitStack() as opened:
        programs = {}
        for point, work in {work.point: work for work in all_works}.items():
            built = experiment.build(work.config)
            opened.enter_context(contextlib.closing(built.data))
            programs[point] = functools.partial(next, training(built))
        seconds = in_turns(programs, 5)
    write_times(all_works, "training_time.json", seconds)
    rows = [(point, _milliseconds(value)) for point, value in seconds.items()]
    print(formats.table([("run", "ms for a step"), *rows], right=1))


def write_times(all_works: list[Work], name: str, seconds: dict[str, Any]) -> None:
    """Writes measured seconds, and the device, into ROOT/SWEEP."""
    folder = all_works[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / name, {"device": jax.devices()[0].device_kind, "seconds": seconds})


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def in_turns(programs: dict[Any, Callable[[], Any]], calls: int) -> dict[Any, float]:
    """Seconds of a call of each program, by name.

    Medians of ten rounds of so many calls each, after one round to warm up. All programs take turns
    in every round: what slows the machine slows them all.
    """
    seconds = collections.defaultdict(list)
    for _ in range(11):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(program())
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def commands(all_works: list[Work], form: str) -> str:
    """The runs that are left as shell lines, or as a SLURM array script."""
    words = joined_words()
    words = [word for word in words if not word.lstrip("-").startswith(("print=", "only="))]
    command = shlex.join([sys.executable, sys.argv[0], *words])
    names = [work.run.name for work in all_works if not work.is_over()]
    if not names:
        raise UserError(f"--print={form}: every run is finished")
    if form == "shell":
        return "".join(f"{command} --only={name}\n" for name in names)
    return SLURM.format(
        sweep=all_works[0].sweep, last=len(names) - 1, names=shlex.join(names), command=command
    )


def main() -> int:
    """Does what the flags say; returns the exit code."""
    measures = ((DRY_RUN, dry_run), (LATENCY, latency), (TRAINING_TIME, training_time))
    asked = [measure for flag, measure in measures if flag.value]
    if not asked:  # this process only counts and waits: the devices are its children's
        jax.config.update("jax_platforms", "cpu")
    all_works = works()
    if PRINT.value:
        print(commands(all_works, PRINT.value), end="")
        return 0
    for measure in asked:
        measure(all_works)
    if asked:
        return 0
    prepare_data(all_works)
    return work_together(all_works, WORKERS.value)


if __name__ == "__main__":
    command_line.run(main)
