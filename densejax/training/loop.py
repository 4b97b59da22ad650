"""A run, read top to bottom: build, restore, step, log, evaluate, save, report.

What a resume does: (1) a run directory belongs to one configuration; (2) a start in it restores
the newest intact checkpoint; (3) the step number is the position in the data and in every random
stream, so what follows is bitwise what would have followed; (4) records of metrics.jsonl behind
that step are cut off and written again; (5) an evaluation that a signal cut short comes first;
(6) a finished run prints its result again, if code, data, weights and precision are still those
that it is of.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

import densejax
from densejax.config import UserError, flatten
from densejax.data import facts
from densejax.data.builders import DataError
from densejax.runs import checkpoint, files, goodput, hosts, lock, metric_log, workdir
from densejax.training import metrics, result
from densejax.training.experiment import Experiment, build, open_checkpoints, select
from densejax.training.step import TrainState, train_step


def due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` steps (0: never) and at the last happens after `step`."""
    return every > 0 and (step % every == 0 or step == last)


def run(config: ConfigDict, directory: str, mode: str, force: bool = False) -> int:
    """Trains, or resumes, or evaluates; returns the process's exit code.

    Args:
      config: the whole configuration.
      directory: the run directory; nothing is written there before everything is known to fit.
      mode: "train" or "eval".
      force: resume in the directory of another configuration.
    """
    experiment = build(config)
    path = files.path_of("--workdir", directory)
    versions, is_run, summary, changes = result.versions(config), False, None, []
    flags = {"--mode": mode, "--workdir": directory, "--resume": "force" if force else "same"}
    hosts.agree(flatten(config) | versions | flags)
    if jax.process_index() == 0:  # it decides: another host may see the directory of a moment ago
        is_run = (path / "config.json").exists()
        if mode == "train":
            lock.require_free(path)
            summary = result.finished(path, config, versions, force)
            if is_run and not force and not summary:
                workdir.check(path, config, versions)
        elif is_run or not config.train.weights:
            changes = workdir.check(path, config, versions, measures=True)
    is_run, is_finished = hosts.exchange([is_run, summary is not None])[0]
    if is_finished:
        if summary:
            result.say(result.line(summary, path))
        return 0
    _ = experiment.data  # what cannot be read says so before anything is written
    if is_run and (mode == "eval" or not force):
        facts.require_same(path, experiment.info)
    with contextlib.closing(open_checkpoints(config, path)) as checkpoints:
        if mode == "eval":
            outcome = result.measure(experiment, select(experiment, checkpoints))
            outcome["damaged_checkpoints"] = checkpoints.passed_over
            result.say(json.dumps(outcome | {"versions": versions, "changes": changes}, indent=2))
            return 0
        start = checkpoints.latest_step() or 0
        if start > experiment.steps:
            raise UserError(
                f"train.epochs = {config.train.epochs}: {path} has {start} steps behind it, more "
                f"than these {experiment.steps}; give more epochs or another --workdir"
            )
        if start == 0:
            _ = experiment.weights  # refused, if they are, before anything is written
    versions |= {"data": experiment.data.version}
    with workdir.open_run(path, config, force, versions) as guard:
        if jax.process_index() == 0 and (force or not (path / facts.FILE).exists()):
            facts.write(path, experiment.info, experiment.data.sample())
        return train(experiment, path, versions, guard)


def train(
    experiment: Experiment, path: epath.Path, versions: dict[str, str], guard: Callable[[], None]
) -> int:
    """Trains from where the run directory stands; returns the process's exit code.

    Args:
      experiment: what to train.
      path: of the run directory, whose lock is held.
      versions: that the result depends on, which belong into it.
      guard: called before every write: LockError where another process has the directory by now.
    """
    config = experiment.config
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(hosts.Stop())
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(config, path, guard)))
        stack.enter_context(contextlib.closing(experiment.data))
        experiment.data.heed(lambda: stop.received is not None)
        state = checkpoints.restore_latest(experiment.abstract_state)
        start = 0 if state is None else int(state.step)
        clock = goodput.Goodput(
            path / "goodput.json", start, densejax.STARTED, config.log.seconds,
            len(workdir.history(path)), guard)  # fmt: skip
        clock.write()
        stack.callback(clock.write)
        described = result.summarise(experiment, path, start)
        log = metric_log.MetricLog(
            path,
            total_steps=experiment.steps,
            start_step=start,
            batch_size=config.train.batch_size,
            epoch_steps=experiment.data.train.steps_per_epoch,
            seconds=config.log.seconds,
            evaluates_first=evaluates_first(experiment, checkpoints, start),
            saved=checkpoints.records(start),
            guard=guard,
        )
        stack.enter_context(contextlib.closing(log))
        state = experiment.start() if state is None else state
        state, first_step, last_metrics = fit(
            experiment, state, log, checkpoints, stop, clock, path / "profile"
        )
        with clock.spend("save"):
            checkpoints.wait()
        if not stop.signal:
            chosen, passed_over = state, []
            if config.checkpoint.select == "best":
                chosen = select(experiment, checkpoints)
                passed_over = checkpoints.passed_over
            with log.pause(), clock.spend("evaluation"):
                known = last_metrics if chosen is state else {}
                outcome = result.measure(experiment, chosen, known, stop.after_step)
        clock.mark(int(state.step), checkpoints.steps())
        if stop.signal:
            result.say(
                f"{stop.signal.name}: saved step {int(state.step)}; the same command goes on from "
                f"it"
            )
            return 128 + signal.SIGINT if stop.signal is signal.SIGINT else 0
    outcome |= described | {
        "damaged_checkpoints": passed_over,
        "seconds_to_first_step": first_step,
        "images_per_second": log.images_per_second,
        "versions": versions,
        "changes": workdir.changes(path),
        "config": json.loads(config.to_json()),
    }
    if jax.process_index() == 0:
        try:
            guard()
            result.write(path, outcome)
        except OSError as error:
            raise UserError(
                f"workdir={path}: the result cannot be written ({error}); all is saved: the same "
                f"command writes it once there is room"
            ) from error
    result.say(result.line(outcome, path))
    return 0


def evaluates_first(
    experiment: Experiment, checkpoints: checkpoint.Checkpoints, start: int
) -> bool:
    """Whether a signal cut the evaluation of the step that the run goes on from."""
    evaluate = experiment.config.evaluate
    every = evaluate.every_epochs * experiment.data.train.steps_per_epoch
    error = checkpoints.metrics(start).get(f"{evaluate.split}_error", math.nan)
    return start > 0 and due(start, every, experiment.steps) and math.isnan(error)


def fit(
    experiment: Experiment,
    state: TrainState,
    log: metric_log.MetricLog,
    checkpoints: checkpoint.Checkpoints,
    stop: hosts.Stop,
    clock: goodput.Goodput,
    traces: epath.Path,
) -> tuple[TrainState, float | None, dict[str, dict[str, float]]]:
    """Takes steps until the last, or until `stop` says that all processes stop.

    Returns:
      The state, seconds from the package's import to the end of its first step (None without
      one), and the metrics of the last step's evaluation by split.
    """
    config, last = experiment.config, experiment.steps
    epoch, split = experiment.data.train.steps_per_epoch, config.evaluate.split
    evaluate_every, save_every = (
        config.evaluate.every_epochs * epoch,
        config.checkpoint.every_epochs * epoch,
    )
    best_is_kept = config.checkpoint.select == "best"
    take_step = experiment.map(train_step, donate=True)
    first_step, before, late, evaluated = None, None, [], {}

    def log_late():
        while late:
            step, sums = late.pop()
            values = metrics.means(sums) if int(sums["count"]) else {}  # 0: all were skipped
            values = {f"train_{name}": value for name, value in values.items()}
            values |= {"skipped_steps": int(sums["skipped"][0])}
            log.train(step, values | {"learning_rate": float(sums["learning_rate"])})

    def require_finite(step, sums):
        _, in_a_row = jax.device_get(sums["skipped"])
        if in_a_row:
            logging.warning("Step %d is skipped: it is not finite (%d in a row).", step, in_a_row)
        if in_a_row >= config.train.max_skipped_steps:
            raise UserError(
                f"train.max_skipped_steps = {in_a_row}: so many steps in a row, up to {step}, were "
                f"not finite; the newest checkpoint is of step {checkpoints.latest_step()}; look "
                f"at the data or lower optimizer.learning_rate"
            )

    def evaluate(step):
        """The error; NaN where a signal cuts the evaluation short."""
        with clock.spend("evaluation"):
            values = experiment.evaluate(state, split, stop.after_step)
        if values is None:
            return math.nan
        evaluated.clear()
        evaluated[split] = values
        log.evaluation(step, split, values)
        return 1 - values["accuracy"]

    def save(step, error):
        with clock.spend("save"):
            checkpoints.save(step, state, {f"{split}_error": error}, log.problem, log.digest)
        clock.mark(step, checkpoints.steps())

    start, profile = int(state.step), contextlib.ExitStack()
    if evaluates_first(experiment, checkpoints, start):
        with log.pause():
            error = evaluate(start)
        if stop.signal:
            return state, first_step, evaluated
        checkpoints.evaluated(start, {f"{split}_error": error})
    # Steps that lie behind a resume have been traced before it.
    first_traced, last_traced = config.profile.steps or (0, 0)
    try:
        for step in range(start + 1, last + 1):
            if step == max(first_traced, start + 1) <= last_traced and jax.process_index() == 0:
                profile.enter_context(metric_log.trace(traces))
            with clock.spend("input_wait"):
                batch = experiment.data.train.batch(step - 1)
            clock.turn("step" if first_step else "compile")
            state, sums = take_step(state, batch)
            if first_step is None:
                jax.block_until_ready(sums)
                first_step = time.monotonic() - densejax.STARTED
                clock.turn("step")
            if before:  # one step is queued, no more: a signal need not wait long
                require_finite(*before)
            before = (step, sums)
            if step == last_traced:
                jax.block_until_ready(sums)
                profile.close()
            log_late()  # the metrics of the step before, while the device is busy with this one
            if due(step, config.log.every_steps, last):
                late.append((step, sums))
            stops = stop.after_step()  # a signal that arrives below this line waits for a step
            evaluates = due(step, evaluate_every, last) and not stops
            saves = stops or due(step, save_every, last) or (evaluates and best_is_kept)
            if evaluates or saves:
                require_finite(*before)
                before = None
                log_late()
                error = math.nan
                with log.pause():
                    if evaluates:
                        error = evaluate(step)
                        stops = stop.signal is not None
                    if saves or stops:
                        save(step, error)
            clock.write(now=saves)
            if stops:
                break
    except DataError as error:  # the input has failed, and the state is whole
        step = int(state.step)
        if jax.process_count() > 1 or not step:  # a save needs all, and they wait in a step
            raise
        if before:
            require_finite(*before)
        log_late()
        with log.pause():
            save(step, math.nan)
        checkpoints.wait()
        if not stop.after_step():
            raise DataError(f"{error}; step {step} is saved") from error
    profile.close()
    clock.turn("step")
    return state, first_step, evaluated
